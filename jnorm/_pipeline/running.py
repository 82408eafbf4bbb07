"""Running statistics: exponential, debiased and cumulative averages. Updates carry no gradient."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._stats import Stats
from ..typing import BatchNormState, Momentum


def check_state(state: Any, feature_shape: tuple[int, ...], is_complex: bool) -> None:
    """The keys, shapes and kinds of a state of mean and var."""
    keys = set(state) if isinstance(state, dict) else None
    if keys is None or keys - {"count"} != {"mean", "var"}:
        got = type(state).__name__ if keys is None else sorted(map(str, keys))
        raise ValueError(f"state must be a dict of 'mean', 'var' and optionally 'count', got {got}; make it with jnorm.batch_norm_state.")
    for key in ("mean", "var"):
        if jnp.shape(state[key]) != feature_shape:
            raise ValueError(f"state[{key!r}] must have the shape of x's feature axes {feature_shape}, got {jnp.shape(state[key])}.")
        if not jnp.issubdtype(jnp.result_type(state[key]), jnp.inexact):
            raise TypeError(f"state[{key!r}] must be floating, got {jnp.result_type(state[key])}.")
    if "count" in keys and jnp.shape(state["count"]) != ():
        raise ValueError(f"state['count'] must be a scalar, got shape {jnp.shape(state['count'])}.")
    if jnp.iscomplexobj(state["mean"]) != is_complex or jnp.iscomplexobj(state["var"]):
        raise TypeError(
            f"x is {'complex' if is_complex else 'real'}, but state['mean'] is {jnp.asarray(state['mean']).dtype} and state['var'] is "
            f"{jnp.asarray(state['var']).dtype}; make the state with batch_norm_state(..., dtype=...) of x's kind (var is always real)."
        )


def check_momentum(momentum: Momentum, state: BatchNormState) -> None:
    if momentum is None:
        if "count" not in state:
            raise ValueError(
                "momentum=None is the cumulative average, which needs a count in the state: "
                "batch_norm_state(..., track_count=True), or track_count=True of a module."
            )
    elif isinstance(momentum, str) or jnp.ndim(momentum) != 0:
        raise ValueError(f"momentum must be a scalar, got {momentum!r}.")
    elif isinstance(momentum, int | float | np.number) and not 0 <= float(momentum) <= 1:
        raise ValueError(f"momentum is the fraction of the old value that is kept, from 0 to 1, got {momentum}.")


def corrected_var(stats: Stats, correction: int | float) -> jax.Array:
    """m2 / max(n - correction, 1): 0 is the biased variance, 1 Bessel's."""
    return stats.m2 / jnp.maximum(stats.count - correction, 1)


def update(state: BatchNormState, mean: jax.Array, var: jax.Array, counted: jax.Array, momentum: Momentum) -> BatchNormState:
    """The state after one batch: features that counted nothing stay, and so does everything where none did."""
    mean, var, counted = lax.stop_gradient((mean, var, counted))
    old = cast(BatchNormState, jax.tree.map(lambda a: lax.stop_gradient(jnp.asarray(a)), dict(state)))
    keep = jnp.asarray(1.0 if momentum is None else momentum, var.dtype).clip(0, 1)
    count = keep * old["count"].astype(var.dtype) + 1 if "count" in old else None
    if count is not None:
        keep = 1 - 1 / count

    def moved(a: jax.Array, batch: jax.Array) -> jax.Array:
        a_kept, k = a.astype(batch.dtype), keep.astype(batch.dtype)
        return jnp.where(counted, k * a_kept + (1 - k) * batch, a_kept).astype(a.dtype)

    new = BatchNormState(mean=moved(old["mean"], mean), var=moved(old["var"], var))
    if "count" in old and count is not None:
        new["count"] = jnp.where(counted.any(), count, old["count"].astype(count.dtype)).astype(old["count"].dtype)
    return new
