"""Standardization of input features by the statistics of the training data, which are streamed and merged."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._pipeline.arguments import Across, broadcast_mask, check_dtype, check_state_dtype, check_x
from .._pipeline.axes import Layout, canonical_axes, others
from .._pipeline.moments import keepdims_moments
from .._pipeline.population import VALUES, collected, merged
from .._pipeline.values import as_array, not_a_state
from .._stats import Stats, stats_dtype
from ..typing import Axes, AxisIndexGroups, AxisName, FeatureStatistics, Mask
from .batch_norm import batch_norm_state

KEYS = ("count", "mean", "var")


def feature_statistics_state(num_features: int | Sequence[int], *, dtype: Any = jnp.float32) -> FeatureStatistics:
    """Statistics of no data: count 0, mean 0 and variance 1, with which :func:`standardize_features` gives x as it is.

    Args:
      num_features: size of the feature axis, or sizes of several in ascending order of the axes.
      dtype: of all three, at least float32; float64 keeps counts above 2²⁴ exact, and means that are far above the spread.

    Returns:
      `{"count": zeros, "mean": zeros, "var": ones}` of shape `(num_features,)`.

    Example:
      >>> import jnorm
      >>> {k: v.tolist() for k, v in jnorm.feature_statistics_state(2).items()}
      {'count': [0.0, 0.0], 'mean': [0.0, 0.0], 'var': [1.0, 1.0]}
    """
    check_state_dtype(dtype)
    running = batch_norm_state(num_features, dtype=stats_dtype(dtype))
    return {"count": jnp.zeros_like(running["mean"]), "mean": running["mean"], "var": running["var"]}


def feature_statistics(
    x: jax.Array,
    state: FeatureStatistics,
    *,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> FeatureStatistics:
    r"""The statistics of all that was seen, with one batch more.

    .. math:: n = n_a + n_b, \quad \mu = \mu_a + \tfrac{n_b}{n}\delta, \quad
              n\sigma^2 = n_a\sigma_a^2 + n_b\sigma_b^2 + \tfrac{n_a n_b}{n}\delta^2, \quad \delta = \mu_b - \mu_a

    Args:
      x: `(..., C)`, or features on any axes; floating, or integers (such as images of uint8), which are read as float32. All axes may be
        features: one example.
      state: from :func:`feature_statistics_state`, or of the batches before.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      mask: broadcasts against x; nonzero counts. Each feature has its own count, so that missing values may be masked one by one (and may
        be NaN).
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge the batch over. Not needed under jit over sharded arrays.
      axis_index_groups: groups of equal size within that axis.

    Returns:
      The state: the same keys, shapes and dtypes, whatever the order and sizes of the batches. A feature that was never counted keeps
      what it had. No gradient flows through it; for statistics with one see :func:`moments`.

    Raises:
      ValueError: a state that does not fit x; axes, a mask, names or groups that do not fit.
      TypeError: x is complex.

    Numerics:
      Sums are around the mean and in at least float32. Each merge rounds the mean by up to half an eps (6e-8 in float32) of its size; of B
      merges some √B of these roundings add up, at most B of them, which matters where the mean is far above the spread: then take larger
      batches, or a float64 state.
      Counts in float32 are exact up to 2²⁴, some 17 million values of a feature; above, additions are rounded, and lost where the batch
      is smaller than that rounding.

    Distributed:
      One packed all-gather up to 64 participants, two all-reduces above.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> state = jnorm.feature_statistics_state(2)
      >>> for batch in (jnp.array([[1.0, 10.0], [3.0, 10.0]]), jnp.array([[2.0, 10.0], [6.0, 10.0]])):
      ...     state = jnorm.feature_statistics(batch, state)
      >>> {k: v.tolist() for k, v in state.items()}
      {'count': [4.0, 4.0], 'mean': [3.0, 10.0], 'var': [3.5, 0.0]}

    References:
      Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. As
      `partial_fit` of scikit-learn's StandardScaler, which skips NaN by itself; here it is masked: `mask=~jnp.isnan(x)`.
    """
    x = _read(x)
    mask, layout = broadcast_mask(mask, x), _layout(x, feature_axes)
    _check(state, layout)
    if not layout.reduced:  # one example alone is a batch of one
        x, mask = x[None], None if mask is None else mask[None]
        layout = Layout(x.shape, (0,), tuple(i + 1 for i in layout.features))
    stats = keepdims_moments(x, mask, layout.reduced, Across.of(axis_name, axis_index_groups))
    return _named(collected(_population(state), jax.tree.map(layout.squeeze, stats)))


def merge_feature_statistics(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """The statistics of two parts of the data together, such as those of two hosts.

    Args:
      a: from :func:`feature_statistics`.
      b: of the same features.

    Returns:
      The state of both parts, of a's dtypes: in whatever order parts are merged, the same to rounding.

    Raises:
      ValueError: states of different features.

    Numerics:
      As :func:`feature_statistics`.

    Distributed:
      No collective: both are on one device.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> empty = jnorm.feature_statistics_state(1)
      >>> a, b = (jnorm.feature_statistics(jnp.array(part).reshape(-1, 1), empty) for part in ([1.0, 3.0], [2.0, 6.0]))
      >>> {k: v.tolist() for k, v in jnorm.merge_feature_statistics(a, b).items()}
      {'count': [4.0], 'mean': [3.0], 'var': [3.5]}

    References:
      Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    for name, part in (("a", a), ("b", b)):
        _check_keys(part, name)
    if jnp.shape(a["mean"]) != jnp.shape(b["mean"]):
        raise ValueError(f"a and b must be of the same features, got shapes {jnp.shape(a['mean'])} and {jnp.shape(b['mean'])}.")
    return _named(merged(_population(a), _population(b)))


def standardize_features(
    x: jax.Array,
    state: FeatureStatistics,
    *,
    correction: int | float = 0,
    minimum_std: float | jax.Array = 0.0,
    feature_axes: Axes = -1,
    dtype: Any = None,
) -> jax.Array:
    r"""Standardizes features by statistics of the training data: each has mean 0 and standard deviation 1 there.

    .. math:: z = \frac{x - \mu}{\max(\sigma, \text{minimum})}

    Args:
      x: `(..., C)`, or features on any axes; floating, or integers, which are read as float32.
      state: from :func:`feature_statistics`, or published numbers in a dict of the same keys, with a count above 0.
      correction: σ² is the biased variance times n / max(n - correction, 1); 1 is the unbiased one.
      minimum_std: the least divisor of a feature that is not constant, a float or a traced scalar.
      feature_axes: the axes that have their own statistics.
      dtype: z's dtype; x's where None, float32 for integers.

    Returns:
      z of x's shape. A constant feature is divided by 1, so that its value becomes 0, and so is one of which nothing was counted, so that
      statistics of no data give x as it is. Constant is what has a standard deviation of at most eps (1.2e-7 in float32) times the size
      of its mean: no more than the rounding of x.

    Raises:
      ValueError: a state that does not fit x; `correction` or a static `minimum_std` below 0.
      TypeError: x is complex.

    Numerics:
      In at least float32. The mean is one number, whose rounding (half an eps of abs(mean) / σ: in float32 6e-4 where that is 1e4) is in z,
      with what many merges have added to it.
      Differentiable in x, and in the mean and variance of the state as they stand.

    Distributed:
      No collective.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0]])
      >>> state = jnorm.feature_statistics(x, jnorm.feature_statistics_state(2))
      >>> z = jnorm.standardize_features(x, state)
      >>> z.tolist(), jnorm.unstandardize_features(z, state).tolist()
      ([[-1.0, 0.0], [1.0, 0.0]], [[1.0, 10.0], [3.0, 10.0]])

    References:
      LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf. As scikit-learn's
      StandardScaler, whose correction is 0. Its test for a constant feature has the number of values in it.
    """
    x, mean, divisor, dtype = _prepared(_read(x), state, correction, minimum_std, feature_axes, dtype)
    return ((x - mean) / divisor).astype(dtype)


def unstandardize_features(
    z: jax.Array,
    state: FeatureStatistics,
    *,
    correction: int | float = 0,
    minimum_std: float | jax.Array = 0.0,
    feature_axes: Axes = -1,
    dtype: Any = None,
) -> jax.Array:
    r"""The inverse of :func:`standardize_features`: predictions of standardized targets in their own units.

    .. math:: x = z\,\max(\sigma, \text{minimum}) + \mu

    Args:
      z: `(..., C)`, or features on any axes; floating, or integers, which are read as float32.
      state: what z was standardized with.
      correction: as in :func:`standardize_features`.
      minimum_std: as in :func:`standardize_features`.
      feature_axes: the axes that have their own statistics.
      dtype: x's dtype; z's where None, float32 for integers.

    Returns:
      x of z's shape.

    Raises:
      ValueError, TypeError: as :func:`standardize_features`.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> state = {"count": jnp.array([4.0]), "mean": jnp.array([10.0]), "var": jnp.array([9.0])}
      >>> jnorm.unstandardize_features(jnp.array([[-1.0], [2.0]]), state).tolist()
      [[7.0], [16.0]]
    """
    z, mean, divisor, dtype = _prepared(_read(z, "z"), state, correction, minimum_std, feature_axes, dtype)
    return (z * divisor + mean).astype(dtype)


def _read(x: Any, name: str = "x") -> jax.Array:
    x = as_array(x, name)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {x.dtype}; standardize its real and imaginary parts as two features.")
    return check_x(x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32), name=name)


def _layout(x: jax.Array, feature_axes: Axes) -> Layout:
    features = canonical_axes(feature_axes, x.ndim, "feature_axes")
    return Layout(x.shape, others(x.ndim, features), features)


def _check_keys(state: Any, name: str = "state") -> None:
    if not isinstance(state, dict) or set(state) != set(KEYS):
        raise not_a_state(state, "'count', 'mean' and 'var'", "feature_statistics_state", name)
    for key in KEYS:
        if jnp.shape(state[key]) != jnp.shape(state["mean"]):
            raise ValueError(f"{name}[{key!r}] must have the mean's shape {jnp.shape(state['mean'])}, got {jnp.shape(state[key])}.")
        if not jnp.issubdtype(jnp.result_type(state[key]), jnp.floating):
            raise TypeError(f"{name}[{key!r}] must be floating, got {jnp.result_type(state[key])}.")


def _check(state: Any, layout: Layout) -> None:
    _check_keys(state)
    if jnp.shape(state["mean"]) != layout.feature_shape:
        raise ValueError(
            f"state must have the shape of x's feature axes {layout.feature_shape}, got {jnp.shape(state['mean'])}; "
            f"x has shape {layout.shape}."
        )


def _stats_of(state: FeatureStatistics) -> Stats:
    wide = stats_dtype(jnp.result_type(state["mean"]))
    count, mean, var = (jnp.asarray(state[key]).astype(wide) for key in KEYS)
    return Stats(count, mean, jnp.zeros_like(mean), var * count)


def _population(state: FeatureStatistics) -> dict[str, jax.Array]:
    return {"mean": jnp.asarray(state["mean"]), "var": jnp.asarray(state["var"]), VALUES: jnp.asarray(state["count"])}


def _named(population: dict[str, jax.Array]) -> FeatureStatistics:
    return {"count": population[VALUES], "mean": population["mean"], "var": population["var"]}


def _prepared(x: jax.Array, state: Any, correction: Any, minimum_std: Any, feature_axes: Axes, dtype: Any) -> tuple:
    """x, the mean and the divisor in the dtype that z is computed in, and the dtype of the result."""
    layout = _layout(x, feature_axes)
    _check(state, layout)
    for name, value in (("correction", correction), ("minimum_std", minimum_std)):
        if isinstance(value, int | float | np.number) and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    stats = _stats_of(state)
    wide = np.promote_types(stats_dtype(x.dtype), stats.mean.dtype)
    divisor = divisor_of(state, correction, minimum_std).astype(wide)
    return x.astype(wide), *(layout.feature_view(v) for v in (stats.mean.astype(wide), divisor)), check_dtype(dtype, x)


def divisor_of(state: FeatureStatistics, correction: Any, minimum_std: Any) -> jax.Array:
    """What features are divided by; 1 for a constant one, whose m2 may be what merging rounded."""
    stats = _stats_of(state)
    var = stats.m2 / jnp.maximum(stats.count - correction, 1)
    resolution = float(jnp.finfo(var.dtype).eps) * jnp.abs(stats.mean)
    varies = jnp.sqrt(lax.stop_gradient(var)) > lax.stop_gradient(resolution)
    std = jnp.sqrt(jnp.where(varies, var, 1))
    return jnp.where(varies, jnp.maximum(std, jnp.asarray(minimum_std, std.dtype)), 1)
