"""Flax: Linen with its defaults, Linen with `use_fast_variance=False`, which is as accurate as jnorm where the mean is small, and NNX."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from ..cases import MOMENTUM, Case
from .built import Built, around, running


def linen(case: Case) -> Built:
    return of_linen(case, True)


def linen_slow_variance(case: Case) -> Built:
    return of_linen(case, False)


def of_linen(case: Case, fast: bool) -> Built:
    common: dict[str, Any] = {"epsilon": case.epsilon, "dtype": jnp.dtype(case.dtype), "use_fast_variance": fast}
    modules = {
        "batch_norm": lambda: nn.BatchNorm(use_running_average=case.op == "eval", momentum=MOMENTUM, **common),
        "layer_norm": lambda: nn.LayerNorm(**common),
        "rms_norm": lambda: nn.RMSNorm(**common),
        "group_norm": lambda: nn.GroupNorm(case.groups, **common),
        "instance_norm": lambda: nn.InstanceNorm(**common),
    }
    module: nn.Module = modules[case.norm]()

    def norm(affine: dict[str, jax.Array], state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        if state is None:
            return module.apply({"params": affine}, x), None  # type: ignore[return-value]
        y, new = module.apply({"params": affine, "batch_stats": state}, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return Built(around(case, norm), running(case) if case.norm == "batch_norm" else None)


def nnx_norm(case: Case) -> Built:
    common: dict[str, Any] = {"epsilon": case.epsilon, "dtype": jnp.dtype(case.dtype), "rngs": nnx.Rngs(0)}
    modules = {
        "batch_norm": lambda: nnx.BatchNorm(case.channels, use_running_average=case.op == "eval", momentum=MOMENTUM, **common),
        "layer_norm": lambda: nnx.LayerNorm(case.channels, **common),
        "rms_norm": lambda: nnx.RMSNorm(case.channels, **common),
        "group_norm": lambda: nnx.GroupNorm(case.channels, case.groups, **common),
        "instance_norm": lambda: nnx.InstanceNorm(case.channels, **common),
    }
    graph, variables = nnx.split(modules[case.norm]())

    def norm(affine: dict[str, jax.Array], state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        values = affine | (state or {})
        module: Any = nnx.merge(graph, nnx.map_state(lambda path, v: v.replace(values[path[-1]]), variables))
        y = module(x)
        return y, None if state is None else {"mean": module.mean[...], "var": module.var[...]}

    return Built(around(case, norm), running(case) if case.norm == "batch_norm" else None)
