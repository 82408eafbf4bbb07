"""The ways to call a norm: forward alone, and a training step in three forms, since the ranking changes with them.

    split      two programs: forward, which returns the vjp, and backward
    one        one program, given the cotangent of y
    dependent  one program, in which the cotangent of y depends on y

Every peer is quoted at its best way; jnorm at "one", as its claims are worded.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cases import Case
from .oracle import Arrays
from .peers import Built

WAYS = ("one", "split", "dependent")
CLAIMED = "one"


@dataclasses.dataclass(frozen=True)
class Program:
    """`call()` runs it once and returns its output, not waited for. `compiled`: of the one jit, or of the forward pass."""

    call: Callable[[], Any]
    compiled: Any


@dataclasses.dataclass(frozen=True)
class Arguments:
    affine: dict[str, jax.Array]
    state: Any
    xs: tuple[jax.Array, ...]
    dys: tuple[jax.Array, ...]

    def tuple(self) -> tuple[Any, ...]:
        return self.affine, self.state, self.xs, self.dys


def channels_first(a: Any) -> Any:
    return np.moveaxis(a, -1, 1)


def channels_last(a: Any) -> Any:
    return np.moveaxis(a, 1, -1)


def arguments(case: Case, given: Arrays, built: Built, cache: dict[Any, jax.Array]) -> Arguments:
    """`given` on the device, in the peer's layout. `cache` lets peers of one layout share arrays."""

    def place(name: str) -> jax.Array:
        key = (name, built.channels_first)
        if key not in cache:
            a = given[name]
            cache[key] = jnp.asarray(np.ascontiguousarray(channels_first(a) if built.channels_first else a), case.dtype)
        return cache[key]

    affine = {k: jnp.asarray(given[k]) for k in ("scale", *(["bias"] if case.has_bias else []))}
    xs = tuple(place(k) for k in ("x", "residual") if k in given)
    return Arguments(affine, built.state, xs, tuple(place(k) for k in ("dy", "ds") if k in given))


def forward(built: Built) -> Callable:
    return lambda affine, state, xs, dys: built.apply(affine, state, xs)


def linearized(built: Built) -> Callable:
    """(affine, state, xs) -> (out, vjp, state)."""
    return lambda affine, state, xs: jax.vjp(lambda a, v: built.apply(a, state, v), affine, xs, has_aux=True)


def gradients(case: Case, vjp: Callable, dys: Any) -> tuple[Any, Any]:
    """Where the residual is only added to x, its gradient is that of x, and comes out once."""
    affine, xs = vjp(dys)
    return affine, xs[:1] if case.op == "add" else xs


def cotangent(case: Case, dys: Any) -> Any:
    return dys if case.op == "add" else dys[0]


def step(case: Case, built: Built) -> Callable:
    def one(affine: Any, state: Any, xs: Any, dys: Any) -> Any:
        out, vjp, state = linearized(built)(affine, state, xs)
        return out, state, gradients(case, vjp, cotangent(case, dys))

    return one


def dependent_step(case: Case, built: Built) -> Callable:
    def dependent(affine: Any, state: Any, xs: Any, dys: Any) -> Any:
        out, vjp, state = linearized(built)(affine, state, xs)
        return out, state, gradients(case, vjp, jax.tree.map(lambda y, c: y * c, out, cotangent(case, dys)))

    return dependent


def program(built: Built, f: Callable, given: Arguments) -> Program:
    with built.context():
        compiled = jax.jit(f).lower(*given.tuple()).compile()
    values = given.tuple()
    return Program(lambda: compiled(*values), compiled)


def split_program(case: Case, built: Built, given: Arguments) -> Program:
    """The vjp is a pytree of what is kept for the backward pass, and crosses between the two programs."""
    with built.context():
        lowered = jax.jit(linearized(built)).lower(given.affine, given.state, given.xs)
        ahead = lowered.compile()
        kept = jax.tree.map(lambda o: jax.ShapeDtypeStruct(o.shape, o.dtype), lowered.out_info[1])
        back = jax.jit(lambda vjp, dys: gradients(case, vjp, cotangent(case, dys))).lower(kept, given.dys).compile()

    def call() -> Any:
        out, vjp, state = ahead(given.affine, given.state, given.xs)
        return out, state, back(vjp, given.dys)

    return Program(call, ahead)


def step_program(case: Case, built: Built, way: str, given: Arguments) -> Program:
    if way == "split":
        return split_program(case, built, given)
    return program(built, (step if way == "one" else dependent_step)(case, built), given)


def results(case: Case, built: Built, output: Any) -> dict[str, np.ndarray]:
    """The output of the forward pass, or of the step given the cotangent, under the oracle's names and in its layout."""
    restored = channels_last if built.channels_first else (lambda a: a)

    def wide(a: Any) -> np.ndarray:
        return np.asarray(a.astype(jnp.float32))

    out = output[0]
    found = {"y": out[0], "sum": out[1]} if case.op == "add" else {"y": out}
    if len(output) == 2:
        return {k: restored(wide(v)) for k, v in found.items()}
    affine, xs = output[2]
    found |= {"dx": xs[0]} | ({"dresidual": xs[1]} if len(xs) > 1 else {})
    return {k: restored(wide(v)) for k, v in found.items()} | {f"d{k}": wide(v) for k, v in affine.items()}
