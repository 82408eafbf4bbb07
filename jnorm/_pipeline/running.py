"""Running statistics: exponential, debiased and cumulative averages. Updates carry no gradient."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._jax_internals import lying_as, varying_axes
from .._stats import Stats, all_sum, max_over
from ..typing import BatchNormState, Momentum
from . import marks, population
from .arguments import Across, check_statistics
from .values import check_scalar, not_a_state

State = TypeVar("State", bound=Mapping[str, Any])
ALONE = Across()


def check_state(
    state: Any,
    feature_shape: tuple[int, ...],
    is_complex: bool = False,
    *,
    keys: tuple[str, ...] = ("mean", "var"),
    made_by: str = "batch_norm_state",
) -> None:
    """The keys, shapes and kinds of a state of averages per feature. Of them the mean alone may be complex."""
    got = set(state) if isinstance(state, dict) else None
    collecting = () if got is None else tuple(key for key in population.KEYS if key in got)
    apart = {collected for key, collected in population.APART.items() if key in keys and collecting}
    if got is None or got - {"count", *collecting, *apart, *marks.KEYS} != set(keys) or len(collecting) > 1:
        raise not_a_state(state, f"{', '.join(map(repr, keys))} and optionally 'count'", made_by)
    for key in (*keys, *collecting, *marks.marks_of(state)):
        if jnp.shape(state[key]) != feature_shape:
            raise ValueError(f"state[{key!r}] must have the shape of x's feature axes {feature_shape}, got {jnp.shape(state[key])}.")
        if not jnp.issubdtype(jnp.result_type(state[key]), jnp.inexact):
            raise TypeError(f"state[{key!r}] must be floating, got {jnp.result_type(state[key])}.")
    if "count" in got and jnp.shape(state["count"]) != ():
        raise ValueError(f"state['count'] must be a scalar, got shape {jnp.shape(state['count'])}.")
    if any(jnp.iscomplexobj(state[key]) != (is_complex and key == "mean") for key in keys):
        dtypes = " and ".join(f"state[{key!r}] is {jnp.asarray(state[key]).dtype}" for key in keys)
        raise TypeError(
            f"x is {'complex' if is_complex else 'real'}, but {dtypes}; make the state with {made_by}(..., dtype=...) of x's kind "
            "(only the mean is complex where x is)."
        )


def check_momentum(momentum: Momentum, state: Any) -> None:
    if momentum is None:
        if "count" not in state and not population.collects(state):
            raise ValueError(
                "momentum=None is the cumulative average, which needs a count in the state: "
                "make it with track_count=True, of the function that makes the state or of the module."
            )
        return
    check_scalar(momentum, "momentum")
    if isinstance(momentum, int | float | np.number) and not 0 <= float(momentum) <= 1:
        raise ValueError(f"momentum is the fraction of the old value that is kept, from 0 to 1, got {momentum}.")


def corrected_var(stats: Stats, correction: int | float) -> jax.Array:
    """m2 / max(n - correction, 1): 0 is the biased variance, 1 Bessel's."""
    return stats.m2 / jnp.maximum(stats.count - correction, 1)


def update(state: State, batch: dict[str, jax.Array], counted: jax.Array, momentum: Momentum) -> State:
    """The state after one batch: features that counted nothing stay, and so does everything where none did.

    `batch` has the statistics of the batch, by the keys of the state.
    """
    batch, counted = lax.stop_gradient((batch, counted))
    old: dict[str, jax.Array] = {key: lax.stop_gradient(jnp.asarray(a)) for key, a in state.items()}
    dtype = jnp.finfo(next(iter(batch.values())).dtype).dtype
    keep = jnp.asarray(1.0 if momentum is None else momentum, dtype).clip(0, 1)
    count = keep * old["count"].astype(dtype) + 1 if "count" in old else None
    if count is not None:
        keep = 1 - 1 / count

    def moved(a: jax.Array, now: jax.Array) -> jax.Array:
        now, there = lying_as(now, a), lying_as(counted, a)
        a_kept, k = a.astype(now.dtype), keep.astype(now.dtype)
        return jnp.where(there, k * a_kept + (1 - k) * now, a_kept).astype(a.dtype)

    new = {key: moved(old[key], now) for key, now in batch.items()} | marks.marks_of(old)
    if count is not None:
        # Where devices have some of the features each, and types say so, the count is of all features.
        split = varying_axes(next(old[key] for key in batch)) - varying_axes(old["count"])
        moves = max_over(counted.any().astype(jnp.int32), split) > 0
        new["count"] = jnp.where(moves, count, old["count"].astype(count.dtype)).astype(old["count"].dtype)
    return cast(State, new)


def moved(state: State, stats: Stats, momentum: Momentum, correction: int | float = 0) -> State:
    """A state of mean and var after one batch, which it averages or collects."""
    if population.collects(state):
        return cast(State, population.collected(state, stats))
    return update(state, {"mean": stats.mean, "var": corrected_var(stats, correction)}, stats.count > 0, momentum)


def moved_by_members(
    state: State, stats: Stats, axes: tuple[int, ...], momentum: Momentum, correction: int | float = 0, across: Across = ALONE
) -> State:
    """The same after several members, samples or groups along `axes`, of all devices: with the means over those that counted anything."""
    collects = population.collects(state)
    if collects:
        correction = int(population.BATCHES in state)
    counted = (stats.count > 0).astype(stats.count.dtype)
    sums = [(counted * a).sum(axes) for a in (jnp.ones_like(counted), stats.mean, corrected_var(stats, correction))]
    number, mean, var = all_sum(sums, *across)
    mean, var = (total / jnp.maximum(number, 1) for total in (mean, var))
    if collects:
        return cast(State, population.averaged(state, mean, var, number))
    return update(state, {"mean": mean, "var": var}, number > 0, momentum)


def update_running(
    state: BatchNormState, statistics: Stats, *, momentum: Momentum = 0.99, running_var_correction: int | float = 0
) -> BatchNormState:
    r"""Running statistics after one batch whose statistics are known, such as those of all micro-batches of a step.

    .. math:: s \leftarrow \rho\,s + (1 - \rho)\,s_\text{batch}

    It is the update that :func:`batch_norm` makes.

    Args:
      state: from :func:`batch_norm_state`.
      statistics: of the shape of the state, as :func:`moments`, :func:`combine` and :func:`accumulated_moments` return them.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]). None: the cumulative
        average, which needs `state["count"]`. Where the state has a count, the average is debiased.
      running_var_correction: the variance that enters the state is the biased one times n / max(n - correction, 1); 1 is PyTorch's.

    Returns:
      The state: the same keys, shapes and dtypes. A feature that counted nothing stays as it is. No gradient flows through it.

    Raises:
      ValueError: a state of other keys or of another shape than the statistics; a static momentum that does not fit.
      TypeError: statistics that are none, or complex.

    Distributed:
      No collective: the statistics are merged already.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> parts = jnorm.moments(jnp.arange(6.0).reshape(3, 2, 1), 1)  # of three micro-batches
      >>> state = jnorm.update_running(jnorm.batch_norm_state(1), jnorm.combine(parts, 0), momentum=0.5)
      >>> state["mean"].tolist(), round(float(state["var"][0]), 4)
      ([1.25], 1.9583)
    """
    statistics = check_statistics(statistics)
    check_state(state, statistics.mean.shape)
    check_momentum(momentum, state)
    if marks.UPDATES in state:
        return state
    return moved(state, statistics, momentum, running_var_correction)
