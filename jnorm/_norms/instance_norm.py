"""Instance normalization."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._pipeline.arguments import Across, away_from_zero, broadcast_mask, check_affine, check_dtype, check_epsilon, check_save, check_x
from .._pipeline.axes import Layout, canonical_axes, others
from .._pipeline.groups import run_groups
from .._pipeline.normalize import affine, run
from .._stats import Stats, inverse_sqrt
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask, Save


def instance_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
    save: Save = "input",
) -> jax.Array:
    r"""Instance normalization: each channel of each sample over its positions.

    .. math:: y = \text{act}\left(\frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}}\,\gamma + \beta\right)

    Args:
      x: `(N, ..., C)`, or features on any axes; floating.
      scale: gamma, of the shape of the feature axes; 1 where None.
      bias: beta, of the shape of the feature axes; 0 where None.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      feature_axes: the axes along which scale and bias vary.
      epsilon: added to the variance.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as the mean).
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, and x told from it. What follows a norm mostly keeps y
        anyway, so that this halves what a deep network keeps. The size of scale is then at least 2⁻¹⁰, in y too. For y of x's dtype, and
        no activation, "leaky_relu" or a callable.
        See the guide on kernels for what it costs in accuracy.

    Returns:
      y of x's shape. Where nothing is counted, y is the activation of the bias.

    Raises:
      ValueError: no axis to reduce (x of two axes); shapes, axes, names or groups that do not fit; `save="output"` where x cannot be told
        from y.
      TypeError: x is not floating.

    Numerics:
      Statistics in at least float32, the mean as two floats. One position gives the bias.
      Kept for the backward pass: x, or with `save="output"` y, and three numbers per sample and channel.

    Distributed:
      With `axis_name` one all-gather forward (two all-reduces above 64 participants or 4 MiB), one all-reduce of two numbers per sample and
      channel backward; without, none.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # one sample, two positions, two channels
      >>> jnorm.instance_norm(x).round(3).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]

    References:
      Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
      https://arxiv.org/abs/1607.08022. Arguments and defaults are Flax's; PyTorch's epsilon is 1e-5.
    """
    x = check_x(x)
    layout = instance_layout(x, reduction_axes, feature_axes)
    across, mask = Across.of(axis_name, axis_index_groups), broadcast_mask(mask, x)
    if across.names:
        options = {"mask": mask, "activation": activation, "dtype": dtype, "save": save}
        return run_instances(x, scale, bias, layout, across, epsilon=epsilon, **options)[0]
    (scale, bias), dtype, output = _checked(x, scale, bias, layout, activation, dtype, save)
    options = {"mask": mask, "activation": activation, "dtype": dtype, "output": output}
    return run_groups(x, scale, bias, layout, None, epsilon=check_epsilon(epsilon), **options)


def instance_layout(x: jax.Array, reduction_axes: Axes | None, feature_axes: Axes) -> Layout:
    features = canonical_axes(feature_axes, x.ndim, "feature_axes")
    reduced = others(x.ndim, (0,), features) if reduction_axes is None else canonical_axes(reduction_axes, x.ndim, "reduction_axes")
    if not reduced:
        raise ValueError(
            f"x of shape {x.shape} has no axis to reduce: instance normalization keeps the first axis and those of the features, and x has "
            "no others. For x of shape (N, C) use layer normalization, or give reduction_axes."
        )
    if set(reduced) & set(features):
        raise ValueError(
            f"reduction_axes={reduction_axes!r} and feature_axes={feature_axes!r} share an axis; layer and group normalization reduce "
            "features."
        )
    return Layout(x.shape, reduced, features)


def run_instances(
    x: jax.Array, scale: Any, bias: Any, layout: Layout, across: Across, *, epsilon: float, mask: Any, activation: Any, dtype: Any,
    save: Save,
) -> tuple[jax.Array, Stats]:  # fmt: skip
    """y and the statistics of each sample."""
    aux, dtype, output = _checked(x, scale, bias, layout, activation, dtype, save)
    y, stats = run(
        x,
        functools.partial(_map, check_epsilon(epsilon)),
        aux,
        layout,
        across,
        mask=mask,
        activation=activation,
        dtype=dtype,
        output=output,
    )
    return y, jax.tree.map(layout.squeeze, stats)


def _checked(x: jax.Array, scale: Any, bias: Any, layout: Layout, activation: Any, dtype: Any, save: Save) -> tuple[tuple, Any, bool]:
    """Scale and bias, y's dtype, and whether y is kept in place of x."""
    dtype = check_dtype(dtype, x)
    output = check_save(save, x, dtype, activation)
    scale, bias = (check_affine(v, name, layout, x) for v, name in ((scale, "scale"), (bias, "bias")))
    return (away_from_zero(scale) if output else scale, bias), dtype, output


def _map(epsilon: float, stats: Stats, aux: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    mul = jnp.where(stats.count > 0, inverse_sqrt(stats.var + epsilon), 0)
    return stats.offset, *affine(mul, *aux)
