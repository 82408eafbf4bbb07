"""Mean-only batch normalization."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from .._pipeline.arguments import check_state_dtype
from .._pipeline.batch import Batch
from .._pipeline.normalize import affine
from .._pipeline.population import collected, collects
from .._pipeline.running import check_momentum, check_state, update
from .._stats import Stats, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask, MeanState, Momentum, Save
from .batch_norm import batch_norm_state


def mean_only_batch_norm_state(num_features: int | Sequence[int], *, track_count: bool = False, dtype: Any = jnp.float32) -> MeanState:
    """The running mean before any update: 0.

    Args:
      num_features: size of the feature axis, or sizes of several in ascending order of the axes.
      track_count: add `"count"`, a scalar 0, for debiased and cumulative averages.
      dtype: of the mean; the count has it too, but at least float32.

    Returns:
      `{"mean": zeros}` of shape `(num_features,)`, and with `track_count` also `"count"`.

    Raises:
      TypeError: dtype is not floating.

    Example:
      >>> import jnorm
      >>> {k: v.shape for k, v in jnorm.mean_only_batch_norm_state(64, track_count=True).items()}
      {'mean': (64,), 'count': ()}
    """
    check_state_dtype(dtype)
    made = batch_norm_state(num_features, track_count=track_count, dtype=dtype)
    state = MeanState(mean=made["mean"])
    if "count" in made:
        state["count"] = made["count"]
    return state


class _Aux(NamedTuple):
    mean: jax.Array
    bias: jax.Array | None


def _map(stats: Stats, aux: _Aux) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The batch's mean where anything is counted, the running one elsewhere: always so in evaluation."""
    shift = jnp.where(stats.count > 0, stats.offset, aux.mean - stats.center)
    return shift, *affine(jnp.ones_like(shift), None, aux.bias)


def mean_only_batch_norm(
    x: jax.Array,
    state: MeanState,
    bias: jax.Array | None = None,
    *,
    use_running_average: bool = False,
    update_running: bool | None = None,
    momentum: Momentum = 0.99,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype: Any = None,
    save: Save = "input",
) -> tuple[jax.Array, MeanState]:
    r"""Mean-only batch normalization: subtracts from each feature its mean over the batch and all other axes.

    .. math:: y = \text{act}(x - \mu + \beta + \text{residual})

    with the mean of the batch, or the running one. Nothing is divided by: the scale is left to the layer before, such as one with
    :func:`jnorm.reparam.weight_norm`, with which the paper joins it.

    Args:
      x: `(..., C)`, or features on any axes; floating. All axes may be features, one example alone, in evaluation and where
        `axis_name` names the batch.
      state: from :func:`mean_only_batch_norm_state`.
      bias: beta, real, `(C,)`; 0 where None. One that the layer before adds has no effect.
      use_running_average: subtract the running mean (evaluation).
      update_running: whether the state moves; None: exactly when the batch's mean is subtracted. Together with `use_running_average`, the
        mean from before the update is subtracted.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]). None: the cumulative
        average, which needs `state["count"]`. Where the state has a count, the average is debiased: count ← momentum·count + 1,
        mean ← mean + (batch - mean) / count.
      feature_axes: the axes that keep their own mean; all others are reduced.
      mask: broadcasts against x; nonzero counts. What is not counted does not enter the mean; it is subtracted there too (a non-finite
        value is read as the mean).
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge the mean over, by count. Not needed under jit over sharded
        arrays, where it is global.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      residual: of x's shape, added before the activation.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass. For y of x's dtype, no residual, and no activation,
        "leaky_relu" or a callable. Gradients need of x no more than the activation's slope, so that it costs nothing in accuracy.

    Returns:
      y of x's shape, and the state: the same keys, shapes and dtypes. Where nothing updates it is the object that was given.

    Raises:
      ValueError: shapes, axes, names, groups or a static momentum that do not fit; no axis to reduce; `momentum=None` without a count;
        `save="output"` where x cannot be told from y.
      TypeError: x is not floating.

    Numerics:
      The mean in at least float32 from x as given, as two floats. A feature that counted nothing has the running mean subtracted and
      leaves it alone. One counted value gives the bias.
      Kept for the backward pass: x, or with `save="output"` y, and the residual where a named activation follows it.

    Distributed:
      As :func:`batch_norm`: one packed all-gather up to 64 participants, two all-reduces above; one all-reduce of 2C numbers backward;
      none in evaluation.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
      >>> y, state = jnorm.mean_only_batch_norm(x, jnorm.mean_only_batch_norm_state(2), momentum=0.5)
      >>> y.tolist(), state["mean"].tolist()
      ([[-2.0, -4.0], [0.0, 0.0], [2.0, 4.0]], [1.5, 3.0])
      >>> jnorm.mean_only_batch_norm(x, state, use_running_average=True)[0].tolist()
      [[-0.5, -1.0], [1.5, 3.0], [3.5, 7.0]]

    References:
      Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks", 2016,
      https://arxiv.org/abs/1602.07868. The authors' code keeps 0.9 of the running mean. Flax, Keras and PyTorch do not have it.
    """
    batch = Batch.of(
        "mean_only_batch_norm", x, state, None, bias, use_running_average=use_running_average, update_running=update_running,
        feature_axes=feature_axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, activation=activation,
        residual=residual, dtype=dtype, save=save,
    )  # fmt: skip
    check_state(state, batch.layout.feature_shape, keys=("mean",), made_by="mean_only_batch_norm_state")
    check_momentum(momentum, state)
    mean = jnp.asarray(state["mean"]).astype(stats_dtype(batch.x.dtype))
    y, stats = batch.run(_map, _Aux(mean, batch.bias), mean)
    if not batch.updates:
        return y, state
    if collects(state):
        new = collected({**state, "var": jnp.zeros_like(mean)}, stats)
        return y, cast(MeanState, {key: new[key] for key in state})
    return y, update(state, {"mean": stats.mean}, stats.count > 0, momentum)
