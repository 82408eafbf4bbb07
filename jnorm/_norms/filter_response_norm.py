"""Filter response normalization and its thresholded linear unit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._pipeline.arguments import Across, broadcast_mask, check_affine, check_dtype, check_epsilon, check_x
from .._pipeline.axes import Layout, canonical_axes, others
from .._pipeline.normalize import affine, run
from .._stats import Stats, inverse_sqrt
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask

# What the modules start a learned epsilon with.
LEARNED_EPSILON_INIT = jax.nn.initializers.constant(1e-4)


def filter_response_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    learned_epsilon: jax.Array | None = None,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
) -> jax.Array:
    r"""Filter response normalization: each channel of each sample over the root mean square of its positions.

    .. math:: y = \text{act}\left(\frac{x}{\sqrt{\nu_{nc}^2 + \epsilon + |\epsilon_l|}}\,\gamma + \beta\right), \qquad
              \nu_{nc}^2 = \frac{1}{|S|}\sum_{s} x_{nsc}^2

    Its activation is :func:`thresholded_linear_unit`, which has a parameter of its own.

    Args:
      x: `(N, ..., C)`, or features on any axes; floating. Where there are no positions, `(N, C)`, each element is divided by its own size.
      scale: gamma, of the shape of the feature axes; 1 where None.
      bias: beta, of the shape of the feature axes; 0 where None.
      learned_epsilon: a scalar, or of the shape of the feature axes; its size is added to `epsilon`. None: nothing. The derivative of the
        size is taken to be 1 at 0, so that one that starts at 0 can leave it.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      feature_axes: the axes along which scale and bias vary.
      epsilon: added to the mean square. With 0, a channel that is 0 at every position gives NaN.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as the mean).
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      dtype: y's dtype; x's where None.

    Returns:
      y of x's shape. Where nothing is counted, y is the activation of the bias.

    Raises:
      ValueError: shapes, axes, names or groups that do not fit.
      TypeError: x is not floating, or learned_epsilon not real.

    Numerics:
      The mean square is var + mean², in at least float32, and right as long as the sum of squared deviations is in range and the mean is
      below 1e19 (some 1e19 / √count for x; gradients some 1e16). Beyond, y is finite, and no longer right.
      One position: y = x / √(x² + ε), whose derivative ε / (x² + ε)^(3/2) is a difference of two numbers of size 1 / √(x² + ε), and right
      to their rounding. With the default epsilon little of x is left there but its sign; `learned_epsilon` is for that.
      Kept for the backward pass: x, and three numbers per sample and channel.

    Distributed:
      With `axis_name` one all-gather forward (two all-reduces above 64 participants or 4 MiB), one all-reduce of two numbers per sample and
      channel backward; without, none. The gradient of learned_epsilon is summed as those of scale and bias are.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # one sample, two positions, two channels
      >>> print(np.asarray(jnorm.filter_response_norm(x)).round(3).ravel())
      [0.447 0.447 1.342 1.342]

    References:
      Singh, Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks", 2019,
      https://arxiv.org/abs/1911.09737. TensorFlow Addons adds epsilon and the size of one learned number, as here. timm's epsilon is 1e-5,
      and is not learned; elsewhere a learned epsilon stands in place of the constant.
    """
    x = check_x(x)
    layout, mask = _layout(x, reduction_axes, feature_axes), broadcast_mask(mask, x)
    if learned_epsilon is not None and jnp.ndim(learned_epsilon) == 0:
        learned_epsilon = jnp.broadcast_to(jnp.asarray(learned_epsilon), layout.feature_shape)
    given = {"scale": scale, "bias": bias, "learned_epsilon": learned_epsilon}
    aux = tuple(check_affine(v, name, layout, x) for name, v in given.items())
    across, dtype = Across.of(axis_name, axis_index_groups), check_dtype(dtype, x)
    normalized = functools.partial(run, map=functools.partial(_map, check_epsilon(epsilon)), aux=aux, across=across, dtype=dtype)
    if layout.reduced:
        return normalized(x, layout=layout, mask=mask, activation=activation)[0]
    # One position, which is an axis of its own to the unit, but not to a callable.
    one = Layout((*x.shape[:1], 1, *x.shape[1:]), (1,), tuple(i + (i > 0) for i in layout.features))
    mask, named = None if mask is None else jnp.expand_dims(mask, 1), None if callable(activation) else activation
    y = normalized(jnp.expand_dims(x, 1), layout=one, mask=mask, activation=named)[0].reshape(x.shape)
    return activation(y) if callable(activation) else y


def _layout(x: jax.Array, reduction_axes: Axes | None, feature_axes: Axes) -> Layout:
    features = canonical_axes(feature_axes, x.ndim, "feature_axes")
    if reduction_axes is None:
        return Layout(x.shape, others(x.ndim, (0,), features), features)
    reduced = canonical_axes(reduction_axes, x.ndim, "reduction_axes")
    if set(reduced) & set(features):
        raise ValueError(
            f"reduction_axes={reduction_axes!r} and feature_axes={feature_axes!r} share an axis; rms_norm reduces features as well."
        )
    return Layout(x.shape, reduced, features)


def _map(epsilon: float, stats: Stats, aux: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    scale, bias, learned = aux
    square = stats.var + stats.mean**2 + epsilon
    if learned is not None:
        # Not abs, whose derivative at 0 is JAX's choice.
        size = jnp.where(learned < 0, -learned, learned)
        square = square + size.reshape((1,) * (square.ndim - size.ndim) + size.shape)
    mul = jnp.where(stats.count > 0, inverse_sqrt(square), 0)
    return -stats.center, *affine(mul, scale, bias)


def thresholded_linear_unit(x: jax.Array, threshold: jax.Array, *, feature_axes: Axes = -1) -> jax.Array:
    r"""Thresholded linear unit: the maximum of x and a threshold of each channel, which is learned.

    .. math:: y = \max(x, \tau)

    Args:
      x: `(N, ..., C)`, or features on any axes; floating.
      threshold: tau, of the shape of the feature axes, of any real dtype.
      feature_axes: the axes along which the threshold varies.

    Returns:
      y of x's shape and dtype. Where x or the threshold is not a number, neither is y.

    Raises:
      ValueError: a threshold that has not the shape of the feature axes; axes out of range.
      TypeError: x is not floating, or the threshold not real.

    Numerics:
      The threshold is rounded to x's dtype; its gradient, the sum of dy where x < τ, is taken in at least float32. At a tie the gradient is
      x's, none of it the threshold's; `jnp.maximum` gives half to each.
      Kept for the backward pass: one bit of information per element of x, as a bool.

    Distributed:
      No collective: elementwise.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> jnorm.thresholded_linear_unit(jnp.array([[-1.0, 0.5], [2.0, -3.0]]), jnp.array([-0.5, 0.0])).tolist()
      [[-0.5, 0.5], [2.0, 0.0]]

    References:
      Singh, Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks", 2019,
      https://arxiv.org/abs/1911.09737. In timm it is part of the norm, and PyTorch halves the gradient at a tie; in TensorFlow Addons the
      threshold varies along all axes but the first.
    """
    x = check_x(x)
    features = canonical_axes(feature_axes, x.ndim, "feature_axes")
    layout = Layout(x.shape, others(x.ndim, features), features)
    tau = check_affine(threshold, "threshold", layout, x)
    if tau is None:
        raise TypeError("threshold must be an array of the shape of x's feature axes, got None; zeros make the unit a ReLU.")
    # Broadcast before it is cast, so that its gradient is cast before it is summed.
    tau = jnp.broadcast_to(layout.feature_view(tau), x.shape).astype(x.dtype)
    return jnp.where((x >= tau) | jnp.isnan(x), x, tau)
