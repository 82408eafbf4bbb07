"""Instance normalization with running statistics."""

from typing import Any

import jax

from .._pipeline.arguments import Across, broadcast_mask, check_switches, check_x
from .._pipeline.axes import Layout
from .._pipeline.moments import keepdims_moments
from .._pipeline.running import check_momentum, check_state, moved_by_members
from .._stats import Stats
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum, Save
from .batch_norm import batch_norm
from .instance_norm import instance_layout, run_instances


def tracked_instance_norm(
    x: jax.Array,
    state: BatchNormState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    use_running_average: bool = False,
    update_running: bool | None = None,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-6,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    batch_axis_name: AxisName | None = None,
    running_var_correction: int | float = 0,
    activation: Activation | None = None,
    dtype: Any = None,
    save: Save = "input",
) -> tuple[jax.Array, BatchNormState]:
    r"""Instance normalization that also averages its statistics over samples, and normalizes with that average in evaluation.

    Training is :func:`instance_norm`. In evaluation it is no longer an instance norm:

    .. math:: y = \text{act}\left(\frac{x - \mu_{\text{running}}}{\sqrt{\sigma^2_{\text{running}} + \epsilon}}\,\gamma + \beta\right)

    Args:
      x: `(N, ..., C)`, or features on any axes; floating.
      state: from :func:`batch_norm_state`.
      scale: gamma, of the shape of the feature axes; 1 where None.
      bias: beta, of the shape of the feature axes; 0 where None.
      use_running_average: normalize with the running statistics (evaluation).
      update_running: whether the state moves; None: exactly when the samples' own statistics normalize.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]); None: the cumulative
        average, which needs `state["count"]`.
      epsilon: added to the variance.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      feature_axes: the axes along which scale, bias and state vary.
      mask: broadcasts against x; nonzero counts. A sample that counts nothing does not enter the average.
      axis_name: named axis or axes over which the reduced axes are split. Not the axis that the batch is split over.
      axis_index_groups: groups of equal size within that axis.
      batch_axis_name: named axis or axes that the batch is split over: the update averages over the samples of all devices, however many
        each of them has. It has no effect on y.
      running_var_correction: each sample's variance enters times n / max(n - correction, 1); 1 is PyTorch's.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, and x told from it. What follows a norm mostly keeps y
        anyway, so that this halves what a deep network keeps. The size of scale is then at least 2⁻¹⁰, in y too. For y of x's dtype, and
        no activation, "leaky_relu" or a callable.
        See the guide on kernels for what it costs in accuracy.

    Returns:
      y of x's shape, and the state: the same keys, shapes and dtypes. Where nothing updates it is the object that was given.

    Raises:
      ValueError, TypeError: as :func:`instance_norm` and :func:`batch_norm`; an axis in both `axis_name` and `batch_axis_name`.

    Numerics:
      As :func:`instance_norm`. The update averages the samples' means and variances, so that the spread between samples is not in it.

    Distributed:
      As :func:`instance_norm`. A batch that is split over devices needs no collective to normalize. With `batch_axis_name` there is one
      all-reduce of 3 numbers per feature where the state moves; without, each device has the state of its own samples.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])  # two samples, two positions, one channel
      >>> y, state = jnorm.tracked_instance_norm(x, jnorm.batch_norm_state(1), momentum=0.0)
      >>> y.ravel().round(4).tolist(), state["mean"].tolist(), state["var"].tolist()
      ([-1.0, 1.0, -1.0, 1.0], [4.5], [2.5])

    References:
      Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
      https://arxiv.org/abs/1607.08022. PyTorch's InstanceNorm with `track_running_stats=True`, whose momentum is 1 - momentum,
      whose running variance is the unbiased one (`running_var_correction=1`) and whose epsilon is 1e-5.
    """
    x = check_x(x)
    layout = instance_layout(x, reduction_axes, feature_axes)
    check_state(state, layout.feature_shape)
    check_momentum(momentum, state)
    use_running_average, updates = check_switches(use_running_average, update_running, state)
    across = Across.of(axis_name, axis_index_groups, needed=updates or not use_running_average)
    of_batch = Across.of(batch_axis_name, None, needed=updates, called="batch_axis_name")
    if set(across.names) & set(of_batch.names):
        raise ValueError(
            f"axis_name={axis_name!r} and batch_axis_name={batch_axis_name!r} name the same axis; the first splits the samples themselves, "
            "the second the batch."
        )
    options = {"epsilon": epsilon, "mask": broadcast_mask(mask, x), "activation": activation, "dtype": dtype, "save": save}
    if use_running_average:
        y, _ = batch_norm(x, state, scale, bias, use_running_average=True, feature_axes=layout.features, **options)
        stats = _instance_stats(x, options["mask"], layout, across) if updates else None
    else:
        y, stats = run_instances(x, scale, bias, layout, across, **options)
    if not updates or stats is None:
        return y, state
    samples = tuple(range(stats.count.ndim - len(layout.features)))
    return y, moved_by_members(state, stats, samples, momentum, running_var_correction, of_batch)


def _instance_stats(x: jax.Array, mask: jax.Array | None, layout: Layout, across: Across) -> Stats:
    return jax.tree.map(layout.squeeze, keepdims_moments(x, mask, layout.reduced, across))
