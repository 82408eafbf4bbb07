"""Statistics of a whole data set, from those of its batches: the states that collect them, and how a batch enters.

A state of running statistics collects where it has one key more, of the shape of the features. Norms whose state has other averages say in
terms of mean and var what theirs are:

    "values"    how many values were counted: mean and var are those of all of them together
    "batches"   how many batches were: mean and var are averages of theirs, of the variances with Bessel's correction
    "biased_batches"   the same, of the biased variances

Where the averages normalize meanwhile, what is collected stands beside them: as "collected_mean" and so on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax_internals import lying_as
from .._kernels._forms import wider_dtype
from .._stats import Stats

VALUES, BATCHES, BIASED = "values", "batches", "biased_batches"
KEYS = (VALUES, BATCHES, BIASED)
APART = {"mean": "collected_mean", "var": "collected_var", "std": "collected_std"}
# All that a state may have more while it collects.
ENTRIES = (*KEYS, *APART.values())


def collects(state: Mapping[str, Any]) -> bool:
    return any(key in state for key in KEYS)


def key_of(state: Mapping[str, Any]) -> str:
    return next(key for key in KEYS if key in state)


def collection(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with what it collects in the place of its averages, where it stands beside them."""
    plain = {key: v for key, v in state.items() if key not in APART.values()}
    return plain | {key: state[apart] for key, apart in APART.items() if apart in state}


def with_collection(state: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The state whose collection became `new`."""
    names = {apart: key for key, apart in APART.items()}
    return {key: v if APART.get(key) in state else new[names.get(key, key)] for key, v in state.items()}


def collected(state: Mapping[str, Any], stats: Stats) -> dict[str, jax.Array]:
    """The state with one batch more."""
    stats = _beside(state, lax.stop_gradient(stats))
    if VALUES in state:
        number, var = stats.count, stats.var
    else:
        number, var = (stats.count > 0).astype(stats.count.dtype), stats.m2 / jnp.maximum(stats.count - int(BATCHES in state), 1)
    dtype = wider_dtype(stats.center, jnp.asarray(state["mean"]))
    center, offset = stats.center.astype(dtype), stats.offset.astype(dtype)
    return _mixed(state, number, lambda mean: (center - mean) + offset, var, dtype)


def averaged(state: Mapping[str, Any], mean: jax.Array, var: jax.Array, number: jax.Array) -> dict[str, jax.Array]:
    """The state with `number` members more, of these averages: what lies between their means is no part of the variance."""
    mean, var, number = _beside(state, lax.stop_gradient((mean, var, number)))
    dtype = wider_dtype(mean, jnp.asarray(state["mean"]))
    return _mixed(state, number, lambda before: mean.astype(dtype) - before, var, dtype, between=False)


def _beside(state: Mapping[str, Any], tree: Any) -> Any:
    """With the state's sharding in types."""
    return jax.tree.map(lambda a: lying_as(a, jnp.asarray(state["mean"])), tree)


def merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The state of the batches of both."""
    first, second = ({k: lax.stop_gradient(jnp.asarray(v)) for k, v in collection(state).items()} for state in (one, two))
    dtype = wider_dtype(second["mean"], first["mean"])
    # The square of a standard deviation has its epsilon in every share.
    given, var = (s["var"] if "var" in s else s["std"] ** 2 if "std" in s else jnp.zeros_like(s["mean"].real) for s in (first, second))
    new = _mixed({**first, "var": given}, second[key_of(one)], lambda mean: second["mean"].astype(dtype) - mean, var, dtype)
    return with_collection(one, new | {"std": jnp.sqrt(new["var"])})


def _mixed(
    state: Mapping[str, Any],
    number: jax.Array,
    apart: Callable[[jax.Array], jax.Array],
    var: jax.Array,
    mean_dtype: Any,
    between: bool = True,
) -> dict[str, jax.Array]:
    """`number` values or batches more, of this variance, whose mean is `apart` from the state's.

    In convex combinations, so that neither a sum of squares nor the number of values is ever multiplied up. What lies between the means
    is part of the variance where values are counted, unless these are averages already.
    """
    key = key_of(state)
    old = {k: lax.stop_gradient(jnp.asarray(v)) for k, v in collection(state).items()}
    dtype = wider_dtype(old[key], number)
    number, var, count = number.astype(dtype), var.astype(dtype), old[key].astype(dtype)
    total = count + number
    weight = number / jnp.where(total > 0, total, 1)
    # What stands there before the first batch has no weight, and no rounding of it must stay.
    mean, before = (jnp.where(count > 0, old[k].astype(d), jnp.zeros((), d)) for k, d in (("mean", mean_dtype), ("var", dtype)))
    delta = apart(mean)
    spread = (1 - weight) * weight * jnp.abs(delta).astype(dtype) ** 2 if between and key == VALUES else jnp.zeros_like(weight)
    new = {"mean": mean + weight.astype(mean_dtype) * delta, "var": before + weight * (var - before) + spread}
    moved = {k: jnp.where(total > 0, v, old[k].astype(v.dtype)).astype(old[k].dtype) for k, v in new.items()}
    return with_collection(state, old | moved | {key: total.astype(old[key].dtype)})
