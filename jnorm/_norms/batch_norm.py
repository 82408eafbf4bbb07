"""Batch normalization."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._pipeline.arguments import check_epsilon
from .._pipeline.axes import Layout
from .._pipeline.batch import Batch
from .._pipeline.normalize import affine
from .._pipeline.running import check_momentum, check_state, moved
from .._pipeline.values import as_dtype, check_sizes
from .._stats import Stats, inverse_sqrt, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum, Save


def batch_norm_state(num_features: int | Sequence[int], *, track_count: bool = False, dtype: Any = jnp.float32) -> BatchNormState:
    """Running statistics before any update: mean 0 and variance 1.

    Args:
      num_features: size of the feature axis, or sizes of several in ascending order of the axes.
      track_count: add `"count"`, a scalar 0, for debiased and cumulative averages.
      dtype: the mean's; a complex one for complex x. The variance has its real counterpart, and the count too, but at least float32.

    Returns:
      `{"mean": zeros, "var": ones}` of shape `(num_features,)`, and with `track_count` also `"count"`.

    Raises:
      ValueError: a negative size.
      TypeError: sizes that are no ints; dtype is neither floating nor complex.

    Example:
      >>> import jnorm
      >>> {k: v.shape for k, v in jnorm.batch_norm_state(64, track_count=True).items()}
      {'mean': (64,), 'var': (64,), 'count': ()}
    """
    if not jnp.issubdtype(as_dtype(dtype), jnp.inexact):
        raise TypeError(f"dtype must be floating or complex, got {jnp.dtype(dtype)}.")
    sizes = (num_features,) if isinstance(num_features, int | np.integer) else num_features
    shape = check_sizes(sizes, "num_features", "an int, such as x.shape[-1], or a sequence of ints")
    mean = jnp.zeros(shape, dtype)
    state = BatchNormState(mean=mean, var=jnp.ones(shape, mean.real.dtype))
    if track_count:
        state["count"] = jnp.zeros((), stats_dtype(mean.real.dtype))
    return state


class BatchNormAux(NamedTuple):
    """What the map takes beside the statistics, each broadcastable against them."""

    mean: jax.Array
    var: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None


def batch_norm_map(epsilon: float, stats: Stats, aux: BatchNormAux) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch statistics where anything is counted, running ones elsewhere: always so in evaluation, whose statistics count nothing."""
    counted = stats.count > 0
    mul = inverse_sqrt(jnp.where(counted, stats.var, aux.var) + epsilon)
    shift = jnp.where(counted, stats.offset, aux.mean - stats.center)
    return shift, *affine(mul, aux.scale, aux.bias)


def _map_of_given(epsilon: float, stats: Stats, aux: tuple[Stats, BatchNormAux]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """batch_norm_map of the statistics that were given, seen from their center, which in `stats` is a constant to the derivative."""
    given, running = aux
    shift = (given.center - stats.center) + given.offset
    return batch_norm_map(epsilon, Stats(given.count, stats.center, shift, given.m2), running)


def _run_complex(batch: Batch, epsilon: float, aux: BatchNormAux) -> tuple[jax.Array, Stats]:
    """Complex x as real and imaginary parts in one more feature axis, last, over which m2 is added; scale and bias are real."""
    x, layout = batch.x, batch.layout
    pairs = BatchNormAux(
        _pair(aux.mean),
        aux.var[..., None],
        None if aux.scale is None else aux.scale[..., None],
        None if aux.bias is None else jnp.stack([aux.bias, jnp.zeros_like(aux.bias)], -1),
    )
    real = batch._replace(
        x=_pair(x),
        layout=Layout((*x.shape, 2), layout.reduced, (*layout.features, x.ndim)),
        mask=None if batch.mask is None else batch.mask[..., None],
        residual=None if batch.residual is None else _pair(batch.residual),
        activation=None,
        dtype=jnp.finfo(batch.dtype).dtype,
    )
    y, stats = real.run(functools.partial(_map_of_pairs, epsilon), pairs, pairs.mean)
    y = lax.complex(y[..., 0], y[..., 1])
    mean = lax.complex(stats.mean[..., 0], stats.mean[..., 1])
    merged = Stats(stats.count[..., 0], mean, jnp.zeros_like(mean), stats.m2.sum(-1))
    return (batch.activation(y) if callable(batch.activation) else y), merged


def _pair(z: jax.Array) -> jax.Array:
    return jnp.stack([z.real, z.imag], -1)


def _map_of_pairs(epsilon: float, stats: Stats, aux: BatchNormAux) -> tuple[jax.Array, jax.Array, jax.Array]:
    both = stats.m2.sum(-1, keepdims=True)
    return batch_norm_map(epsilon, stats._replace(m2=jnp.broadcast_to(both, stats.m2.shape)), aux)


def batch_norm(
    x: jax.Array,
    state: BatchNormState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
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
    statistics: Stats | None = None,
) -> tuple[jax.Array, BatchNormState]:
    r"""Batch normalization: each feature over the batch and all other axes.

    .. math:: y = \text{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma + \beta + \text{residual}\right)

    with the mean and biased variance of the batch, or the running ones.

    Args:
      x: `(..., C)`, or features on any axes; floating or complex. All axes may be features, one example alone, in evaluation and where
        `axis_name` names the batch.
      state: from :func:`batch_norm_state`; also a `batch_stats` entry of Flax as it is. Where it is frozen (`jnorm.tools.freeze`), that
        goes before the two switches below.
      scale: gamma, real, `(C,)`; 1 where None.
      bias: beta, real, `(C,)`; 0 where None.
      use_running_average: normalize with the running statistics (evaluation).
      update_running: whether the state moves; None: exactly when batch statistics normalize. Together with `use_running_average`, the
        statistics from before the update normalize.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]). None: the cumulative
        average, which needs `state["count"]`. Where the state has a count, the average is debiased: count ← momentum·count + 1,
        stat ← stat + (batch - stat) / count.
      epsilon: added to the variance.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      mask: broadcasts against x; nonzero counts. What is not counted enters no statistic; it goes through the same map (a non-finite
        value as the mean).
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count. Not needed under jit over sharded
        arrays, where statistics are global.
      axis_index_groups: groups of equal size within that axis.
      running_var_correction: the variance that enters the state is the biased one times n / max(n - correction, 1); 1 is PyTorch's.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after. Complex x takes callables only.
      residual: of x's shape, added before the activation.
      dtype: y's dtype; x's where None.
      save: "input", or "output": y instead of x is kept for the backward pass, and x told from it. What follows a norm mostly keeps y
        anyway, so that this halves what a deep network keeps. The size of scale is then at least 2⁻¹⁰, in y too. For real x, y of its
        dtype, no residual, and no activation, "leaky_relu" or a callable.
        See the guide on kernels for what it costs in accuracy.
      statistics: normalize with these, of a larger batch that x is a part of, in place of those of x, which are not taken; from
        :func:`moments`, :func:`combine` or :func:`accumulated_moments`, of the shape of the features. Differentiable, so that the chain
        rule through them is exact. They are merged over devices already: no axis name merges them, and no mask changes them. Where the
        state moves, it is by them. For real x.

    Returns:
      y of x's shape, and the state: the same keys, shapes and dtypes. Where nothing updates it is the object that was given.

    Raises:
      ValueError: shapes, axes, names, groups or a static momentum that do not fit; no axis to reduce; `momentum=None` without a count;
        `save="output"` where x cannot be told from y; statistics of another shape, or together with `use_running_average=True`.
      TypeError: x is not floating or complex; complex x with a real state, or with statistics.

    Numerics:
      Statistics in at least float32 from x as given; stable for a mean 1e4 times the spread; right as long as the sum of squared
      deviations is in range (some 1e19 / √count from the mean; gradients some 1e16), and finite up to 1e38 / count.
      A feature that counted nothing is normalized with the running statistics and leaves them alone. One counted value gives the bias.
      Complex x: var = E|x - mean|², real.
      Kept for the backward pass: x, or with `save="output"` y, and the residual where a named activation follows it.

    Distributed:
      One packed all-gather of count, mean (two floats) and m2 up to 64 participants, two all-reduces above; one all-reduce of 2C numbers
      backward; none in evaluation, or where `statistics` are given. Shards may be uneven, masked or empty. With `check_vma=True` JAX sums
      the gradients of scale, bias and given statistics; elsewhere they are local and the caller sums them (those of statistics need
      nothing: the function that merged them does).

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0], [7.0, 14.0]])
      >>> y, state = jnorm.batch_norm(x, jnorm.batch_norm_state(2), momentum=0.5)
      >>> print(np.asarray(y[:, 0]).round(3), state["mean"])
      [-1.342 -0.447  0.447  1.342] [2. 4.]
      >>> y, same = jnorm.batch_norm(x, state, use_running_average=True)
      >>> same is state
      True

    References:
      Ioffe, Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167. Defaults and state are Flax's. PyTorch's momentum is
      1 - momentum, and its running variance the unbiased one (`running_var_correction=1`); Keras's epsilon is 1e-3.
    """
    batch = Batch.of(
        "batch_norm", x, state, scale, bias, use_running_average=use_running_average, update_running=update_running,
        feature_axes=feature_axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, activation=activation,
        residual=residual, dtype=dtype, save=save, allow_complex=True, statistics=statistics,
    )  # fmt: skip
    is_complex, epsilon = jnp.iscomplexobj(batch.x), check_epsilon(epsilon)
    check_state(state, batch.layout.feature_shape, is_complex)
    check_momentum(momentum, state)
    wide = stats_dtype(batch.x.dtype)
    mean, var = jnp.asarray(state["mean"]).astype(wide), jnp.asarray(state["var"]).astype(jnp.finfo(wide).dtype)
    aux = BatchNormAux(mean, var, batch.scale, batch.bias)
    if is_complex:
        y, stats = _run_complex(batch, epsilon, aux)
    elif batch.given is not None and not batch.evaluates:
        y, stats = batch.run(functools.partial(_map_of_given, epsilon), (batch.given, aux), mean)
    else:
        y, stats = batch.run(functools.partial(batch_norm_map, epsilon), aux, mean)
    if not batch.updates:
        return y, state
    return y, moved(state, stats, momentum, running_var_correction)
