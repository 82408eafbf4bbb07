"""Haiku. It makes parameters in x's dtype, so they are cast to it."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from ..cases import MOMENTUM, Case
from .built import Built, around, running

hk: Any = importlib.import_module("haiku")


def make(case: Case, training: bool) -> Any:
    def forward(x: jax.Array) -> jax.Array:
        match case.norm:
            case "batch_norm":
                return hk.BatchNorm(True, True, MOMENTUM, case.epsilon, name="norm")(x, is_training=training)
            case "layer_norm":
                return hk.LayerNorm(-1, True, True, case.epsilon, name="norm")(x)
            case "rms_norm":
                return hk.RMSNorm(-1, case.epsilon, name="norm")(x)
            case "group_norm":
                return hk.GroupNorm(case.groups, eps=case.epsilon, name="norm")(x)
            case _:
                return hk.InstanceNorm(True, True, case.epsilon, name="norm")(x)

    return hk.transform_with_state(forward)


def build(case: Case) -> Built:
    transformed = make(case, case.op != "eval")
    x = jax.ShapeDtypeStruct(case.shape, jnp.dtype(case.dtype))
    shapes, state_shapes = jax.eval_shape(make(case, True).init, jax.random.key(0), x)
    names = {"scale": "scale", "bias": "offset"}

    def norm(affine: dict[str, jax.Array], state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        params = {names[k]: v for k, v in affine.items()}
        params = {"norm": {k: params[k].reshape(s.shape).astype(s.dtype) for k, s in shapes["norm"].items()}}
        return transformed.apply(params, state, None, x)

    return Built(around(case, norm), averages(case, state_shapes) if case.norm == "batch_norm" else state_shapes)


def averages(case: Case, shapes: Any) -> Any:
    """Haiku's moving averages, debiased, after one update with the running statistics."""
    values = running(case)

    def fill(module: str, name: str, shape: Any) -> jax.Array:
        if name == "counter":
            return jnp.ones(shape.shape, shape.dtype)
        value = values["mean" if "mean" in module else "var"].reshape(shape.shape).astype(shape.dtype)
        return value * (1 - MOMENTUM) if name == "hidden" else value

    return {module: {name: fill(module, name, s) for name, s in inner.items()} for module, inner in shapes.items()}
