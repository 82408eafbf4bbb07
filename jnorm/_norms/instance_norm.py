"""Instance normalization."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._pipeline.arguments import Across, broadcast_mask, check_affine, check_dtype, check_epsilon, check_x
from .._pipeline.axes import Layout, canonical_axes, others
from .._pipeline.groups import run_groups
from .._pipeline.normalize import affine, run
from .._stats import Stats, inverse_sqrt
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask


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

    Returns:
      y of x's shape. Where nothing is counted, y is the activation of the bias.

    Raises:
      ValueError: no axis to reduce (x of two axes); shapes, axes, names or groups that do not fit.
      TypeError: x is not floating.

    Numerics:
      Statistics in at least float32, the mean as two floats. One position gives the bias.
      Kept for the backward pass: x and three numbers per sample and channel.

    Distributed:
      With `axis_name` one all-gather forward (two all-reduces above 64 participants), one all-reduce of two numbers per sample and channel
      backward; without, none.

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
        return run_instances(x, scale, bias, layout, across, epsilon=epsilon, mask=mask, activation=activation, dtype=dtype)[0]
    scale, bias = (check_affine(v, name, layout, x) for v, name in ((scale, "scale"), (bias, "bias")))
    options = {"mask": mask, "activation": activation, "dtype": check_dtype(dtype, x)}
    return run_groups(x, scale, bias, layout, None, epsilon=check_epsilon(epsilon), **options)


def instance_layout(x: jax.Array, reduction_axes: Axes | None, feature_axes: Axes) -> Layout:
    features = canonical_axes(feature_axes, x.ndim, "feature_axes")
    reduced = others(x.ndim, (0,), features) if reduction_axes is None else canonical_axes(reduction_axes, x.ndim, "reduction_axes")
    if not reduced:
        raise ValueError(
            f"x of shape {x.shape} has no axis to reduce: instance_norm keeps the first axis and feature_axes={feature_axes!r}. "
            "For x of shape (N, C) use layer_norm, or give reduction_axes."
        )
    if set(reduced) & set(features):
        raise ValueError(
            f"reduction_axes={reduction_axes!r} and feature_axes={feature_axes!r} share an axis; layer_norm and group_norm reduce features."
        )
    return Layout(x.shape, reduced, features)


def run_instances(
    x: jax.Array, scale: Any, bias: Any, layout: Layout, across: Across, *, epsilon: float, mask: Any, activation: Any, dtype: Any
) -> tuple[jax.Array, Stats]:
    """y and the statistics of each sample."""
    aux = tuple(check_affine(v, name, layout, x) for v, name in ((scale, "scale"), (bias, "bias")))
    y, stats = run(
        x,
        functools.partial(_map, check_epsilon(epsilon)),
        aux,
        layout,
        across,
        mask=mask,
        activation=activation,
        dtype=check_dtype(dtype, x),
    )
    return y, jax.tree.map(layout.squeeze, stats)


def _map(epsilon: float, stats: Stats, aux: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    mul = jnp.where(stats.count > 0, inverse_sqrt(stats.var + epsilon), 0)
    return stats.offset, *affine(mul, *aux)
