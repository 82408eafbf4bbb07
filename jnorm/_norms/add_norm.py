"""Layer and root-mean-square normalization of a sum, which comes out too: the residual stream of a transformer."""

from typing import Any

import jax

from .._pipeline.arguments import Across, broadcast_mask, check_affine, check_dtype, check_epsilon, check_residual, check_x
from .._pipeline.axes import Layout
from .._pipeline.rows import run_added_rows, wider
from ..typing import Axes, AxisIndexGroups, AxisName, Mask


def add_layer_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The sum of x and a residual, and its layer normalization: one op each way.

    .. math:: h = x + r, \qquad y = \frac{h - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma + \beta

    with mean and biased variance of h over `reduction_axes`.

    Args:
      x: floating, any shape.
      residual: r, floating, of x's shape; its dtype may be another than x's.
      scale: gamma, of the shape of the feature axes; 1 where None.
      bias: beta, of the shape of the feature axes; 0 where None.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which scale and bias vary.
      epsilon: added to the variance.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as the mean).
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      dtype: y's dtype; x's where None.

    Returns:
      y, and h in the wider dtype of x and the residual (float32 for bfloat16 and float16), both of x's shape. Where nothing is counted,
      y is the bias.

    Raises:
      ValueError: a residual that is not of x's shape; shapes, axes, names or groups that do not fit.
      TypeError: x or the residual is not floating.

    Numerics:
      h is rounded to its dtype, and what is normalized is what comes out: as `h = x + residual` and :func:`layer_norm` of h one after the
      other, with everything said there. Kept for the backward pass: h and four numbers per row.

    Distributed:
      As :func:`layer_norm`.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> y, h = jnorm.add_layer_norm(jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.array([0.0, 1.0, 2.0, 4.0]))
      >>> print(np.asarray(y).round(3), h)
      [-1.069 -0.535  0.     1.604] [1. 2. 3. 6.]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450, on a residual stream as in Xiong et al., "On Layer
      Normalization in the Transformer Architecture", 2020, https://arxiv.org/abs/2002.04745. Flax, PyTorch and Keras have no such
      function; epsilon is that of Flax's LayerNorm.
    """
    return _added_rows(
        x, residual, scale, bias, reduction_axes, feature_axes, epsilon, mask, axis_name, axis_index_groups, dtype, centered=True
    )


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None = None,
    *,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The sum of x and a residual, and its root-mean-square normalization: one op each way.

    .. math:: h = x + r, \qquad y = \frac{h}{\sqrt{\text{mean}(h^2) + \epsilon}}\,\gamma

    Args:
      x: floating, any shape.
      residual: r, floating, of x's shape; its dtype may be another than x's.
      scale: gamma, of the shape of the feature axes; 1 where None.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which scale varies.
      epsilon: added to the mean square.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as 0).
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      dtype: y's dtype; x's where None.

    Returns:
      y, and h in the wider dtype of x and the residual (float32 for bfloat16 and float16), both of x's shape. Where nothing is counted,
      y is 0.

    Raises:
      ValueError: a residual that is not of x's shape; shapes, axes, names or groups that do not fit.
      TypeError: x or the residual is not floating.

    Numerics:
      h is rounded to its dtype, and what is normalized is what comes out: as `h = x + residual` and :func:`rms_norm` of h one after the
      other, with everything said there. Kept for the backward pass: h and four numbers per row.

    Distributed:
      As :func:`rms_norm`.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> y, h = jnorm.add_rms_norm(jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]), epsilon=0.0)
      >>> print(np.asarray(y).round(3), h)
      [0.849 1.131] [3. 4.]

    References:
      Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467. Flax, PyTorch and Keras have no such
      function; epsilon is that of Flax's RMSNorm.
    """
    return _added_rows(
        x, residual, scale, None, reduction_axes, feature_axes, epsilon, mask, axis_name, axis_index_groups, dtype, centered=False
    )


def _added_rows(
    x: Any,
    residual: Any,
    scale: Any,
    bias: Any,
    reduction_axes: Axes,
    feature_axes: Axes,
    epsilon: float,
    mask: Mask | None,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
    dtype: Any,
    *,
    centered: bool,
) -> tuple[jax.Array, jax.Array]:
    x = check_x(x)
    residual = check_residual(check_x(residual, name="residual"), x)
    layout = Layout.of(x, reduction_axes, feature_axes)
    scale, bias = (check_affine(v, name, layout, wider(x, residual)) for v, name in ((scale, "scale"), (bias, "bias")))
    return run_added_rows(
        x,
        residual,
        None if scale is None else layout.feature_view(scale),
        None if bias is None else layout.feature_view(bias),
        layout.reduced,
        Across.of(axis_name, axis_index_groups),
        epsilon=check_epsilon(epsilon),
        centered=centered,
        mask=broadcast_mask(mask, x),
        dtype=check_dtype(dtype, x),
    )
