"""The weights of EvalNorm, fitted to training batches."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from .._pipeline.arguments import Across, check_state_dtype
from .._pipeline.moments import keepdims_moments
from .._pipeline.running import check_momentum, check_state
from .._pipeline.values import not_a_state
from .._stats import Stats, all_combine, all_sum, combine
from ..typing import Axes, AxisIndexGroups, AxisName, BatchNormState, EvalNormFit, Mask, Momentum
from .batch_norm import batch_norm_state
from .eval_norm import Samples

KEYS = tuple(EvalNormFit.__annotations__)


def eval_norm_fit_state(num_features: int | Sequence[int], *, dtype: Any = jnp.float32) -> EvalNormFit:
    """The sums of :func:`eval_norm_fit` before any batch: zeros.

    Args:
      num_features: size of the feature axis, or sizes of several in ascending order of the axes.
      dtype: of the sums.

    Returns:
      `{"mean_product", "mean_square", "var_product", "var_square"}`, each of shape `(num_features,)`.

    Raises:
      TypeError: dtype is not floating.

    Example:
      >>> import jnorm
      >>> {k: v.shape for k, v in jnorm.eval_norm_fit_state(64).items()}
      {'mean_product': (64,), 'mean_square': (64,), 'var_product': (64,), 'var_square': (64,)}
    """
    check_state_dtype(dtype)
    # An array of its own for each, which a step that donates its state needs.
    return cast(EvalNormFit, {key: batch_norm_state(num_features, dtype=dtype)["mean"] for key in KEYS})


def check_fit(fit: Any, feature_shape: tuple[int, ...] | None = None) -> None:
    if not isinstance(fit, dict) or set(fit) != set(KEYS):
        raise not_a_state(fit, ", ".join(map(repr, KEYS)), "eval_norm_fit_state", "fit")
    shape = jnp.shape(fit[KEYS[0]]) if feature_shape is None else feature_shape
    for key in KEYS:
        if jnp.shape(fit[key]) != shape:
            raise ValueError(f"fit[{key!r}] must have the shape of x's feature axes {shape}, got {jnp.shape(fit[key])}.")


def eval_norm_fit(
    x: jax.Array,
    state: BatchNormState,
    fit: EvalNormFit,
    *,
    momentum: Momentum = None,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> EvalNormFit:
    r"""Take one training batch into the fit of EvalNorm's weights: least squares, whose sums these are.

    .. math:: a &= \text{argmin} \sum \left((\mu_B - \mu_c) - a\,(\mu_{nc} - \mu_c)\right)^2 \\
              b &= \text{argmin} \sum \left((\sigma^2_B - \sigma^2_c) - b\,(\sigma^2_{nc} - \sigma^2_c)\right)^2

    over all samples n of all batches B, for each feature c, with the running statistics :math:`\mu_c` and :math:`\sigma^2_c`.

    Args:
      x: the input of the batch normalization, in batches of the size that it was trained with: `(N, ..., C)`, or features on any axes but
        the first.
      state: the running statistics, of before this batch. Where they have a count of 0, so that there are none yet, nothing is added.
      fit: from :func:`eval_norm_fit_state`, or of the batches before.
      momentum: the fraction of the sums so far that is kept, a float or a traced scalar (clipped to [0, 1]); None: all, for one pass with
        running statistics that are settled. While these still move, their own momentum forgets what was summed around earlier ones.
      reduction_axes: the axes of the positions, none of them a feature axis; None: all but the first and the feature axes.
      feature_axes: the axes along which the state varies.
      mask: broadcasts against x; nonzero counts. A sample that counts nothing of a feature does not enter.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` over which batch normalization merges its statistics: the batch is
        split over them, and each sample is whole.
      axis_index_groups: groups of equal size within that axis.

    Returns:
      The fit: the same keys, shapes and dtypes. It carries no gradient. Fits of separate data add up: `jax.tree.map(jnp.add, one, two)`.

    Raises:
      ValueError: shapes, axes, names, groups, keys or a static momentum that do not fit.
      TypeError: x is not floating.

    Numerics:
      Statistics in at least float32, the deviations of means told from a common center. The sums are of products of two variances, which
      are right up to variances of some 1e18.

    Distributed:
      One all-gather of the batch's statistics (two all-reduces above 64 participants), and one all-reduce of 4C numbers.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])  # two samples, two positions, one channel
      >>> state = {"mean": jnp.array([4.0]), "var": jnp.array([7.5])}
      >>> fit = jnorm.eval_norm_fit(x, state, jnorm.eval_norm_fit_state(1))
      >>> {k: float(v[0]) for k, v in fit.items() if k.startswith("mean")}  # 0.5·(-2) + 0.5·3, and 4 + 9
      {'mean_product': 0.5, 'mean_square': 13.0}

    References:
      Singh, Shrivastava, "EvalNorm: Estimating Batch Normalization Statistics for Evaluation", 2019, https://arxiv.org/abs/1904.06031,
      learns its weights, during training or afterwards. This is a closed form, by least squares on means and variances.
    """
    samples = Samples.of(x, reduction_axes, feature_axes, mask)
    layout, across = samples.layout, Across.of(axis_name, axis_index_groups)
    check_state(state, layout.feature_shape)
    check_fit(fit, layout.feature_shape)
    if momentum is not None:
        check_momentum(momentum, state)
    stats = keepdims_moments(samples.x, samples.mask, layout.reduced, Across())
    own = jax.tree.map(lambda a: layout.squeeze(a).reshape(-1, *layout.feature_shape), lax.stop_gradient(stats))
    terms = _terms(own, all_combine(combine(own, 0), *across), lax.stop_gradient(state))
    keep = jnp.asarray(1.0 if momentum is None else momentum, own.count.dtype).clip(0, 1)

    def added(old: Any, term: jax.Array) -> jax.Array:
        old = lax.stop_gradient(jnp.asarray(old))
        return (keep * old.astype(term.dtype) + term).astype(old.dtype)

    return cast(EvalNormFit, {key: added(fit[key], term) for key, term in zip(KEYS, all_sum(terms, *across), strict=True)})


def _terms(own: Stats, batch: Stats, state: BatchNormState) -> list[jax.Array]:
    """The sums over this device's samples, in the order of KEYS."""
    mean, var = (jnp.asarray(state[key]).astype(own.count.dtype) for key in ("mean", "var"))
    counted = own.count > 0
    if "count" in state:
        counted = counted & (jnp.asarray(state["count"]) > 0)
    terms = []
    for of_sample, of_batch in (
        ((own.center - mean[None]) + own.offset, (batch.center - mean) + batch.offset),
        (own.var - var[None], batch.var - var),
    ):
        deviation = jnp.where(counted, of_sample, 0)
        terms += [deviation.sum(0) * of_batch, (deviation**2).sum(0)]
    return terms


def eval_norm_weights(fit: EvalNormFit) -> tuple[jax.Array, jax.Array]:
    """The weights that fit best, for :func:`eval_norm`.

    Args:
      fit: from :func:`eval_norm_fit`.

    Returns:
      mean_weight and var_weight, of the shape of the features, in [0, 1]; 0 where no sample entered.

    Raises:
      ValueError: keys or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])
      >>> state = {"mean": jnp.array([4.5]), "var": jnp.array([8.75])}  # as of this batch: the best are 0
      >>> mean_weight, var_weight = jnorm.eval_norm_weights(jnorm.eval_norm_fit(x, state, jnorm.eval_norm_fit_state(1)))
      >>> mean_weight.tolist(), var_weight.tolist()
      ([0.0], [0.0])
    """
    check_fit(fit)

    def best(product: Any, square: Any) -> jax.Array:
        square = jnp.asarray(square)
        return jnp.where(square > 0, jnp.asarray(product) / jnp.where(square > 0, square, 1), 0).clip(0, 1)

    return best(fit["mean_product"], fit["mean_square"]), best(fit["var_product"], fit["var_square"])
