"""Running statistics between those of training and those of the data that a model is run on."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from .._stats import stats_dtype
from ._layers import RUNNING_NNX, Layers, chosen, nnx_norms, states_of, with_states
from ._nnx_states import read_states, write_states
from .population import AVERAGES

Tree = TypeVar("Tree")


def blend_statistics(
    source: Tree,
    target: Tree,
    *,
    source_count: float | jax.Array,
    count: float | jax.Array,
    adapt: Literal["both", "mean", "var"] = "both",
    layers: Layers | None = None,
) -> Tree:
    r"""The statistics of training blended with those of a few samples of another domain, for test-time adaptation.

    .. math:: \bar\mu = \lambda\,\mu_\text{source} + (1 - \lambda)\,\mu_\text{target}, \qquad
              \bar\sigma^2 = \lambda\,\sigma^2_\text{source} + (1 - \lambda)\,\sigma^2_\text{target}, \qquad
              \lambda = \frac{N}{N + n}

    The same linear rule for both: what lies between the means is no part of the variance.

    Args:
      source: any tree with states of running statistics in it, such as the collection "batch_stats" of Linen, or an NNX model: after
        training.
      target: the same after :func:`recalibrate` on the samples, with `estimator="mean"` for the paper's unbiased variance.
      source_count: N ≥ 0, how many samples the source is worth, a number or a traced scalar: 0 is the target alone, infinity the source.
      count: n ≥ 1, finite, how many samples the target was taken from.
      adapt: "both", or what alone is blended, "mean" or "var"; the other stays the source's.
      layers: the norms to blend, by path ("encoder/block_0/norm"): a pattern, several, or a function from path to bool; None: all. The
        rest keep the source's statistics.

    Returns:
      The source with the blended statistics, in its dtypes; for an NNX model a copy of it. Both arguments stay as they were.

    Raises:
      ValueError: no running statistics; `layers` that match none; trees whose states differ in their paths, entries or shapes; a number
        out of range.

    Numerics:
      In at least float32. Standard deviations (of batch renormalization) are blended by their squares.

    Example:
      >>> import jax.numpy as jnp, jnorm.tools
      >>> source = {"mean": jnp.array([0.0]), "var": jnp.array([1.0])}
      >>> target = {"mean": jnp.array([4.0]), "var": jnp.array([3.0])}
      >>> new = jnorm.tools.blend_statistics(source, target, source_count=16, count=48)
      >>> new["mean"].tolist(), new["var"].tolist()
      ([3.0], [2.5])

    References:
      Schneider, Rusak, Eck, Bringmann, Brendel, Bethge, "Improving robustness against common corruptions by covariate shift adaptation",
      2020, https://arxiv.org/abs/2006.16971.
    """
    if adapt not in ("both", "mean", "var"):
        raise ValueError(f'adapt must be "both", "mean" or "var", got {adapt!r}.')
    _check_count("source_count", source_count, 0)
    _check_count("count", count, 1)
    if not isinstance(count, Tracer) and float(count) > float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"count must be finite in float32, got {count!r}.")
    # With N of 0 or infinity too.
    share = 1 / (1 + jnp.asarray(count, jnp.float32) / jnp.asarray(source_count, jnp.float32))
    if not isinstance(source, nnx.Module):
        return with_states(source, _blended(states_of(source), states_of(target), share, adapt, layers))
    if not isinstance(target, nnx.Module):
        raise ValueError(f"source is an NNX model, and so must be target, got {type(target).__name__}.")
    new = nnx.clone(source)
    norms = nnx_norms(new, RUNNING_NNX)
    write_states(norms, _blended(read_states(norms), read_states(nnx_norms(target, RUNNING_NNX)), share, adapt, layers))
    return new


def _check_count(name: str, number: Any, least: int) -> None:
    known = isinstance(number, int | float) or hasattr(number, "dtype")
    if not known or jnp.shape(number) or not (isinstance(number, Tracer) or float(number) >= least):
        raise ValueError(f"{name} is a number of samples, at least {least}, got {number!r}.")


def _blended(source: Mapping[str, Any], target: Mapping[str, Any], share: jax.Array, adapt: str, layers: Layers | None) -> dict[str, Any]:
    """By path, those that were chosen."""
    _check_same(source, target)
    keys = AVERAGES if adapt == "both" else ("mean",) if adapt == "mean" else ("var", "std")
    return {path: {**source[path], **_one(source[path], target[path], share, keys)} for path in chosen(source, layers, "states")}


def _one(source: Any, target: Any, share: jax.Array, keys: tuple[str, ...]) -> dict[str, jax.Array]:
    new = {}
    for key in keys:
        if key in source:
            old, now = (jnp.asarray(state[key]) for state in (source, target))
            dtype = stats_dtype(old.dtype)
            a, b, w = old.astype(dtype), now.astype(dtype), share.astype(jnp.finfo(dtype).dtype).astype(dtype)
            blend = jnp.sqrt(w * a**2 + (1 - w) * b**2) if key == "std" else w * a + (1 - w) * b
            new[key] = blend.astype(old.dtype)
    return new


def _check_same(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    alone = [sorted(set(one) - set(two))[:5] for one, two in ((source, target), (target, source))]
    if any(alone):
        raise ValueError(f"source and target must have the same states; source alone has {alone[0]}, target alone {alone[1]}.")
    for path, state in source.items():
        got, wanted = ({key: jnp.shape(s[key]) for key in AVERAGES if key in s} for s in (target[path], state))
        if got != wanted:
            raise ValueError(f"the state {path!r} has averages of {wanted} in source and {got} in target; they must be alike.")
