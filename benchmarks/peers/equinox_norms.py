"""Equinox. It normalizes one example, under vmap, and has its channels first: it is given its own layout."""

import importlib
from collections.abc import Callable
from typing import Any

import jax

from ..cases import MOMENTUM, ROW_NORMS, Case
from .built import Built, Unsupported, around, in_order, running

eqx: Any = importlib.import_module("equinox")


def build(case: Case) -> Built:
    if case.norm == "batch_norm":
        return batch_norm(case)
    common = {"eps": case.epsilon}
    modules: dict[str, Callable[[], Any]] = {
        "layer_norm": lambda: eqx.nn.LayerNorm(case.channels, **common),
        "rms_norm": lambda: eqx.nn.RMSNorm(case.channels, use_bias=False, **common),
        "group_norm": lambda: eqx.nn.GroupNorm(case.groups, case.channels, **common),
        "instance_norm": lambda: eqx.nn.GroupNorm(case.channels, case.channels, **common),
    }
    module = modules[case.norm]()
    rows = case.norm in ROW_NORMS

    def norm(affine: dict[str, jax.Array], state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        call: Callable[[jax.Array], jax.Array] = with_affine(module, affine)
        for _ in range(x.ndim - 1 if rows else 1):
            call = jax.vmap(call)
        return call(x), state

    return Built(around(case, norm), channels_first=not rows)


def batch_norm(case: Case) -> Built:
    if len(case.shape) < 2:
        raise Unsupported("no batch axis")
    module, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        case.channels, "batch", eps=case.epsilon, momentum=MOMENTUM, inference=case.op == "eval", mode="batch"
    )
    values = running(case)
    # Its hidden average divided by (1 - momentum**count) is the statistic.
    hidden = (values["mean"] * (1 - MOMENTUM), values["var"] * (1 - MOMENTUM))
    counter = state.get(module.batch_counter)
    state = state.set(module.batch_state_index, hidden).set(module.batch_counter, counter + 1)

    def norm(affine: dict[str, jax.Array], state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return jax.vmap(with_affine(module, affine), axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    return Built(around(case, norm), state, channels_first=True)


def with_affine(module: Any, affine: dict[str, jax.Array]) -> Any:
    names = ["weight"] + (["bias"] if "bias" in affine else [])
    return eqx.tree_at(lambda m: [getattr(m, n) for n in names], module, in_order(affine))
