"""What every JAX peer is turned into, and what stands around its norm where it has no such form itself."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..cases import Case
from ..oracle import parameters


class Unsupported(Exception):
    """The peer has no such norm."""


@dataclasses.dataclass(frozen=True)
class Built:
    """`apply(affine, state, xs) -> (out, state)`: `affine` is {"scale"[, "bias"]} in float32, `xs` is (x,) or (x, residual), and `out` is y
    or, where a residual is only added before the norm, (y, x + residual). Arrays are channels-last, unless the library is not."""

    apply: Callable[[dict[str, jax.Array], Any, tuple[jax.Array, ...]], tuple[Any, Any]]
    state: Any = None
    channels_first: bool = False
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def around(case: Case, norm: Callable[[dict[str, jax.Array], Any, jax.Array], tuple[jax.Array, Any]]) -> Callable:
    """`norm(affine, state, x) -> (y, state)` with the case's residual and activation, as its users write them."""
    activate = {"relu": jax.nn.relu, "silu": jax.nn.silu, None: lambda y: y}[case.activation]

    def apply(affine: dict[str, jax.Array], state: Any, xs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        x = xs[0] + xs[1] if case.op == "add" else xs[0]
        y, state = norm(affine, state, x)
        y = y.astype(x.dtype)
        y = activate(y + xs[1] if case.op == "add_act" else y)
        return ((y, x) if case.op == "add" else y), state

    return apply


def in_order(affine: dict[str, jax.Array]) -> list[jax.Array]:
    """scale[, bias]; a dict that went through a transformation comes back with its keys sorted."""
    return [affine[name] for name in ("scale", "bias") if name in affine]


def running(case: Case) -> dict[str, jax.Array]:
    """The oracle's running statistics."""
    return {name: jnp.asarray(value) for name, value in parameters(case.channels).items() if name in ("mean", "var")}
