"""Layer normalization and its root-mean-square form."""

from typing import Any

import jax

from .._pipeline.arguments import Across, away_from_zero, broadcast_mask, check_affine, check_dtype, check_epsilon, check_save, check_x
from .._pipeline.axes import Layout
from .._pipeline.rows import run_rows
from ..typing import Axes, AxisIndexGroups, AxisName, Mask, Save


def layer_norm(
    x: jax.Array,
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
    save: Save = "input",
) -> jax.Array:
    r"""Layer normalization: each sample, or position, over its features.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma + \beta

    with mean and biased variance over `reduction_axes`.

    Args:
      x: floating, any shape.
      scale: gamma, of the shape of the feature axes; 1 where None.
      bias: beta, of the shape of the feature axes; 0 where None.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which scale and bias vary.
      epsilon: added to the variance.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as the mean).
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, and x told from it. What follows a norm mostly keeps y
        anyway, so that this halves what a deep network keeps. The size of scale is then at least 2⁻¹⁰, in y too. For y of x's dtype,
        without `axis_name`.
        See the guide on kernels for what it costs in accuracy.

    Returns:
      y of x's shape. Where nothing is counted, y is the bias.

    Raises:
      ValueError: shapes, axes, names or groups that do not fit; `save="output"` where x cannot be told from y.
      TypeError: x is not floating.

    Numerics:
      Statistics in at least float32, the mean as two floats: a row of 1e4 + i·1e-3 comes out right. Without `axis_name` also rows up to
      the largest finite x; with it, as long as the sum of squared deviations is in range. Kept for the backward pass: x, or with
      `save="output"` y, and four numbers per row.

    Distributed:
      With `axis_name` one all-gather forward (two all-reduces above 64 participants or 4 MiB), one all-reduce backward; without, none.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> print(np.asarray(jnorm.layer_norm(jnp.array([1.0, 2.0, 3.0, 6.0]))).round(3))
      [-1.069 -0.535  0.     1.604]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450. Arguments and defaults are Flax's; PyTorch's epsilon
      is 1e-5 and Keras's 1e-3.
    """
    return _rows(x, scale, bias, reduction_axes, feature_axes, epsilon, mask, axis_name, axis_index_groups, dtype, save, centered=True)


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    *,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: Any = None,
    save: Save = "input",
) -> jax.Array:
    r"""Root-mean-square normalization: layer normalization without the mean and the bias.

    .. math:: y = \frac{x}{\sqrt{\text{mean}(x^2) + \epsilon}}\,\gamma

    Args:
      x: floating, any shape.
      scale: gamma, of the shape of the feature axes; 1 where None.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which scale varies.
      epsilon: added to the mean square.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as 0).
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, and x told from it. What follows a norm mostly keeps y
        anyway, so that this halves what a deep network keeps. The size of scale is then at least 2⁻¹⁰, in y too. For y of x's dtype,
        without `axis_name`.
        See the guide on kernels for what it costs in accuracy.

    Returns:
      y of x's shape. Where nothing is counted, y is 0.

    Raises:
      ValueError: shapes, axes, names or groups that do not fit; `save="output"` where x cannot be told from y.
      TypeError: x is not floating.

    Numerics:
      The mean square in at least float32. Without `axis_name` right for rows up to the largest finite x; with it, as long
      as the sum of squares is in range.
      Kept for the backward pass: x, or with `save="output"` y, and four numbers per row.

    Distributed:
      With `axis_name` one all-gather forward (two all-reduces above 64 participants or 4 MiB), one all-reduce backward; without, none.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> print(np.asarray(jnorm.rms_norm(jnp.array([3.0, 4.0]), epsilon=0.0)).round(3))
      [0.849 1.131]

    References:
      Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467. Arguments and defaults are Flax's;
      PyTorch's epsilon is that of x's dtype.
    """
    return _rows(x, scale, None, reduction_axes, feature_axes, epsilon, mask, axis_name, axis_index_groups, dtype, save, centered=False)


def _rows(
    x: Any,
    scale: Any,
    bias: Any,
    reduction_axes: Axes,
    feature_axes: Axes,
    epsilon: float,
    mask: Mask | None,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
    dtype: Any,
    save: Save,
    *,
    centered: bool,
) -> jax.Array:
    x = check_x(x)
    layout = Layout.of(x, reduction_axes, feature_axes)
    scale, bias = (check_affine(v, name, layout, x) for v, name in ((scale, "scale"), (bias, "bias")))
    dtype = check_dtype(dtype, x)
    output = check_save(save, x, dtype, None)
    scale = away_from_zero(scale) if output else scale
    return run_rows(
        x,
        None if scale is None else layout.feature_view(scale),
        None if bias is None else layout.feature_view(bias),
        layout.reduced,
        Across.of(axis_name, axis_index_groups),
        epsilon=check_epsilon(epsilon),
        centered=centered,
        mask=broadcast_mask(mask, x),
        dtype=dtype,
        output=output,
    )
