"""Ghost batch normalization: each of several groups of examples by its own statistics."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from .._jax_internals import cut_first_axis, join_first_axes, whole_along
from .._pipeline.arguments import Across, check_epsilon
from .._pipeline.axes import Layout, others
from .._pipeline.batch import Batch
from .._pipeline.population import VALUES, collects
from .._pipeline.running import check_momentum, check_state, corrected_var, moved, moved_by_members
from .._stats import Stats, all_combine, combine, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Grouping, GroupUpdate, Mask, Momentum, Remainder, Save
from .batch_norm import BatchNormAux, batch_norm_map

CHOICES = {"grouping": ("consecutive", "strided"), "remainder": ("error", "smaller"), "update": ("mean", "each")}


class _Cut(NamedTuple):
    """How the first axis becomes two, the one at `axis` telling the groups apart."""

    examples: int
    shape: tuple[int, int]
    axis: int

    @property
    def missing(self) -> int:
        return self.shape[0] * self.shape[1] - self.examples

    def split(self, a: jax.Array) -> jax.Array:
        """Filled up with zeros. What has one entry for all examples keeps it."""
        if len(a) != self.examples:
            return a[None]
        if self.missing:
            a = jnp.pad(whole_along(a, (0,)), [(0, self.missing)] + [(0, 0)] * (a.ndim - 1))
        return cut_first_axis(a, self.shape, self.axis)

    def layout(self, of: Layout) -> Layout:
        shape, features = (*self.shape, *of.shape[1:]), tuple(i + 1 for i in of.features)
        return Layout(shape, others(len(shape), (self.axis,), features), features)

    def cut(self, batch: Batch) -> Batch:
        """The batch with an axis more. Nothing is merged over devices; a callable is left for what is joined again."""
        mask = batch.mask
        if self.missing:
            given = jnp.ones((self.examples, *(1,) * (batch.x.ndim - 1)), bool)
            mask = given if mask is None else given & mask
        return batch._replace(
            x=self.split(batch.x),
            layout=self.layout(batch.layout),
            across=Across(),
            mask=None if mask is None else self.split(mask),
            residual=None if batch.residual is None else self.split(batch.residual),
            activation=None if callable(batch.activation) else batch.activation,
        )


def _cut_of(batch: Batch, group_size: int, grouping: Grouping, remainder: Remainder) -> _Cut:
    if 0 in batch.layout.features:
        raise ValueError(
            f"the first axis of x is the batch, which is cut into groups, and must be none of feature_axes; x is {batch.x.shape}."
        )
    examples = batch.x.shape[0]
    if not isinstance(examples, int):
        raise ValueError(f"the batch is cut into groups, for which its size must be a number and not a symbol; x is {batch.x.shape}.")
    if group_size > examples:
        raise ValueError(f"group_size={group_size} is larger than the batch of {examples}; for one group over all of it use batch_norm.")
    if examples % group_size and remainder == "error":
        raise ValueError(
            f"group_size={group_size} does not divide the batch of {examples}; drop what is left over of the data, "
            'or pass remainder="smaller" for groups that are smaller.'
        )
    number = -(-examples // group_size)
    if grouping == "consecutive":
        return _Cut(examples, (number, group_size), 0)
    return _Cut(examples, (-(-examples // number), number), 1)


def check_group_size(group_size: Any) -> int:
    if isinstance(group_size, Tracer) or not isinstance(group_size, int | np.integer) or isinstance(group_size, bool):
        raise TypeError(f"group_size is static and must be an int, got {group_size!r}.")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}.")
    return int(group_size)


def _check_choices(**choices: Any) -> None:
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be {' or '.join(map(repr, CHOICES[name]))}, got {value!r}.")


def _one_step_each(state: BatchNormState, stats: Stats, correction: int | float, momentum: Momentum) -> BatchNormState:
    """What one step for each group gives, without the loop: the last one, and each before it times what the later ones keep."""
    old: dict[str, jax.Array] = {key: lax.stop_gradient(jnp.asarray(a)) for key, a in state.items()}
    stats = Stats(*(whole_along(a, (0,)) for a in stats))
    dtype, counted = stats.count.dtype, stats.count > 0
    keep = jnp.asarray(1.0 if momentum is None else momentum, dtype).clip(0, 1)
    new, kept = {}, jnp.broadcast_to(keep, len(counted))
    if "count" in old:
        # count ← keep·count + 1 for each group that counts anything, which is after r of them keepʳ·count + 1 + keep + … + keepʳ⁻¹
        moved = counted.any(tuple(range(1, counted.ndim))).cumsum()
        powers = keep ** jnp.arange(len(counted) + 1, dtype=dtype)
        after = powers * old["count"].astype(dtype) + (powers.cumsum() - powers)
        new["count"], kept = after[moved[-1]], 1 - 1 / jnp.maximum(after[moved], 1)
    each = jnp.where(counted, kept.reshape(-1, *(1,) * (counted.ndim - 1)), 1)
    later = lax.cumprod(jnp.concatenate([each[1:], jnp.ones_like(each[:1])]), reverse=True)
    weight, before = (1 - each) * later, each[0] * later[0]
    for key, now in (("mean", stats.mean), ("var", corrected_var(stats, correction))):
        new[key] = before * old[key].astype(now.dtype) + (weight * now).sum(0)
    return cast(BatchNormState, {key: new[key].astype(a.dtype) if key in new else a for key, a in old.items()})


def ghost_batch_norm(
    x: jax.Array,
    state: BatchNormState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    group_size: int,
    grouping: Grouping = "consecutive",
    remainder: Remainder = "error",
    update: GroupUpdate = "mean",
    use_running_average: bool = False,
    update_running: bool | None = None,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    running_var_correction: int | float = 0,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype: Any = None,
    save: Save = "input",
) -> tuple[jax.Array, BatchNormState]:
    r"""Ghost batch normalization: a large batch in groups of examples, each normalized as a batch of its own.

    .. math:: y_i = \text{act}\left(\frac{x_i - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}}\,\gamma + \beta + \text{residual}_i\right)

    with the mean and biased variance, over all axes but the features, of the group k that example i is in. Evaluation is that of
    :func:`batch_norm`, with one set of running statistics.

    Args:
      x: `(N, ..., C)`, or features on any axes but the first; floating.
      state: from :func:`batch_norm_state`.
      scale: gamma, real, `(C,)`; 1 where None.
      bias: beta, real, `(C,)`; 0 where None.
      group_size: the number of examples that are normalized together, at most N. In evaluation it has no effect.
      grouping: "consecutive": example i is in group i // group_size. "strided": in group i mod K, of K = N / group_size, rounded up.
      remainder: "error" refuses an N that `group_size` does not divide. "smaller": the batch is filled up under a mask. Then the last
        group is smaller (consecutive), or groups differ by at most one example (strided).
      update: "mean": one step of the running average, with the mean of the groups' means and the mean of their variances. "each": one
        step for each group, in order, so that the old values are kept by momentum to the power K.
      use_running_average: normalize with the running statistics (evaluation).
      update_running: whether the state moves; None: exactly when the groups' statistics normalize. Together with `use_running_average`,
        the statistics from before the update normalize.
      momentum: the fraction of the old running value that is kept in a step, a float or a traced scalar (clipped to [0, 1]). None: the
        cumulative average, which needs `state["count"]`. Where the state has a count, the average is debiased, as in :func:`batch_norm`.
      epsilon: added to the variance.
      feature_axes: the axes that keep their own statistics.
      mask: broadcasts against x; nonzero counts. What is not counted enters no statistic; it goes through its group's map (a non-finite
        value as the mean).
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` that the batch is split over. Groups never cross devices: only the
        update is averaged, over the groups of all of them. For `update="mean"`.
      axis_index_groups: groups of equal size within that axis.
      running_var_correction: a group's variance enters the state times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      residual: of x's shape, added before the activation.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, as in :func:`batch_norm`.

    Returns:
      y of x's shape, and the state: the same keys, shapes and dtypes. Where nothing updates it is the object that was given.

    Raises:
      ValueError: a `group_size` below 1, above N, or that does not divide N; the first axis is a feature; `update="each"` with
        `axis_name`, since groups of devices have no order; and as :func:`batch_norm`.
      TypeError: x is not floating; `group_size` is no int.

    Numerics:
      As :func:`batch_norm`, group by group. A feature that counts nothing in a group is normalized there with the running statistics, and
      that group does not enter its update. With one example in a group and no positions, y is the activation of the bias.
      The running variance is an average of variances within groups, and has none of the spread between them.
      With `remainder="smaller"`, what is kept for the backward pass is the batch as filled up.

    Distributed:
      One all-reduce of 3C numbers for the update, none to normalize, none backward. Under jit over arrays whose batch is sharded,
      consecutive groups need no communication where each device has whole ones; strided groups are spread over all devices.
      On a mesh of explicit axes x is gathered along the batch where devices cannot have as many groups each.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x = jnp.array([[1.0], [3.0], [5.0], [9.0]])
      >>> y, state = jnorm.ghost_batch_norm(x, jnorm.batch_norm_state(1), group_size=2, momentum=0.5)
      >>> print(np.asarray(y[:, 0]).round(3), state["mean"], state["var"])  # means 2 and 7, variances 1 and 4
      [-1. 1. -1. 1.] [2.25] [1.75]
      >>> y, state = jnorm.ghost_batch_norm(x, jnorm.batch_norm_state(1), group_size=2, momentum=0.5, update="each")
      >>> print(state["mean"])  # (0 + 2) / 2 = 1, then (1 + 7) / 2
      [4.]

    References:
      Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in large batch training of neural
      networks", 2017, https://arxiv.org/abs/1705.08741. Its code runs consecutive groups one after the other through one layer, which is
      `update="each"`. Keras 2's `virtual_batch_size` has strided groups and `update="mean"`.
    """
    group_size = check_group_size(group_size)
    _check_choices(grouping=grouping, remainder=remainder, update=update)
    batch = Batch.of(
        "ghost_batch_norm", x, state, scale, bias, use_running_average=use_running_average, update_running=update_running,
        feature_axes=feature_axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, activation=activation,
        residual=residual, dtype=dtype, save=save,
    )  # fmt: skip
    epsilon, across = check_epsilon(epsilon), batch.across
    if update == "each" and across.names and batch.updates:
        raise ValueError(
            'update="each" takes the groups in order, and those of several devices have none; with axis_name use update="mean".'
        )
    check_state(state, batch.layout.feature_shape)
    check_momentum(momentum, state)
    mean, var = (jnp.asarray(state[key]).astype(stats_dtype(batch.x.dtype)) for key in ("mean", "var"))
    map = functools.partial(batch_norm_map, epsilon)
    if batch.evaluates and not batch.updates:
        return batch.run(map, BatchNormAux(mean, var, batch.scale, batch.bias), mean)[0], state
    cut = _cut_of(batch, group_size, grouping, remainder)
    # An axis for the groups, along which they are the same.
    y, stats = cut.cut(batch).run(map, BatchNormAux(mean[None], var[None], batch.scale, batch.bias), mean[None])
    y, stats = join_first_axes(y, batch.x), lax.stop_gradient(stats)
    y = batch.activation(y) if callable(batch.activation) else y
    if not batch.updates:
        return y, state
    if VALUES in state:
        return y, moved(state, all_combine(combine(stats, 0), *across), momentum)
    if update == "each" and not collects(state):
        return y, _one_step_each(state, stats, running_var_correction, momentum)
    return y, moved_by_members(state, stats, (0,), momentum, running_var_correction, across)
