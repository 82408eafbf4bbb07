"""Divisive normalization."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._jax_internals import whole_along, with_sharding_of
from .._kernels._forms import activate, counted, read, usable
from .._pipeline.arguments import Across, broadcast_mask, check_activation, check_affine, check_dtype, check_x
from .._pipeline.axes import Layout, canonical_axes
from .._pipeline.fields import Field, check_field, deviation, mean_square
from .._pipeline.moments import keepdims_moments
from .._pipeline.normalize import run
from .._stats import Stats, all_sum, inverse_sqrt, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Border, Mask


def divisive_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    sum_field: Sequence[int | None],
    suppression_field: Sequence[int | None] | None = None,
    sigma: float | jax.Array = 1.0,
    border: Border = "zero",
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Divisive normalization: each element by the mean, and the mean square, of a field around it, with a smoothing σ.

    .. math:: v = x - \mathbb E_{A}[x], \qquad
              y = \text{act}\left(\frac{v}{\sqrt{\sigma^2 + \mathbb E_{B}[v^2]}}\,\gamma + \beta\right), \qquad
              \ell_1 = \text{mean}\,|v|

    where A and B, the summation and the suppression field, are windows around the element on some axes and the whole of others. For x of
    shape `(N, H, W, C)`, `sum_field=(1, h, w, None)` is divisive normalization, `(1, None, None, None)` layer normalization, and
    `(None, None, None, 1)` batch normalization, without running statistics: for those :func:`divisive_batch_norm`.

    Args:
      x: floating, any shape.
      scale: gamma, of the shape of the feature axes; 1 where None.
      bias: beta, of the shape of the feature axes; 0 where None.
      sum_field: A, with an entry for each axis of x: the size of a window on that axis (1: the element itself), or None: the whole axis.
        The window of size s at i is [i - s//2, i + (s - 1)//2]; it may be larger than the axis.
      suppression_field: B; A where None.
      sigma: the smoothing, in x's units: a scalar, or of the shape of the feature axes; may be traced and is differentiated, its sign does
        not matter. 0 needs fields whose mean square is not 0.
      border: what a window sees beyond the ends of an axis. "zero": zeros, which count as the published code has it, so that means are
        smaller at the border. "renorm": nothing, so that means are over what there is.
      feature_axes: the axes along which scale, bias and sigma vary.
      mask: broadcasts against x; nonzero counts. What is not counted enters no mean and no divisor. It goes through the same formula (a
        non-finite value as a mean that is near).
      axis_name: named axis or axes over which the whole axes of the fields are split; for fields of 1 and None, A and B alike.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu", or any callable, applied after.
      dtype: y's dtype; x's where None.

    Returns:
      y of x's shape, and the mean of abs(v) over all that is counted, a scalar in at least float32: times a small λ it is what the
      paper adds to the loss. Its derivative at v = 0 is 0. Where it is not used it costs nothing under jit.
      Where a field of A counts nothing, v is 0, and y the activation of the bias.

    Raises:
      ValueError: fields, shapes, axes or names that do not fit; a sum field of 1s alone; an axis name with windows, or with fields that
        differ; a static sigma that is not finite.
      TypeError: x is not floating; fields or a sigma of another kind.

    Numerics:
      At least float32. Means are sums of differences from a value in the field, so that v is right for a mean 1e4 times the spread, also
      where each window has another mean; mean squares are of v itself. Up to some 1e18: beyond, squares and the sum of magnitudes
      overflow. The work of a window grows with the logarithm of its size, some dozen operations for each doubling, axis and field.
      Kept for the backward pass: x, and the mask.

    Distributed:
      Fields of 1 and None: as :func:`batch_norm`, one all-gather forward (two all-reduces above 64 participants) and one all-reduce
      backward, and where the second result is used once more as much, and one all-reduce of two numbers each way; that result is the
      same on all devices. Windows: nothing is merged over named axes; under jit over sharded arrays the compiler exchanges the borders,
      and on a mesh of explicit axes x is gathered along the axes of the fields.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x = jnp.array([[[1.0], [3.0], [5.0], [9.0]]])  # one sample, four positions, one channel
      >>> y, l1 = jnorm.divisive_norm(x, sum_field=(1, 3, None), border="renorm")
      >>> print(np.asarray(y).ravel().round(3), round(float(l1), 3))
      [-0.816  0.    -0.423  1.114] 0.917

    References:
      Ren, Liao, Urtasun, Sinz, Zemel, "Normalizing the Normalizers: Comparing and Extending Network Normalization Schemes", 2016,
      https://arxiv.org/abs/1611.04520. The published code (renmengye/div-norm) has borders as "zero", for even sizes the mirror image of
      these windows, and for images divides the sum over the suppression field by the size of the summation field. Local response
      normalization divides without subtracting a mean.
    """
    x = check_x(x)
    features = canonical_axes(feature_axes, x.ndim, "feature_axes")
    fields = _fields(sum_field, suppression_field, border, x.ndim)
    layout = Layout(x.shape, fields.sum.whole, features)
    across, mask = Across.of(axis_name, axis_index_groups), broadcast_mask(mask, x)
    scale, bias = (check_affine(v, name, layout, x) for v, name in ((scale, "scale"), (bias, "bias")))
    aux = _Aux(check_sigma(sigma, layout, x), scale, bias)
    options = {"activation": activation, "dtype": check_dtype(dtype, x)}
    if fields.are_whole:
        return _by_statistics(x, aux, mask, layout, across, **options)
    if across.names:
        raise ValueError(
            f"axis_name={axis_name!r} is for fields of 1 and None, the same for sum and suppression; got "
            f"sum_field={fields.sum.windows}, suppression_field={fields.suppression.windows}. "
            "Under jit over sharded arrays windows need no axis name."
        )
    return _by_windows(x, aux, mask, fields, layout, **options)


class _Fields(NamedTuple):
    sum: Field
    suppression: Field

    @property
    def are_whole(self) -> bool:
        """Whether v and its mean square are those of statistics over whole axes."""
        return self.sum == self.suppression and not self.sum.local


class _Aux(NamedTuple):
    """Sigma is a scalar or, as scale and bias are, of the shape of the feature axes."""

    sigma: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None

    def views(self, layout: Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All of x's rank, with 1 and 0 for what is not there."""
        one = jnp.ones([1] * layout.ndim, self.sigma.dtype)
        sigma = self.sigma * one if self.sigma.ndim == 0 else layout.feature_view(self.sigma)
        scale = one if self.scale is None else layout.feature_view(self.scale)
        return sigma, scale, 0 * one if self.bias is None else layout.feature_view(self.bias)


def _fields(sum_field: Any, suppression_field: Any, border: Any, ndim: int) -> _Fields:
    first = check_field(sum_field, border, ndim, "sum_field")
    if not (first.whole or first.local):
        raise ValueError(f"sum_field={sum_field!r} is each element by itself, whose mean it is; give an axis a window, or None.")
    return _Fields(first, first if suppression_field is None else check_field(suppression_field, border, ndim, "suppression_field"))


def check_sigma(sigma: Any, layout: Layout, x: jax.Array) -> jax.Array:
    """In the statistics' dtype."""
    if isinstance(sigma, int | float | np.number) and not np.isfinite(float(sigma)):
        raise ValueError(f"sigma must be finite, got {sigma}.")
    if sigma is None or isinstance(sigma, str):
        raise TypeError(f"sigma must be a number or an array, got {sigma!r}.")
    sigma = jnp.asarray(sigma)
    if sigma.ndim:
        return cast(jax.Array, check_affine(sigma, "sigma", layout, x))
    if not (jnp.issubdtype(sigma.dtype, jnp.floating) or jnp.issubdtype(sigma.dtype, jnp.integer)):
        raise TypeError(f"sigma must be real, got {sigma.dtype}.")
    return sigma.astype(stats_dtype(x.dtype))


# --- whole axes: a map of statistics ------------------------------------------------------------------------------------------


def _by_statistics(
    x: jax.Array, aux: _Aux, mask: jax.Array | None, layout: Layout, across: Across, *, activation: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    y, _ = run(x, functools.partial(_map, layout), aux, layout, across, mask=mask, activation=activation, dtype=dtype)
    return y, mean_magnitude(x, mask, layout, across)


def _map(layout: Layout, stats: Stats, aux: _Aux) -> tuple[jax.Array, ...]:
    sigma, scale, bias = aux.views(layout)
    count, var = (layout.expand(a) for a in (stats.count, stats.var))
    mul = jnp.where(count > 0, inverse_sqrt(var + sigma**2), 0)
    if set(layout.features) & set(layout.reduced):
        return stats.offset, mul, jnp.zeros_like(mul), scale, bias
    return stats.offset, mul * scale, bias


def mean_magnitude(
    x: jax.Array, mask: jax.Array | None, layout: Layout, across: Across, running_mean: jax.Array | None = None
) -> jax.Array:
    """The mean of abs(x - mean) over all that is counted, on all devices; the mean is that of x, or in evaluation the running one."""

    def both(x: jax.Array, mask: jax.Array | None, running_mean: jax.Array | None) -> jax.Array:
        if running_mean is None:
            _, center, offset, _ = keepdims_moments(x, mask, layout.reduced, across)
        else:
            center = layout.expand(running_mean)
            offset = jnp.zeros_like(center)
        return mean_of_magnitudes((usable(read(x), x, mask, center) - center) - offset, mask, across)

    # Checkpointed, so that neither x in another dtype nor its signs are kept.
    return jax.checkpoint(both)(x, mask, running_mean)


def mean_of_magnitudes(v: jax.Array, mask: jax.Array | None, across: Across) -> jax.Array:
    number = jnp.full((), v.size, v.dtype) if mask is None else jnp.broadcast_to(mask, v.shape).sum(dtype=v.dtype)
    v = counted(v, mask)
    # Not abs, whose slope at 0 is 1 in JAX.
    total, number = all_sum([(v * lax.stop_gradient(jnp.sign(v))).sum(), number], *across)
    return total / jnp.maximum(number, 1)


# --- windows ------------------------------------------------------------------------------------------------------------------


def _by_windows(
    x: jax.Array, aux: _Aux, mask: jax.Array | None, fields: _Fields, layout: Layout, *, activation: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    act = check_activation(activation)

    @jax.checkpoint
    def both(x: jax.Array, aux: _Aux, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        windows = {i for field in fields for i in (*field.whole, *field.local)}
        there = jax.typeof(x)
        x = whole_along(x, windows)
        mask = None if mask is None else whole_along(mask, windows)
        sigma, scale, bias = aux.views(layout)
        v = deviation(x, mask, fields.sum)
        y = v * inverse_sqrt(mean_square(v, mask, fields.suppression) + sigma**2) * scale + bias
        return with_sharding_of(activate(act, y).astype(dtype), there), mean_of_magnitudes(v, mask, Across())

    y, l1 = both(x, aux, mask)
    return (y if act or activation is None else activation(y)), l1
