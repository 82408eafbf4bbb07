"""Normalization of inference that gives each sample's own statistics the share that they had in training."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._jax_internals import lying_along
from .._pipeline.arguments import Across, broadcast_mask, check_affine, check_dtype, check_epsilon, check_x
from .._pipeline.axes import Layout, canonical_axes, others
from .._pipeline.normalize import affine, run
from .._pipeline.running import check_state
from .._stats import Stats, inverse_sqrt, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Weight
from .instance_norm import instance_layout


class Samples(NamedTuple):
    """x as samples with positions: where it has none, with an axis of one."""

    x: jax.Array
    layout: Layout
    mask: jax.Array | None
    inserted: int | None

    @classmethod
    def of(cls, x: Any, reduction_axes: Axes | None, feature_axes: Axes, mask: Mask | None) -> "Samples":
        x = check_x(x)
        features, mask = canonical_axes(feature_axes, x.ndim, "feature_axes"), broadcast_mask(mask, x)
        if reduction_axes is not None or others(x.ndim, (0,), features):
            return cls(x, instance_layout(x, reduction_axes, feature_axes), mask, None)
        at = 0 if 0 in features else 1
        x = jnp.expand_dims(x, at)
        layout = Layout(x.shape, (at,), tuple(i + (i >= at) for i in features))
        return cls(x, layout, None if mask is None else jnp.expand_dims(mask, at), at)

    def placed(self, value: jax.Array) -> jax.Array:
        """From the shape of the features to one that broadcasts against statistics."""
        lead = self.layout.ndim - len(self.layout.reduced) - len(self.layout.features)
        value = lying_along(jnp.broadcast_to(value, self.layout.feature_shape), self.x, self.layout.features)
        return value.reshape((1,) * lead + self.layout.feature_shape)


class _Aux(NamedTuple):
    mean: jax.Array
    var: jax.Array
    mean_weight: jax.Array
    var_weight: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None


def _map(epsilon: float, stats: Stats, aux: _Aux) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both means are told by their distance from the center. A sample that counts nothing has no share."""
    alpha, beta = (jnp.where(stats.count > 0, w, 0) for w in (aux.mean_weight, aux.var_weight))
    shift = alpha * stats.offset + (1 - alpha) * (aux.mean - stats.center)
    mul = inverse_sqrt(beta * stats.var + (1 - beta) * aux.var + epsilon)
    return shift, *affine(mul, aux.scale, aux.bias)


def check_share(weight: Any, name: str) -> None:
    if not isinstance(weight, jax.Array) and not np.all((np.asarray(weight) >= 0) & (np.asarray(weight) <= 1)):
        raise ValueError(
            f"{name} is the share of a sample's own statistics, from 0 to 1, got {weight}; after training on batches of n, 1/n."
        )


def _check_weight(weight: Any, name: str, samples: Samples) -> jax.Array:
    value = jnp.asarray(weight)
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real, got {value.dtype}.")
    if value.shape not in ((), samples.layout.feature_shape):
        raise ValueError(f"{name} must be a scalar or of the shape of x's feature axes {samples.layout.feature_shape}, got {value.shape}.")
    check_share(weight, name)
    return samples.placed(_clipped(value.astype(stats_dtype(samples.x.dtype))))


def _clipped(weight: jax.Array) -> jax.Array:
    """To [0, 1], with the whole derivative at the ends too, where a weight that is learned may start."""
    return jnp.where(weight < 0, 0, jnp.where(weight > 1, 1, weight))


def eval_norm(
    x: jax.Array,
    state: BatchNormState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean_weight: Weight,
    var_weight: Weight | None = None,
    epsilon: float = 1e-5,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
) -> jax.Array:
    r"""EvalNorm: evaluation of what batch normalization trained on small batches, with a share of each sample's own statistics.

    .. math:: y_{nc} &= \text{act}\left(\frac{x_{nc} - \hat\mu_{nc}}{\sqrt{\hat\sigma^2_{nc} + \epsilon}}\,\gamma_c + \beta_c\right) \\
              \hat\mu_{nc} &= a\,\mu_{nc} + (1 - a)\,\mu_c \\
              \hat\sigma^2_{nc} &= b\,\sigma^2_{nc} + (1 - b)\,\sigma^2_c

    with the mean and biased variance of channel c over the positions of sample n, and the running ones. In a training batch of N samples,
    each has a share of 1/N in the statistics that normalize it, which running statistics do not show.

    Args:
      x: `(N, ..., C)`, or features on any axes; floating. Without positions, as in `(N, C)`, a sample's own variance is 0.
      state: of the batch normalization that was trained, as from :func:`batch_norm_state`. It is not updated.
      scale: gamma, of the shape of the feature axes; 1 where None.
      bias: beta, of the shape of the feature axes; 0 where None.
      mean_weight: a, the share of the sample's mean: a number or of the shape of the feature axes; traced ones are clipped to [0, 1]. The
        rule of thumb is 1/N for training batches of N (per device, where statistics were). Or from :func:`eval_norm_weights`.
      var_weight: b, the share of the sample's variance, likewise; None: as mean_weight.
      epsilon: added to the variance.
      reduction_axes: the axes of the positions, none of them a feature axis; None: all but the first and the feature axes.
      feature_axes: the axes along which scale, bias and state vary.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as the mean).
      axis_name: named axis or axes over which the positions are split. Not the axis that the batch is split over, which needs none.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      dtype: y's dtype; x's where None.

    Returns:
      y of x's shape. With weights of 0 it is the evaluation of :func:`batch_norm`, with weights of 1 :func:`instance_norm`. A sample that
      counts nothing is normalized with the running statistics.

    Raises:
      ValueError: a static weight outside [0, 1]; shapes, axes, names or groups that do not fit.
      TypeError: x is not floating; a weight is not real.

    Numerics:
      Statistics in at least float32, the mean as two floats.
      There is no term of the squared distance between the two means, as the variance of a union of two sets would have: the variance of
      all values, which :math:`\sigma^2_c` stands for, has the spread of samples' means in it already. With that variance,
      :math:`\hat\sigma^2` with b = 1/N is on average the one of training batches. A running average of their biased variances is smaller;
      with it, :math:`\hat\sigma^2` falls short by (N - 1)/N² of the variance of samples' means.
      Kept for the backward pass: x, and four numbers per sample and channel.

    Distributed:
      With `axis_name` one all-gather forward (two all-reduces above 64 participants or 4 MiB), one all-reduce of two numbers per sample and
      channel backward; without, none.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])  # two samples, two positions, one channel
      >>> state = {"mean": jnp.array([4.0]), "var": jnp.array([7.5])}
      >>> y = jnorm.eval_norm(x, state, mean_weight=0.5, epsilon=0.0)  # means 3 and 5.5, variances 4.25 and 5.75
      >>> print(np.asarray(y).ravel().round(3))
      [-0.97   0.    -0.209  1.46 ]

    References:
      Singh, Shrivastava, "EvalNorm: Estimating Batch Normalization Statistics for Evaluation", 2019, https://arxiv.org/abs/1904.06031.
      The formulas are in this library's own derivation.
    """
    samples = Samples.of(x, reduction_axes, feature_axes, mask)
    x, layout = samples.x, samples.layout
    check_state(state, layout.feature_shape)
    alpha = _check_weight(mean_weight, "mean_weight", samples)
    beta = alpha if var_weight is None else _check_weight(var_weight, "var_weight", samples)
    mean, var = (samples.placed(jnp.asarray(state[key]).astype(stats_dtype(x.dtype))) for key in ("mean", "var"))
    y, _ = run(
        x,
        functools.partial(_map, check_epsilon(epsilon)),
        _Aux(mean, var, alpha, beta, *(check_affine(v, name, layout, x) for v, name in ((scale, "scale"), (bias, "bias")))),
        layout,
        Across.of(axis_name, axis_index_groups),
        mask=samples.mask,
        activation=None if callable(activation) else activation,
        dtype=check_dtype(dtype, x),
    )
    y = y if samples.inserted is None else y.squeeze(samples.inserted)
    return activation(y) if callable(activation) else y
