"""Row norms where nothing is merged over named devices: statistics, map and application fused, one op each way.

    xhat = ((power·x - center) - offset)·rstd          center = offset = 0 for the root mean square
    y    = act(xhat·scale + bias)

`power` is 1, or a power of two that keeps the squares of a huge row in range; center, offset and rstd belong to power·x. With
g = act'·dy·scale, and sums along the row, the derivative and its transpose are

    row_tangent(dx, ds, db) -> act'·(scale·rstd·power·(dx - Σdx/n - xhat·Σ(dx·xhat)/n) + ds·xhat + db)
    row_cotangent(dy)       -> rstd·power·(g - Σg/n - xhat·Σ(g·xhat)/n), Σ act'·dy·xhat, Σ act'·dy

where the sums of dx take counted elements only, and only counted elements receive those of g.

With `output`, both are given y in place of x: xhat = (act⁻¹(y) - bias) / scale.

With `adds`, what is normalized is h = x + residual, rounded to the wider dtype of the two, which comes out beside y. It stands for x in the
derivative, where the tangent of h passes through the ops, so that its cotangent is added to what comes from y in the same pass:

    row_norm(x, residual, ...)       -> y, h, power, center, offset, rstd
    row_tangent(dh, ds, db; h, ...)  -> dy as above, dh
    row_cotangent(dy, ch; h, ...)    -> ch + what dx is above, and the sums as above
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._stats import Stats, all_concatenate, all_sum, combine, gathers, isolate, two_sum
from . import _native
from ._forms import (
    DOWN,
    activate,
    apart,
    count,
    counted,
    first_center,
    inverted,
    local_sum,
    mean,
    read,
    reciprocal,
    sums,
    times_slope,
    usable,
    wider_dtype,
)
from ._op import Op, Spans, adjoint, one_device

# A row that deviates by more than a limit is multiplied by the power beside it, the last that applies: its squares are then in range, and
# not so small that they vanish.
_POWERS = {
    "float32": ((2.0**40, 2.0**-60), (2.0**80, 2.0**-100)),
    "float64": ((2.0**300, 2.0**-500), (2.0**700, 2.0**-860)),
}


class RowStats(NamedTuple):
    power: jax.Array
    center: jax.Array
    offset: jax.Array
    rstd: jax.Array


def _stats(x: jax.Array, mask: jax.Array | None, power: jax.Array, axes: Sequence[int], centered: bool, spans: Spans) -> tuple:
    """Center, offset and mean square deviation of power·x along the row."""
    n = count(x, mask, axes, spans)
    center = offset = jnp.zeros(n.shape, n.dtype)
    if centered:
        v = read(x) * power
        first = first_center(v, mask, n, axes, spans)
        center, offset = two_sum(first, mean(counted(v - first, mask), n, axes, spans))
    row = _Row(x, RowStats(jnp.broadcast_to(power, n.shape), center, offset, n), n, n, mask, centered).apart(1)
    deviation = counted(row.deviation(), row.mask)
    square = all_sum([local_sum(deviation * deviation, axes, 1)], spans(axes))[0]
    return center, offset, square / jnp.maximum(n, 1)


def _power(x: jax.Array, mask: jax.Array | None, axes: Sequence[int], centered: bool, spans: Spans) -> jax.Array:
    """1, or the power of two that brings the row's deviations to a scale whose squares are in range."""
    v = read(x) * DOWN
    if centered:
        v = v - first_center(v, mask, count(x, mask, axes, spans), axes, spans)
    powers = _POWERS[v.dtype.name]
    beyond = sums([counted((jnp.abs(v) > limit * DOWN).astype(v.dtype), mask) for limit, _ in powers], axes, spans)
    power = jnp.ones_like(beyond[0])
    for (_, factor), number in zip(powers, beyond, strict=True):
        power = jnp.where(number > 0, factor, power)
    return power


def added(x: jax.Array, residual: jax.Array) -> jax.Array:
    """x + residual in the wider dtype of the two."""
    dtype = wider_dtype(x, residual)
    # The barrier has the compiler round the sum before it is normalized, and write it once instead of adding for every read of it.
    return lax.optimization_barrier(x.astype(dtype) + residual.astype(dtype))


def row_norm_form(
    x: jax.Array, *args: jax.Array, axes: tuple, epsilon: float, centered: bool, adds: bool, act: str | None, dtype: Any, branch: bool,
    spans: Spans, **_: Any,
) -> list[jax.Array]:  # fmt: skip
    if adds:
        x, args = added(x, args[0]), args[1:]
    scale, bias, *mask = args
    m = mask[0] if mask else None
    if spans(axes) and gathers([count(x, m, axes, one_device)] * 5, spans(axes)):
        n, stats = _merged_stats(x, m, axes, centered, spans(axes))
    else:
        n = count(x, m, axes, spans)
        stats = (_branching_stats if branch and not spans(axes) else _scaled_stats)(x, m, axes, centered, spans)
    power, center, offset, square = stats
    total = square + epsilon * power * power
    # Nothing counted, or no deviation in a row so large that epsilon vanishes beside it: the bias.
    nothing = (n == 0) | (total == 0)
    rstd = jnp.where(nothing, 0, lax.rsqrt(jnp.where(nothing, 1, total)))
    kept = RowStats(power, center, offset, rstd)
    y = activate(act, _Row(x, kept, scale, bias, m, centered).z()).astype(dtype)
    return [y, *([x] if adds else []), *kept]


def _scaled_stats(x: jax.Array, mask: jax.Array | None, axes: Sequence[int], centered: bool, spans: Spans) -> tuple:
    power = _power(x, mask, axes, centered, spans)
    return power, *_stats(x, mask, power, axes, centered, spans)


def _merged_stats(x: jax.Array, mask: jax.Array | None, axes: Sequence[int], centered: bool, names: tuple) -> tuple[jax.Array, tuple]:
    """Count and statistics of rows that several devices have parts of, each of which sends its own: one all-gather.

    The power is the least of theirs, or less where it is the devices' means that are far apart.
    """
    own = count(x, mask, axes, one_device), *_scaled_stats(x, mask, axes, centered, one_device)
    n, power, center, offset, square = all_concatenate([a[None] for a in own], names, 0)
    means = center * DOWN / power
    near = (n / jnp.maximum(n.sum(0, keepdims=True), 1) * means).sum(0, keepdims=True)
    far = jnp.where(n > 0, jnp.abs(means - near), 0).max(0, keepdims=True)
    least = jnp.where(n > 0, power, 1).min(0, keepdims=True)
    for limit, factor in _POWERS[far.dtype.name]:
        least = jnp.where(far > limit * DOWN, jnp.minimum(least, factor), least)
    less = least / power
    stats = combine(Stats(n, center * less, offset * less, n * square * less * less), 0)
    return stats.count, (least[0], stats.center, stats.offset, stats.var)


def _branching_stats(x: jax.Array, mask: jax.Array | None, axes: Sequence[int], centered: bool, spans: Spans) -> tuple:
    """Powers are looked for only where a square has overflowed: on a CPU that saves one read of x in nearly every call."""
    center, offset, square = _stats(x, mask, jnp.ones((), read(x).dtype), axes, centered, spans)

    def rescaled() -> tuple:
        return _scaled_stats(x, mask, axes, centered, spans)

    return lax.cond(jnp.isfinite(square).all(), lambda: (jnp.ones_like(square), center, offset, square), rescaled)


class _Row(NamedTuple):
    """A row norm's operands."""

    x: jax.Array
    stats: RowStats
    scale: jax.Array
    bias: jax.Array
    mask: jax.Array | None
    centered: bool
    told: Callable[[jax.Array], jax.Array] | None = None
    """With `output`, x is y, and this gives z of it. The statistics are those of xhat, of which nothing more is to be subtracted."""

    @classmethod
    def of(cls, args: Sequence[jax.Array], centered: bool, output: bool, act: str | None) -> "_Row":
        x, power, center, offset, rstd, scale, bias, *mask = args
        row = cls(x, RowStats(*map(isolate, (power, center, offset, rstd))), scale, bias, mask[0] if mask else None, centered)
        if not output:
            return row
        one = jnp.ones_like(row.stats.rstd)
        return row._replace(stats=RowStats(one, 0 * one, 0 * one, one), told=functools.partial(inverted, act))

    def apart(self, k: int) -> "_Row":
        static = {"centered": self.centered, "told": self.told}
        return jax.tree.map(lambda a: apart(a, k), self._replace(**dict.fromkeys(static)))._replace(**static)

    def usable(self, v: jax.Array) -> jax.Array:
        """v, 0 where x is read as the mean."""
        return usable(v, self.x, self.mask)

    def deviation(self) -> jax.Array:
        """power·x minus its mean; of y, xhat."""
        if self.told is not None:
            return self.usable((self.told(read(self.x)) - self.bias) * reciprocal(self.scale))
        v = read(self.x) * self.stats.power
        return self.usable((v - self.stats.center) - self.stats.offset if self.centered else v)

    def xhat(self) -> jax.Array:
        return self.deviation() * self.stats.rstd

    def z(self) -> jax.Array:
        return self.xhat() * self.scale + self.bias if self.told is None else self.told(read(self.x))


def row_tangent_form(
    dx: jax.Array,
    ds: jax.Array,
    db: jax.Array,
    *args: jax.Array,
    axes: tuple,
    centered: bool,
    adds: bool,
    output: bool,
    act: str | None,
    dtype: Any,
    spans: Spans,
    **_: Any,
) -> list[jax.Array]:
    row = _Row.of(args, centered, output, act)
    # The factor first: dx of a huge row is huge too.
    v = read(dx) * _factor(args)
    first, second = sums([counted(v, row.mask), counted(v, row.mask) * row.deviation()], axes, spans)
    n = jnp.maximum(count(row.x, row.mask, axes, spans), 1)
    dxhat = row.usable(v) - row.xhat() * isolate(second * row.stats.rstd / n)
    if centered:
        dxhat = dxhat - isolate(first / n)
    dy = times_slope(act, row.z, dxhat * row.scale + ds * row.xhat() + db).astype(dtype)
    return [dy, dx] if adds else [dy]


def row_cotangent_form(
    dy: jax.Array, *args: jax.Array, axes: tuple, scale_axes: tuple, centered: bool, adds: bool, output: bool, act: str | None,
    spans: Spans, **_: Any,
) -> list[jax.Array]:  # fmt: skip
    passed, args = (args[0], args[1:]) if adds else (None, args)
    row = _Row.of(args, centered, output, act)

    def g(k: int) -> tuple[_Row, jax.Array]:
        seen = row.apart(k)
        return seen, times_slope(act, seen.z, read(apart(dy, k)))

    def along_row() -> list[jax.Array]:
        (one, g1), (two, g2) = g(1), g(2)
        return all_sum([local_sum(g1 * one.scale, axes, 1), local_sum(g2 * two.scale * two.deviation(), axes, 2)], spans(axes))

    def along_scale() -> list[jax.Array]:
        three, g3 = g(3)
        return all_sum([local_sum(g3 * three.xhat(), scale_axes, 3), local_sum(g(0)[1], scale_axes)], spans(scale_axes))

    first, second = along_row()
    n = jnp.maximum(count(row.x, row.mask, axes, spans), 1)
    back = row.xhat() * isolate(second * row.stats.rstd / n)
    if centered:
        back = back + isolate(first / n)
    dx = (row.usable(g(0)[1] * row.scale) - counted(back, row.mask)) * _factor(args)
    if passed is not None:
        dx = dx + read(passed)
    return [dx.astype(args[0].dtype), *along_scale()]


def _factor(args: Sequence[jax.Array]) -> jax.Array:
    """The derivative of xhat to x alone: rstd·power."""
    return isolate(args[4]) * isolate(args[1])


row_norm = Op(
    "row_norm",
    functools.partial(row_norm_form, branch=False),
    cpu_form=functools.partial(row_norm_form, branch=True),
    native=_native.row_norm,
)
row_tangent = Op("row_tangent", row_tangent_form, lambda **_: 3)
row_cotangent = Op("row_cotangent", row_cotangent_form, lambda adds, **_: 2 if adds else 1, native=_native.row_cotangent)
adjoint(row_tangent, row_cotangent)
