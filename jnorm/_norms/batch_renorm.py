"""Batch renormalization."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._pipeline.arguments import check_epsilon, check_state_dtype
from .._pipeline.batch import Batch
from .._pipeline.normalize import affine
from .._pipeline.population import collected, collection, collects, with_collection
from .._pipeline.running import check_momentum, check_state, update
from .._pipeline.values import check_scalar
from .._stats import Stats, inverse_sqrt, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchRenormState, Limit, Mask, Momentum, RenormSchedules, Save
from .batch_norm import batch_norm_state


def batch_renorm_state(num_features: int | Sequence[int], *, track_count: bool = False, dtype: Any = jnp.float32) -> BatchRenormState:
    """Running statistics before any update: mean 0 and standard deviation 1.

    Args:
      num_features: size of the feature axis, or sizes of several in ascending order of the axes.
      track_count: add `"count"`, a scalar 0, for debiased and cumulative averages.
      dtype: of the mean and the standard deviation; the count has it too, but at least float32.

    Returns:
      `{"mean": zeros, "std": ones}` of shape `(num_features,)`, and with `track_count` also `"count"`.

    Raises:
      TypeError: dtype is not floating.

    Example:
      >>> import jnorm
      >>> {k: v.shape for k, v in jnorm.batch_renorm_state(64, track_count=True).items()}
      {'mean': (64,), 'std': (64,), 'count': ()}
    """
    check_state_dtype(dtype)
    made = batch_norm_state(num_features, track_count=track_count, dtype=dtype)
    state = BatchRenormState(mean=made["mean"], std=made["var"])
    if "count" in made:
        state["count"] = made["count"]
    return state


def renorm_schedules(
    *, begin: int = 5_000, r_end: int = 40_000, d_end: int = 25_000, r_max: float = 3.0, d_max: float = 5.0
) -> RenormSchedules:
    """The limits of :func:`batch_renorm` over a training: batch normalization first, then limits that widen linearly.

    Up to step `begin` r_max is 1 and d_max 0. The defaults are the paper's. Needs optax.

    Args:
      begin: the last step of batch normalization.
      r_end: the step at which r_max is reached.
      d_end: the step at which d_max is reached.
      r_max: the last value of r_max.
      d_max: the last value of d_max.

    Returns:
      `(r_max, d_max)`, two functions from the step, an int or a traced scalar, to the limit: schedules of optax.

    Raises:
      ValueError: an end that is not after a `begin` of at least 0; a limit that is not finite, r_max below 1 or d_max below 0.
      ModuleNotFoundError: optax is not installed.

    Example:
      >>> import jnorm
      >>> limits = jnorm.renorm_schedules()
      >>> [(float(limits.r_max(step)), float(limits.d_max(step))) for step in (0, 5_000, 22_500, 40_000)]
      [(1.0, 0.0), (1.0, 0.0), (2.0, 4.375), (3.0, 5.0)]

    References:
      Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017,
      https://arxiv.org/abs/1702.03275.
    """
    import optax  # not needed by `import jnorm`

    for name, end in (("r_end", r_end), ("d_end", d_end)):
        if not 0 <= begin < end:
            raise ValueError(f"{name} must come after begin, which is at least 0, got begin={begin} and {name}={end}.")
    for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not least <= limit < math.inf:
            raise ValueError(f"{name} must be at least {least} and finite, since it is reached step by step; got {limit}.")
    return RenormSchedules(
        optax.linear_schedule(1.0, r_max, r_end - begin, begin),
        optax.linear_schedule(0.0, d_max, d_end - begin, begin),
    )


class _Aux(NamedTuple):
    """What the map takes beside the statistics: arrays that broadcast against them, and the two limits."""

    mean: jax.Array
    std: jax.Array
    r_max: jax.Array
    d_max: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None


def _map(epsilon: float, stats: Stats, aux: _Aux) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x̂ = (x - mean_B) / s·r + d; running statistics where nothing is counted: always so in evaluation."""
    counted = stats.count > 0
    # Where nothing is counted, var + epsilon may be 0, and what is not chosen is differentiated too.
    rstd = inverse_sqrt(jnp.where(counted, stats.var + epsilon, 1))
    r = jnp.clip(1 / (rstd * aux.std), 1 / aux.r_max, aux.r_max)
    d = jnp.clip(((stats.center - aux.mean) + stats.offset) / aux.std, -aux.d_max, aux.d_max)
    r, d = lax.stop_gradient((r, d))
    shift = jnp.where(counted, stats.offset, aux.mean - stats.center)
    mul, bias = affine(jnp.where(counted, rstd * r, 1 / aux.std), aux.scale, aux.bias)
    moved, _ = affine(jnp.where(counted, d, 0), aux.scale)
    return shift, mul, moved + bias


def _check_limit(value: Any, name: str, least: int, dtype: Any) -> jax.Array:
    """A static limit that is too small is refused, a traced one clipped."""
    check_scalar(value, name)
    if isinstance(value, int | float | np.number) and not float(value) >= least:
        raise ValueError(f"{name} must be at least {least}, which is batch normalization, got {value}.")
    return jnp.maximum(jnp.asarray(value, dtype), least)


def batch_renorm(
    x: jax.Array,
    state: BatchRenormState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    r_max: Limit = 3.0,
    d_max: Limit = 5.0,
    use_running_average: bool = False,
    update_running: bool | None = None,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-3,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype: Any = None,
    save: Save = "input",
) -> tuple[jax.Array, BatchRenormState]:
    r"""Batch renormalization: batch normalization, moved towards what the running statistics give.

    .. math:: y &= \text{act}\left(\left(\frac{x - \mu_B}{\sigma_B}\,r + d\right)\gamma + \beta + \text{residual}\right),
                  \qquad \sigma_B = \sqrt{\sigma^2 + \epsilon} \\
              r &= \text{clip}(\sigma_B / \sigma_{\text{running}},\ 1 / r_{\max},\ r_{\max}), \qquad
              d = \text{clip}((\mu_B - \mu_{\text{running}}) / \sigma_{\text{running}},\ -d_{\max},\ d_{\max})

    with the mean and biased variance of the batch, the running statistics from before the update, and r and d as constants to the
    derivative. In evaluation :math:`x - \mu_{\text{running}}` is divided by :math:`\sigma_{\text{running}}`, which is what training gives
    where nothing is clipped.

    Args:
      x: `(..., C)`, or features on any axes; floating. All axes may be features, one example alone, in evaluation and where
        `axis_name` names the batch.
      state: from :func:`batch_renorm_state`; `"std"`, the standard deviation with epsilon in it, is positive.
      scale: gamma, real, `(C,)`; 1 where None.
      bias: beta, real, `(C,)`; 0 where None.
      r_max: the limit of r and 1/r, a float of at least 1 or a traced scalar (clipped to that). 1 with `d_max=0` is batch normalization;
        infinity: no limit. :func:`renorm_schedules` has the paper's over a training.
      d_max: the limit of abs(d), a float of at least 0 or a traced scalar (clipped to that).
      use_running_average: normalize with the running statistics (evaluation).
      update_running: whether the state moves; None: exactly when batch statistics normalize. Together with `use_running_average`, the
        statistics from before the update normalize.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]). None: the cumulative
        average, which needs `state["count"]`. Where the state has a count, the average is debiased: count ← momentum·count + 1,
        stat ← stat + (batch - stat) / count.
      epsilon: added to the batch's variance; the running standard deviation has it in it.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      mask: broadcasts against x; nonzero counts. What is not counted enters no statistic; it goes through the same map (a non-finite
        value as the mean).
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count. Not needed under jit over sharded
        arrays, where statistics are global.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      residual: of x's shape, added before the activation.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, and x told from it. The size of scale is then at least
        2⁻¹⁰, in y too. For y of x's dtype, no residual, and no activation, "leaky_relu" or a callable. What it costs in accuracy, for
        which see the guide on kernels, grows with d / r.

    Returns:
      y of x's shape, and the state: the same keys, shapes and dtypes. Where nothing updates it is the object that was given.

    Raises:
      ValueError: shapes, axes, names, groups, a static momentum, r_max or d_max that do not fit; no axis to reduce; `momentum=None`
        without a count; `save="output"` where x cannot be told from y.
      TypeError: x is not floating.

    Numerics:
      As :func:`batch_norm`. One counted value gives clip(d), and no gradient to x. A feature that counted nothing is normalized with the
      running statistics and leaves them alone.
      Kept for the backward pass: x, or with `save="output"` y, and the residual where a named activation follows it.

    Distributed:
      As :func:`batch_norm`: one packed all-gather up to 64 participants, two all-reduces above; one all-reduce of 2C numbers backward;
      none in evaluation. r and d come from the merged statistics, the same on every device.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x, state = jnp.array([[1.0], [3.0]]), jnorm.batch_renorm_state(1)  # running mean 0, standard deviation 1
      >>> for r_max, d_max in [(1.0, 0.0), (3.0, 1.0), (jnp.inf, jnp.inf)]:
      ...     y, new = jnorm.batch_renorm(x, state, r_max=r_max, d_max=d_max, momentum=0.5, epsilon=0.0)
      ...     print(np.asarray(y).ravel().round(3), new["mean"], new["std"])
      [-1.  1.] [1.] [1.]
      [0. 2.] [1.] [1.]
      [1. 3.] [1.] [1.]

    References:
      Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017,
      https://arxiv.org/abs/1702.03275. Keras's `renorm=True` keeps two sets of running statistics, one for r and d and one (of the
      variance) for evaluation, and limits nothing unless told, the lower bound of r apart from the upper. Chainer averages the unbiased
      variance with epsilon in it, and adds epsilon again before it takes the root.
    """
    batch = Batch.of(
        "batch_renorm", x, state, scale, bias, use_running_average=use_running_average, update_running=update_running,
        feature_axes=feature_axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, activation=activation,
        residual=residual, dtype=dtype, save=save,
    )  # fmt: skip
    epsilon, wide = check_epsilon(epsilon), stats_dtype(batch.x.dtype)
    check_state(state, batch.layout.feature_shape, keys=("mean", "std"), made_by="batch_renorm_state")
    check_momentum(momentum, state)
    mean, std = (jnp.asarray(state[key]).astype(wide) for key in ("mean", "std"))
    limits = _check_limit(r_max, "r_max", 1, wide), _check_limit(d_max, "d_max", 0, wide)
    y, stats = batch.run(functools.partial(_map, epsilon), _Aux(mean, std, *limits, batch.scale, batch.bias), mean)
    if not batch.updates:
        return y, state
    if collects(state):
        return y, _collected(state, stats, epsilon)
    new = {"mean": stats.mean, "std": jnp.sqrt(stats.var + epsilon)}
    return y, update(state, new, stats.count > 0, momentum)


def _collected(state: BatchRenormState, stats: Stats, epsilon: float) -> BatchRenormState:
    """What is collected is the variance."""
    entries = collection(state)
    std = jnp.asarray(entries.pop("std"))
    new = collected({**entries, "var": std.astype(stats.var.dtype) ** 2 - epsilon}, stats)
    std_of_all = jnp.sqrt(jnp.maximum(new.pop("var"), 0) + epsilon)
    return cast(BatchRenormState, with_collection(state, {**new, "std": std_of_all.astype(std.dtype)}))
