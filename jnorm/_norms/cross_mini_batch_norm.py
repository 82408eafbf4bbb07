"""Cross mini-batch normalization."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._jax_internals import lying_as
from .._pipeline.arguments import check_epsilon, check_state_dtype
from .._pipeline.batch import Batch
from .._pipeline.marks import ADDED
from .._pipeline.population import collects
from .._pipeline.running import check_momentum, check_state, corrected_var, moved, update
from .._stats import Stats, combine, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, CrossMiniBatchState, Mask, Momentum
from .batch_norm import BatchNormAux, batch_norm_map, batch_norm_state

# What the state has beside running statistics: the mini-batches of this batch so far.
BATCH = ("batch_mean", "batch_var", "batch_count")


def cross_mini_batch_norm_state(
    num_features: int | Sequence[int], *, track_count: bool = False, dtype: Any = jnp.float32
) -> CrossMiniBatchState:
    """Running statistics before any update, and the statistics of a batch of which no mini-batch was seen.

    Args:
      num_features: size of the feature axis, or sizes of several in ascending order of the axes.
      track_count: add `"count"`, a scalar 0, for debiased and cumulative averages.
      dtype: of "mean" and "var"; the batch's own statistics and the count are at least float32.

    Returns:
      `{"mean": zeros, "var": ones, "batch_mean": zeros, "batch_var": zeros, "batch_count": zeros, "index": 0}`, all but the int32 scalar
      "index" of shape `(num_features,)`, and with `track_count` also `"count"`.

    Example:
      >>> import jnorm
      >>> {k: v.shape for k, v in jnorm.cross_mini_batch_norm_state(64).items()}
      {'mean': (64,), 'var': (64,), 'batch_mean': (64,), 'batch_var': (64,), 'batch_count': (64,), 'index': ()}
    """
    check_state_dtype(dtype)
    running = batch_norm_state(num_features, track_count=track_count, dtype=dtype)
    batch = {key: jnp.zeros(running["mean"].shape, stats_dtype(dtype)) for key in BATCH}
    return cast(CrossMiniBatchState, {**running, **batch, "index": jnp.zeros((), jnp.int32)})


class _Aux(NamedTuple):
    """What the map takes beside the statistics of the mini-batch: those of the batch's earlier ones, and batch_norm's."""

    earlier: Stats
    running: BatchNormAux


def _merged(stats: Stats, earlier: Stats) -> Stats:
    return combine(jax.tree.map(lambda own, other: jnp.stack([own, lying_as(other, own)]), stats, earlier), 0)


def _map(published: bool, epsilon: float, stats: Stats, aux: _Aux) -> tuple[jax.Array, jax.Array, jax.Array]:
    """batch_norm's map of the merged statistics, seen from the center of the mini-batch's own."""
    merged = _merged(stats, aux.earlier)
    shift, m2 = (merged.center - stats.center) + merged.offset, merged.m2
    if published:
        shift, m2 = _as_if_own(stats, shift, m2 / jnp.maximum(merged.count, 1), merged.count)
    return batch_norm_map(epsilon, Stats(merged.count, stats.center, shift, m2), aux.running)


def _as_if_own(stats: Stats, shift: jax.Array, var: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The merged shift and m2, with the derivatives that they would have if the mini-batch were the batch.

    With d/dx of the mean M 1/n, and of the variance 2(x - M)/n, which is that of the mini-batch's own variance, 2(x - m)/n, plus
    2(m - M)·dm/dx. There m - M is a constant, as m and M move alike: then the first mini-batch is batch_norm in every order.
    """

    def zero(v: jax.Array) -> jax.Array:
        return v - lax.stop_gradient(v)

    apart = lax.stop_gradient(stats.offset - shift)
    var = lax.stop_gradient(var) + zero(stats.var) + 2 * apart * zero(stats.offset)
    return lax.stop_gradient(shift) + zero(stats.offset), var * jnp.maximum(count, 1)


def cross_mini_batch_norm(
    x: jax.Array,
    state: CrossMiniBatchState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    num_mini_batches: int | jax.Array,
    gradient: Literal["exact", "published"] = "exact",
    update: Literal["each", "last"] = "each",
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
) -> tuple[jax.Array, CrossMiniBatchState]:
    r"""Cross mini-batch normalization: where gradients of several mini-batches are accumulated, each over all that came before it.

    .. math:: y_i = \text{act}\left(\frac{x_i - M_i}{\sqrt{V_i + \epsilon}}\,\gamma + \beta + \text{residual}\right)

    with the mean and biased variance of all values in the mini-batches 1 to i of a batch. The weights do not change within a batch. It
    belongs in the loop over the mini-batches of one step of the optimizer, with its state in the carry.

    Args:
      x: one mini-batch, `(..., C)`, or features on any axes; floating.
      state: from :func:`cross_mini_batch_norm_state`. After `num_mini_batches` calls the next one starts a new batch; so it does where
        "index" is 0, which leaves a batch unfinished.
      scale: gamma, real, `(C,)`; 1 where None.
      bias: beta, real, `(C,)`; 0 where None.
      num_mini_batches: how many mini-batches make a batch, an int or a traced integer (where below 1, 1).
      gradient: "exact": the derivative of y, of which the earlier mini-batches are constants; the mean terms have the weight n/N, the
        mini-batch's share of the values so far. "published": those terms at weight 1, as if all values were the mini-batch's own.
      update: the running statistics take those of all values so far at "each" mini-batch, or at the "last" one of a batch only.
      use_running_average: normalize with the running statistics (evaluation).
      update_running: whether the state moves, the batch's statistics included; None: exactly when batch statistics normalize. Together
        with `use_running_average`, the statistics from before the update normalize.
      momentum: the fraction of the old running value that is kept at an update, a float or a traced scalar (clipped to [0, 1]). None: the
        cumulative average, which needs `state["count"]`.
      epsilon: added to the variance.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      mask: broadcasts against x; nonzero counts. What is not counted enters no statistic; it goes through the same map (a non-finite
        value as the mean of the mini-batch).
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count. Not needed under jit over sharded
        arrays, where statistics are global.
      axis_index_groups: groups of equal size within that axis.
      running_var_correction: the variance that enters the state is the biased one times N / max(N - correction, 1), of N values so far.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      residual: of x's shape, added before the activation.
      dtype: y's dtype; x's where None.

    Returns:
      y of x's shape, and the state: the same keys, shapes and dtypes. Where nothing updates it is the object that was given.

    Raises:
      ValueError: shapes, axes, names, groups or a static momentum that do not fit; no axis to reduce; `num_mini_batches` below 1; a state
        of running statistics alone, such as batch_norm's.
      TypeError: x is not floating; `num_mini_batches` is no integer.

    Numerics:
      Mini-batches are merged by count, around their means; of equal sizes that is the cumulative average of the paper. Within a
      mini-batch the mean is two floats; that of the earlier ones is stored as one, right to float32 rounding of its size.
      A feature that counted nothing so far is normalized with the running statistics. One that counted nothing in this mini-batch is
      normalized with the earlier ones', and leaves the running statistics alone, but for `update="last"`.
      With num_mini_batches=1 this is :func:`batch_norm`. No gradient reaches the state or earlier mini-batches.
      Kept for the backward pass: x, and the residual where a named activation follows it.

    Distributed:
      As :func:`batch_norm`: one packed all-gather of the mini-batch's statistics up to 64 participants, two all-reduces above; one
      all-reduce backward; none in evaluation.

    Example:
      >>> import jax, jax.numpy as jnp, jnorm
      >>> def step(state, x):
      ...     y, state = jnorm.cross_mini_batch_norm(x, state, num_mini_batches=2)
      ...     return state, (state["batch_mean"], state["batch_var"])
      >>> batch = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])  # two mini-batches of two examples
      >>> state, (mean, var) = jax.lax.scan(step, jnorm.cross_mini_batch_norm_state(1), batch)
      >>> mean.ravel().tolist(), var.ravel().tolist()
      ([2.0, 3.0], [1.0, 3.5])

    References:
      Bochkovskiy, Wang, Liao, "YOLOv4: Optimal Speed and Accuracy of Object Detection", 2020, https://arxiv.org/abs/2004.10934. The
      published code, darknet, divides the sum of squares by n - 1 and that of x by n, which for few values is no variance; weighs
      mini-batches alike, whatever they count; leaves values unnormalized where the result is not finite; updates as "each" and has the
      "published" gradient.
    """
    batch = Batch.of(
        "cross_mini_batch_norm", x, state, scale, bias, use_running_average=use_running_average, update_running=update_running,
        feature_axes=feature_axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, activation=activation,
        residual=residual, dtype=dtype, save="input",
    )  # fmt: skip
    epsilon, number = check_epsilon(epsilon), _check_number(num_mini_batches)
    _check_choice(gradient, "gradient", ("exact", "published"))
    _check_choice(update, "update", ("each", "last"))
    _check(state, batch.layout.feature_shape)
    check_momentum(momentum, state)
    wide = stats_dtype(batch.x.dtype)
    mean, var = (jnp.asarray(state[key]).astype(wide) for key in ("mean", "var"))
    earlier, index = _earlier(state, number, wide)
    none = jax.tree.map(jnp.zeros_like, earlier)
    aux = _Aux(none if batch.evaluates else earlier, BatchNormAux(mean, var, batch.scale, batch.bias))
    y, stats = batch.run(functools.partial(_map, gradient == "published", epsilon), aux, mean)
    if not batch.updates:
        return y, state
    merged, index = _merged(stats, earlier), index + 1
    counted = (merged.count > 0) & (index == number) if update == "last" else stats.count > 0
    running: dict[str, Any] = {key: a for key, a in state.items() if key in ("mean", "var", "count", *ADDED)}
    # A state that collects has each mini-batch by itself.
    new = moved(running, stats, momentum) if collects(state) else _moved(running, merged, counted, momentum, running_var_correction)
    new = {**new, "batch_mean": merged.mean, "batch_var": merged.var, "batch_count": merged.count, "index": index}
    old = {key: jnp.asarray(a) for key, a in state.items()}
    return y, cast(CrossMiniBatchState, {k: lying_as(lax.stop_gradient(new[k]).astype(v.dtype), v) for k, v in old.items()})


def _earlier(state: CrossMiniBatchState, number: jax.Array, dtype: Any) -> tuple[Stats, jax.Array]:
    """The statistics of the batch's earlier mini-batches and their number: none where a batch starts."""
    index = jnp.asarray(state["index"])
    mean, var, count = (lax.stop_gradient(jnp.asarray(state[key]).astype(dtype)) for key in BATCH)
    goes_on = (index > 0) & (index < number.astype(index.dtype))
    count = jnp.where(goes_on, count, jnp.zeros_like(count))
    return Stats(count, mean, jnp.zeros_like(mean), var * count), jnp.where(goes_on, index, jnp.zeros_like(index))


def _moved(running: Any, merged: Stats, counted: jax.Array, momentum: Momentum, correction: int | float) -> dict[str, jax.Array]:
    return dict(update(running, {"mean": merged.mean, "var": corrected_var(merged, correction)}, counted, momentum))


def _check_number(number: Any) -> jax.Array:
    if isinstance(number, int | np.integer):
        if number < 1:
            raise ValueError(f"num_mini_batches is how many mini-batches make a batch, at least 1, got {number}.")
        return jnp.asarray(number, jnp.int32)
    if not isinstance(number, jax.Array | np.ndarray) or number.shape or not jnp.issubdtype(number.dtype, jnp.integer):
        raise TypeError(f"num_mini_batches must be an int or an integer scalar, got {number!r}.")
    return jnp.maximum(jnp.asarray(number, jnp.int32), 1)


def _check_choice(value: Any, name: str, choices: tuple[str, str]) -> None:
    if value not in choices:
        raise ValueError(f'{name} must be "{choices[0]}" or "{choices[1]}", got {value!r}.')


def _check(state: Any, feature_shape: tuple[int, ...]) -> None:
    if isinstance(state, dict) and (missing := [key for key in (*BATCH, "index") if key not in state]):
        raise ValueError(
            f"state lacks {', '.join(map(repr, missing))}, got {sorted(map(str, state))}. cross_mini_batch_norm belongs in the loop that "
            "accumulates the gradients of a batch's mini-batches, and its state in that loop's carry, which is where the statistics of the "
            "mini-batches so far are; make it with jnorm.cross_mini_batch_norm_state."
        )
    arrays = {key: v for key, v in state.items() if key != "index"} if isinstance(state, dict) else state
    check_state(arrays, feature_shape, keys=("mean", "var", *BATCH), made_by="cross_mini_batch_norm_state")
    index = jnp.asarray(state["index"])
    if index.shape or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"state['index'] must be an integer scalar, got {index.dtype} of shape {index.shape}.")
