"""Group normalization."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._pipeline.arguments import (
    Across,
    away_from_zero,
    broadcast_mask,
    check_activation,
    check_affine,
    check_dtype,
    check_epsilon,
    check_save,
    check_x,
)
from .._pipeline.axes import Layout, canonical_axes
from .._pipeline.groups import run_groups
from .._pipeline.normalize import affine, run
from .._pipeline.rows import run_rows
from .._stats import Stats, combine, inverse_sqrt
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask, Save


def group_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    reduction_axes: Axes | None = None,
    feature_axes: int = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
    save: Save = "input",
) -> jax.Array:
    r"""Group normalization: each sample over its positions and the channels of a group.

    .. math:: y = \text{act}\left(\frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}}\,\gamma + \beta\right)

    Args:
      x: `(N, ..., C)`, or the channels on any axis; floating.
      scale: gamma, `(C,)`; 1 where None.
      bias: beta, `(C,)`; 0 where None.
      num_groups: number of groups of contiguous channels. Give this or `group_size`.
      group_size: channels in a group.
      reduction_axes: the axes that are reduced, the channel axis (reduced within groups) among them; None: all but the first.
      feature_axes: the channel axis, one.
      epsilon: added to the variance.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as the mean of the
        group; with `axis_name`, of its channel).
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, and x told from it. What follows a norm mostly keeps y
        anyway, so that this halves what a deep network keeps. The size of scale is then at least 2⁻¹⁰, in y too. For y of x's dtype, and
        no activation, "leaky_relu" or a callable; where there is one position only, without `axis_name`.
        See the guide on kernels for what it costs in accuracy.

    Returns:
      y of x's shape. Where a group counts nothing, y is the activation of the bias.

    Raises:
      ValueError: both or neither of `num_groups` and `group_size`; channels not divisible; shapes, axes, names or groups that do not fit;
        `save="output"` where x cannot be told from y.
      TypeError: x is not floating.

    Numerics:
      Sums per channel, in at least float32 and with the mean as two floats, then a small merge of the channels of a group.
      Kept for the backward pass: x, or with `save="output"` y, and three numbers per sample and channel.

    Distributed:
      With `axis_name` one all-gather forward (two all-reduces above 64 participants or 4 MiB), one all-reduce of two numbers per sample and
      channel backward; without, none.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # one sample, two positions, two channels
      >>> print(np.asarray(jnorm.group_norm(x, num_groups=1)).round(3).ravel())
      [-1.069 -0.535  0.     1.604]

    References:
      Wu, He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494. Arguments and defaults are Flax's, but that the number of
      groups must be given; PyTorch's epsilon is 1e-5 and Keras's 1e-3.
    """
    x = check_x(x)
    reduced, axis = _axes(x, reduction_axes, feature_axes)
    groups = number_of_groups(x.shape[axis], num_groups, group_size)
    layout = Layout(x.shape, reduced, (axis,))
    scale, bias = (check_affine(v, name, layout, x) for v, name in ((scale, "scale"), (bias, "bias")))
    across, mask = Across.of(axis_name, axis_index_groups), broadcast_mask(mask, x)
    check_activation(activation)
    dtype = check_dtype(dtype, x)
    output = check_save(save, x, dtype, activation)
    scale = away_from_zero(scale) if output else scale
    options = {"mask": mask, "activation": activation, "dtype": dtype, "output": output}
    positions = tuple(i for i in reduced if i != axis)
    if all(x.shape[i] == 1 for i in positions):
        return _single_position(x, scale, bias, reduced, axis, groups, across, epsilon=check_epsilon(epsilon), **options)
    channels, epsilon = Layout(x.shape, positions, (axis,)), check_epsilon(epsilon)
    if across.names:
        return run(x, functools.partial(_map, groups, epsilon), (scale, bias), channels, across, **options)[0]
    return run_groups(x, scale, bias, channels, max(x.shape[axis] // groups, 1), epsilon=epsilon, **options)


def _axes(x: jax.Array, reduction_axes: Axes | None, feature_axes: int) -> tuple[tuple[int, ...], int]:
    features = canonical_axes(feature_axes, x.ndim, "feature_axes")
    if len(features) != 1:
        raise ValueError(f"group_norm divides one channel axis into groups, but feature_axes={feature_axes!r} names {len(features)}.")
    if reduction_axes is None:
        # A first axis that holds the channels is reduced as well: x without a batch.
        return tuple(sorted({*range(1, x.ndim), *features})), features[0]
    reduced = canonical_axes(reduction_axes, x.ndim, "reduction_axes")
    if features[0] not in reduced:
        raise ValueError(
            f"reduction_axes={reduction_axes!r} must contain the channel axis {features[0]}: group_norm reduces it within groups. "
            "For statistics of each channel use instance_norm."
        )
    return reduced, features[0]


def number_of_groups(channels: int, num_groups: int | None, group_size: int | None) -> int:
    if (num_groups is None) == (group_size is None):
        raise ValueError(f"give one of num_groups and group_size, got num_groups={num_groups} and group_size={group_size}.")
    name, part = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if not isinstance(part, int | np.integer):
        raise TypeError(f"{name} must be an int, got {part!r}.")
    if part < 1 or channels % part:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise ValueError(f"{name}={part} does not divide the {channels} channels; it may be one of {divisors}.")
    return part if group_size is None else max(channels // part, 1)


def _map(groups: int, epsilon: float, stats: Stats, aux: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    channels = stats.count.shape[-1]
    merged = combine(jax.tree.map(lambda a: a.reshape(*a.shape[:-1], groups, channels // groups), stats), -1)
    rstd = jnp.where(merged.count > 0, inverse_sqrt(merged.var + epsilon), 0)

    def per_channel(a: jax.Array) -> jax.Array:
        return jnp.broadcast_to(a[..., None], (*a.shape, channels // groups)).reshape(stats.count.shape)

    center, offset, mul = map(per_channel, (merged.center, merged.offset, rstd))
    # The difference of centers first: it is small and exact where the channels' means are close.
    shift = (center - stats.center) + offset
    return shift, *affine(mul, *aux)


def _single_position(
    x: jax.Array,
    scale: Any,
    bias: Any,
    reduced: tuple[int, ...],
    axis: int,
    groups: int,
    across: Across,
    *,
    mask: Any,
    dtype: Any,
    **options: Any,
) -> jax.Array:
    """One position: statistics of each channel would be of x's size, so that a group is a row instead."""

    def split(a: jax.Array) -> jax.Array:
        whole = a.shape[axis] == 1 and x.shape[axis] != 1
        return a.reshape(*a.shape[:axis], *((1, 1) if whole else (groups, a.shape[axis] // groups)), *a.shape[axis + 1 :])

    def view(v: jax.Array | None) -> jax.Array | None:
        return None if v is None else split(v.reshape([-1 if i == axis else 1 for i in range(x.ndim)]))

    rows = tuple(i + 1 if i >= axis else i for i in reduced)
    y = run_rows(
        split(x), view(scale), view(bias), rows, across, centered=True, mask=None if mask is None else split(mask), dtype=dtype, **options
    )
    return y.reshape(x.shape)
