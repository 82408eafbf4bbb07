"""Keras on its JAX backend, with its own policy for mixed precision."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import jax

from ..cases import MOMENTUM, Case
from .built import Built, around, in_order, running

os.environ["KERAS_BACKEND"] = "jax"  # read when it is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
keras: Any = importlib.import_module("keras")


def build(case: Case) -> Built:
    common = {"epsilon": case.epsilon, "dtype": "mixed_bfloat16" if case.dtype == "bfloat16" else "float32"}
    layers: dict[str, Callable[[], Any]] = {
        "batch_norm": lambda: keras.layers.BatchNormalization(momentum=MOMENTUM, **common),
        "layer_norm": lambda: keras.layers.LayerNormalization(**common),
        "rms_norm": lambda: keras.layers.RMSNormalization(**common),
        "group_norm": lambda: keras.layers.GroupNormalization(case.groups, **common),
        "instance_norm": lambda: keras.layers.GroupNormalization(-1, **common),
    }
    layer = layers[case.norm]()
    layer.build(case.shape)
    options = {"training": case.op != "eval"} if case.norm == "batch_norm" else {}

    def norm(affine: dict[str, jax.Array], state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return layer.stateless_call(in_order(affine), state, x, **options)

    return Built(around(case, norm), list(running(case).values()) if case.norm == "batch_norm" else [])
