"""Cross-iteration batch normalization."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from .._jax_internals import with_sharding_of
from .._pipeline.arguments import check_epsilon, check_state_dtype, check_x
from .._pipeline.batch import Batch
from .._pipeline.iterations import (
    brought_to,
    check_kernel_shape,
    check_linear_op,
    check_slots,
    check_window_size,
    slot_shapes,
    with_iteration,
)
from .._pipeline.marks import ADDED
from .._pipeline.normalize import affine
from .._pipeline.running import check_momentum, check_state, moved
from .._pipeline.values import check_scalar, check_sizes, not_a_state
from .._stats import Stats, combine, inverse_sqrt, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, CrossIterationState, Mask, Momentum, WindowRule

_MADE_BY = "cross_iteration_batch_norm_state"


def cross_iteration_batch_norm_state(
    kernel_shape: Sequence[int],
    *,
    window: int = 4,
    num_groups: int = 1,
    exact_second_moment: bool = False,
    track_count: bool = False,
    dtype: Any = jnp.float32,
) -> CrossIterationState:
    """Running statistics, mean 0 and variance 1, and empty slots for the iterations before the present one.

    Args:
      kernel_shape: of the layer before the norm, the outputs last: `(..., C)`.
      window: how many iterations share their statistics, this one among them; 1 is batch normalization.
      num_groups: the groups of the layer's inputs (`feature_group_count`).
      exact_second_moment: keep the covariance of the inputs' patches, with which the variance is exact, in place of slopes: K² numbers for
        each group and iteration, where a patch has K, so that it is for small kernels.
      track_count: add `"count"`, a scalar 0, for debiased and cumulative running averages.
      dtype: of the running statistics, patches, slopes and covariances; what is stored of an iteration beside them, its mean, variance,
        count and kernel, has at least float32, so that a kernel that did not move is told as such.

    Returns:
      `"mean"`, `"var"`: running statistics `(C,)`; then with `window - 1` slots in front `"means"`, `"vars"` `(C,)`, `"patches"`
      `(..., num_groups)`, `"slopes"` (or `"covariances"`), `"kernels"` `(..., C)`, `"counts"` (0: an empty slot); and `"index"`, the slot
      that is filled next.

    Raises:
      ValueError: a window below 1, or groups that do not divide the outputs.
      TypeError: dtype is not floating; kernel_shape is no shape.

    Example:
      >>> import jnorm
      >>> state = jnorm.cross_iteration_batch_norm_state((3, 3, 16, 32), window=4)
      >>> state["slopes"].shape, state["patches"].shape, state["counts"].tolist()
      ((3, 3, 3, 16, 32), (3, 3, 3, 16, 1), [0.0, 0.0, 0.0])
    """
    kernel = check_sizes(kernel_shape, "kernel_shape", "a sequence of ints, such as kernel.shape")
    check_kernel_shape(kernel, num_groups, "kernel_shape")
    if not isinstance(window, int | np.integer) or window < 1:
        raise ValueError(f"window must be an int of at least 1, which is this iteration alone, got {window!r}.")
    check_state_dtype(dtype)
    shapes = slot_shapes(kernel, int(window) - 1, num_groups, exact_second_moment)
    dtypes: dict[str, Any] = dict.fromkeys(("counts", "means", "vars", "kernels"), stats_dtype(dtype))
    state: dict[str, Any] = {"mean": jnp.zeros(kernel[-1:], dtype), "var": jnp.ones(kernel[-1:], dtype)}
    state |= {key: jnp.zeros(shape, dtypes.get(key, dtype)) for key, shape in shapes.items()} | {"index": jnp.int32(0)}
    if track_count:
        state["count"] = jnp.zeros((), stats_dtype(dtype))
    return cast(CrossIterationState, state)


class _Aux(NamedTuple):
    """What the map takes beside the statistics: (C,), and of the slots (slots, C)."""

    mean: jax.Array
    var: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None
    slots: Stats | None


def _map(epsilon: float, stats: Stats, aux: _Aux) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalization with the merged statistics of the window; with the running ones where this iteration counts nothing."""
    window = stats
    if aux.slots is not None:
        window = combine(jax.tree.map(_joined, stats, aux.slots), 0)
    counted = stats.count > 0
    mul = inverse_sqrt(jnp.where(counted, window.var, aux.var) + epsilon)
    shift = jnp.where(counted, (window.center - stats.center) + window.offset, aux.mean - stats.center)
    return shift, *affine(mul, aux.scale, aux.bias)


def _joined(own: jax.Array, slots: jax.Array) -> jax.Array:
    own = own[None]
    return jnp.concatenate([own, with_sharding_of(slots, jax.typeof(own))])


def cross_iteration_batch_norm(
    x: jax.Array,
    state: CrossIterationState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    inputs: jax.Array,
    kernel: jax.Array,
    linear_op: Callable[[Any, Any], Any],
    num_groups: int = 1,
    window_size: int | jax.Array | None = None,
    compensation: float | jax.Array = 1.0,
    rule: WindowRule = "max",
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
) -> tuple[jax.Array, CrossIterationState]:
    r"""Cross-iteration batch normalization: with the statistics of the last iterations too, corrected for how the weights moved since.

    .. math:: y &= \text{act}\left(\frac{x - \bar\mu}{\sqrt{\bar\sigma^2 + \epsilon}}\,\gamma + \beta + \text{residual}\right), \qquad
              \bar\mu = \sum_\tau w_\tau \mu'_\tau, \qquad
              \bar\sigma^2 = \sum_\tau w_\tau \left(\sigma'^2_\tau + (\mu'_\tau - \bar\mu)^2\right) \\
              \mu'_\tau &= \mu_\tau + \delta_\tau, \qquad
              \sigma'^2_\tau = \max\left(\sigma^2_\tau + 2\,c_\tau\cdot\Delta_\tau - \delta_\tau^2,\ 0\right), \qquad
              \delta_\tau = \bar p_\tau\cdot\Delta_\tau

    for the outputs x = W·p of a linear layer, p the patch of its inputs that one output sees. :math:`\Delta_\tau` is compensation times
    the change of W since iteration :math:`\tau`, :math:`\bar p_\tau` the mean patch then, :math:`c_\tau` the covariance of patch and
    output, :math:`w_\tau` the iteration's part of all that is counted. For this iteration :math:`\Delta = 0`, and it alone has a gradient.

    For batches too small for statistics of their own. Each iteration also costs one gradient of the layer by its kernel.

    Args:
      x: what the layer gives, `linear_op(inputs, kernel)`, without a bias (this one's takes its place): `(..., C)`; floating.
      state: from :func:`cross_iteration_batch_norm_state`.
      scale: gamma, real, `(C,)`; 1 where None.
      bias: beta, real, `(C,)`; 0 where None.
      inputs: of the layer; floating.
      kernel: the layer's weights, `(..., C)`: outputs last.
      linear_op: `linear_op(inputs, kernel)`, linear in the kernel; also taken of kernels with `num_groups` outputs, and of float32. A
        layer that changes its weights before it uses them (as weight normalization does) is not linear in what it holds, only in those.
      num_groups: the groups of the layer's inputs (`feature_group_count`), one after the other among the outputs.
      window_size: how many iterations are used, this one among them, an int or a traced scalar (clipped to the state's window); None: all
        there are. 1 is batch normalization, for a burn-in while the weights move fast: `jnp.where(step < 1000, 1, 4)`.
      compensation: the factor of the change of the kernel, a float or a traced scalar; 0 takes old statistics as they are.
      rule: "max" takes a variance below 0 for 0; "drop" leaves that iteration out of that feature's window, as the published code does.
        With `exact_second_moment` both are the same: a variance is below 0 by rounding only.
      use_running_average: normalize with the running statistics (evaluation).
      update_running: whether the state moves, running statistics and slots; None: exactly when batch statistics normalize.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]); None: the cumulative
        average, which needs `state["count"]`. What is averaged are the statistics of this iteration alone.
      epsilon: added to the variance.
      feature_axes: the axis of the outputs in x.
      mask: broadcasts against x, and is the same for all features; nonzero counts.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count.
      axis_index_groups: groups of equal size within that axis.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      residual: of x's shape, added before the activation.
      dtype: y's dtype; x's where None.

    Returns:
      y of x's shape, and the state: the same keys, shapes and dtypes. Where nothing updates it is the object that was given.

    Raises:
      ValueError: a kernel, groups, x or a mask that do not fit the state, the layer or each other; as :func:`batch_norm`.
      TypeError: x, inputs or kernel is not floating; linear_op cannot be called.

    Numerics:
      No difference of second moments is formed. The mean's correction is exact; the variance's leaves out the mean of (Δ·p)² (with
      `exact_second_moment` nothing), and both leave out that the layer's inputs change, when the layers before it do.
      Kept in the state: 2·(window - 1) times the size of the kernel, and the mean patches, in its dtype. Means of earlier iterations are
      single floats; patches and slopes are as precise as linear_op is.
      An iteration that counted nothing uses the running statistics and leaves the state alone.
      Kept for the backward pass: x, and the residual where a named activation follows it.

    Distributed:
      As :func:`batch_norm`, and one all-reduce of the size of the kernel where the state moves (two with `exact_second_moment`).

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> state = jnorm.cross_iteration_batch_norm_state((1, 1), window=2)
      >>> for inputs, kernel in [([[1.0], [3.0]], [[1.0]]), ([[2.0], [4.0]], [[1.5]])]:
      ...     inputs, kernel = jnp.array(inputs), jnp.array(kernel)
      ...     y, state = jnorm.cross_iteration_batch_norm(
      ...         inputs @ kernel, state, inputs=inputs, kernel=kernel, linear_op=jnp.matmul
      ...     )
      >>> print(np.asarray(y).ravel().round(3))  # (3, 6), with mean 3.75 and variance 2.1875
      [-0.507  1.521]

    References:
      Yao, Cao, Zheng, Huang, Lin, "Cross-Iteration Batch Normalization", 2020, https://arxiv.org/abs/2002.05712. The published code
      counts the iterations before this one (`buffer_num` is window - 1), drops variances below 0 (`rule="drop"`), adds epsilon to the
      standard deviation by default, and its running variance is the unbiased one (`running_var_correction=1`). Where counts differ, the
      averages here are by count.
    """
    batch = Batch.of(
        "cross_iteration_batch_norm", x, state, scale, bias, use_running_average=use_running_average, update_running=update_running,
        feature_axes=feature_axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, activation=activation,
        residual=residual, dtype=dtype, save="input",
    )  # fmt: skip
    epsilon, wide = check_epsilon(epsilon), stats_dtype(batch.x.dtype)
    inputs, kernel = (check_x(a, name=name).astype(wide) for a, name in ((inputs, "inputs"), (kernel, "kernel")))
    _check_layer(batch, kernel, linear_op, num_groups, rule, compensation)
    slots = _check_state(state, batch, kernel, num_groups)
    check_momentum(momentum, state)
    window_size = check_window_size(window_size, slots + 1)
    if batch.updates:
        check_linear_op(linear_op, batch, inputs, kernel, num_groups)
    aux = _Aux(jnp.asarray(state["mean"]).astype(wide), jnp.asarray(state["var"]).astype(wide), batch.scale, batch.bias, None)
    if slots and not batch.evaluates:
        aux = aux._replace(slots=brought_to(state, kernel, compensation, window_size, rule))
    y, stats = batch.run(functools.partial(_map, epsilon), aux, aux.mean)
    if not batch.updates:
        return y, state
    running = {key: a for key, a in state.items() if key in ("mean", "var", "count", *ADDED)}
    new = moved(running, stats, momentum, running_var_correction)
    new = {**new, **with_iteration(state, batch, stats, inputs, kernel, linear_op, num_groups)}
    return y, cast(CrossIterationState, {key: new[key] for key in state})


def _check_layer(batch: Batch, kernel: jax.Array, linear_op: Any, num_groups: Any, rule: Any, compensation: Any) -> None:
    if not callable(linear_op):
        raise TypeError(f"linear_op must be a function of inputs and kernel, such as jnp.matmul, got {linear_op!r}.")
    if rule not in ("max", "drop"):
        raise ValueError(f'rule must be "max" or "drop", got {rule!r}.')
    check_scalar(compensation, "compensation")
    check_kernel_shape(kernel.shape, num_groups, "kernel")
    if batch.layout.feature_shape != kernel.shape[-1:]:
        raise ValueError(
            f"x of shape {batch.x.shape} has features {batch.layout.feature_shape} on feature_axes, but a kernel of shape {kernel.shape} "
            f"has {kernel.shape[-1]} outputs, in its last axis; they must be the same."
        )
    if batch.mask is not None and batch.mask.shape[batch.layout.features[0]] != 1 < kernel.shape[-1]:
        raise ValueError(
            f"mask of shape {batch.mask.shape} varies along the features of x, {batch.x.shape}; it must have size 1 there: all features "
            "of an iteration see the same inputs."
        )


def _check_state(state: Any, batch: Batch, kernel: jax.Array, num_groups: int) -> int:
    """How many slots there are."""
    keys = {"mean", "var", "index", *slot_shapes(kernel.shape, 0, num_groups, isinstance(state, dict) and "covariances" in state)}
    got = set(state) if isinstance(state, dict) else None
    if got is None or got - {"count", *ADDED} != keys:
        raise not_a_state(state, f"{sorted(keys)} and optionally 'count'", _MADE_BY)
    slots = check_slots(state, kernel.shape, num_groups, _MADE_BY)
    check_state({k: state[k] for k in ("mean", "var", "count", *ADDED) if k in got}, batch.layout.feature_shape, made_by=_MADE_BY)
    return slots
