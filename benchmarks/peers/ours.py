"""jnorm, by its functions, with the native kernels and with the XLA form."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax

import jnorm

from ..cases import Case
from .built import Built, Unsupported, around, in_order, running


def status() -> dict[str, str]:
    """Which kernels are active, and why."""
    if not hasattr(jnorm, "kernels_status"):
        return {"active": "xla", "reason": "this version of jnorm has one form of its kernels"}
    found = jnorm.kernels_status()
    return {"active": str(found.active), "reason": str(found.reason), "isa": str(getattr(found, "isa", ""))}


def forced(form: str) -> contextlib.AbstractContextManager:
    return jnorm.kernels(form) if hasattr(jnorm, "kernels") else contextlib.nullcontext()


def has_native() -> bool:
    return status()["active"] == "native"


def native(case: Case) -> Built:
    if not has_native():
        raise Unsupported(f"native kernels are not active: {status()['reason']}")
    return build(case, "native")


def xla(case: Case) -> Built:
    return build(case, "xla")


def build(case: Case, form: str) -> Built:
    fused = fused_add(case) if case.op == "add" else None
    return Built(fused or unfused(case), running(case) if case.norm == "batch_norm" else None, context=functools.partial(forced, form))


def fused_add(case: Case) -> Callable | None:
    """The norm that adds the residual itself, where this version has it."""
    function = getattr(jnorm, f"add_{case.norm}", None)
    if function is None:
        return None
    return lambda affine, state, xs: (function(*xs, *in_order(affine), epsilon=case.epsilon), state)


def unfused(case: Case) -> Callable:
    if case.op == "add":
        return around(case, lambda affine, state, x: call(case, affine, state, x, None))
    return lambda affine, state, xs: call(case, affine, state, xs[0], xs[1] if case.has_residual else None)


def call(case: Case, affine: dict[str, jax.Array], state: Any, x: jax.Array, residual: jax.Array | None) -> tuple[jax.Array, Any]:
    scale, bias = affine["scale"], affine.get("bias")
    match case.norm:
        case "batch_norm":
            evaluate = case.op == "eval"
            return jnorm.batch_norm(
                x, state, scale, bias, use_running_average=evaluate, activation=case.activation, residual=residual, epsilon=case.epsilon
            )
        case "group_norm":
            return jnorm.group_norm(x, scale, bias, num_groups=case.groups, activation=case.activation, epsilon=case.epsilon), state
        case "instance_norm":
            return jnorm.instance_norm(x, scale, bias, epsilon=case.epsilon), state
        case "layer_norm":
            return jnorm.layer_norm(x, scale, bias, epsilon=case.epsilon), state
        case _:
            return jnorm.rms_norm(x, scale, epsilon=case.epsilon), state
