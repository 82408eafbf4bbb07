"""Ops of the one unit, over statistics of any axes of x.

    center, offset, count, m2   constant along `axes`, over which the statistics are taken
    shift, mul, add             the map of a norm, constant along `map_axes`
    scale, bias                 where they vary along reduced axes (rows over named devices), constant along `scale_axes`
    xc = (x - center) - offset
    z  = (((x - center) - shift)·mul + add)·scale + bias + residual          y = act(z)

With g = act'(z)·dy, the linear ops and their transposes are

    fork(dx, dr)          -> act'·(mul·scale·dx + dr), Σdx, Σdx·xc               cotangent_apply(dy, a, b)  -> mul·scale·g + a + b·xc, g
    spread(p, q, ds, db)  -> act'·((p + q·xc)·scale + ds·(z's inner part) + db)  cotangent_sums(dy)         -> Σg·scale, Σg·scale·xc, ds, db

Sums that belong to statistics, and a + b·xc, take counted elements only. Every op recomputes act' from x, which is all that is kept.
With `inverse`, which is 1 / mul, y is kept in place of x, and stands there: x - center = (act⁻¹(y) - add)·inverse + shift.
Column statistics (batch, group, instance norms) have no scale and bias here: they are in mul and add. Rows have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from .._stats import Stats, all_combine, finite, isolate, two_sum
from . import _native
from ._forms import activate, constant_axes, count, counted, first_center, inverted, mean, read, sums, times_slope, usable
from ._op import Op, Spans, adjoint, one_device


class Operands(NamedTuple):
    """The operands that all ops but `moments` share, in order; the last five where the parameters say so."""

    x: jax.Array
    center: jax.Array
    offset: jax.Array
    shift: jax.Array
    mul: jax.Array
    add: jax.Array
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    residual: jax.Array | None = None
    mask: jax.Array | None = None
    inverse: jax.Array | None = None

    def present(self) -> list[jax.Array]:
        return [v for v in self if v is not None]

    def params(self) -> dict[str, Any]:
        """Static parameters: which operands there are, and along which axes they are constant."""
        has = tuple(f for f, v in zip(self._fields, self, strict=True) if v is not None)
        along = {"axes": self.center, "map_axes": self.mul, "scale_axes": self.scale}
        return {"operands": has} | {k: constant_axes(v, self.x) for k, v in along.items()}

    @classmethod
    def of(cls, values: Sequence[jax.Array], operands: tuple[str, ...], act: str | None) -> "Operands":
        """With `inverse`, x is act⁻¹(y)."""
        named = dict(zip(operands, values, strict=True))
        small = ("center", "offset", "shift", "mul", "add", "inverse")
        o = cls(**{k: isolate(v) if k in small else v for k, v in named.items()})
        return o if o.inverse is None else o._replace(x=inverted(act, read(o.x)))

    def usable(self, v: jax.Array, otherwise: jax.Array | int = 0) -> jax.Array:
        return usable(v, self.x, self.mask, otherwise)

    def centered(self) -> jax.Array:
        """xc, 0 where x is read as the mean."""
        if self.inverse is not None:
            return self.usable((self.x - self.add) * self.inverse + (self.shift - self.offset))
        return self.usable((read(self.x) - self.center) - self.offset)

    def mapped(self) -> jax.Array:
        if self.inverse is not None:
            return self.x
        shifted = self.usable((read(self.x) - self.center) - self.shift, self.offset - self.shift)
        return shifted * self.mul + self.add

    def z(self) -> jax.Array:
        z = self.scaled(self.mapped())
        if self.bias is not None:
            z = z + self.bias
        return z if self.residual is None else z + read(self.residual)

    def scaled(self, v: jax.Array) -> jax.Array:
        return v if self.scale is None else v * self.scale


def moments_form(x: jax.Array, *mask: jax.Array, axes: Sequence[int], spans: Spans) -> list[jax.Array]:
    """Two reductions with the accuracy of three: the mean's remainder is carried into the deviations."""
    m = mask[0] if mask else None
    n = count(x, m, axes, one_device)
    first = first_center(read(x), m, n, axes, one_device)
    center, offset = two_sum(first, mean(counted(read(x) - first, m), n, axes, one_device))
    center, offset = isolate(center), isolate(offset)
    deviation = counted((read(x) - center) - offset, m)
    m2 = finite(sums([deviation * deviation], axes, one_device)[0])
    return list(all_combine(Stats(n, center, offset, m2), spans(axes), partitioned=True))


def apply_form(*args: jax.Array, act: str | None, dtype: Any, operands: tuple, spans: Spans, **_: Any) -> list[jax.Array]:
    return [activate(act, Operands.of(args, operands, act).z()).astype(dtype)]


def fork_form(*args: jax.Array, act: str | None, dtype: Any, operands: tuple, axes: tuple, spans: Spans, **_: Any) -> list[jax.Array]:
    n = _linear_of_fork(operands)
    dx, o = read(args[0]), Operands.of(args[n:], operands, act)
    through = o.usable(o.scaled(dx * o.mul))
    if o.residual is not None:
        through = through + read(args[1])
    dx = counted(dx, o.mask)
    return [times_slope(act, o.z, through).astype(dtype), *sums([dx, dx * o.centered()], axes, spans)]


def cotangent_apply_form(*args: jax.Array, act: str | None, operands: tuple, spans: Spans, **_: Any) -> list[jax.Array]:
    dy, a, b, o = read(args[0]), isolate(args[1]), isolate(args[2]), Operands.of(args[3:], operands, act)
    g = times_slope(act, o.z, dy)
    dx = o.usable(o.scaled(g * o.mul)) + counted(a + b * o.centered(), o.mask)
    return [dx.astype(args[3].dtype)] + ([] if o.residual is None else [g.astype(o.residual.dtype)])


def spread_form(*args: jax.Array, act: str | None, dtype: Any, operands: tuple, spans: Spans, **_: Any) -> list[jax.Array]:
    n = _linear_of_spread(operands)
    linear, o = args[:n], Operands.of(args[n:], operands, act)
    v = o.scaled(isolate(linear[0]) + isolate(linear[1]) * o.centered())
    if o.scale is not None:
        v = v + linear[2] * o.mapped() + linear[3]
    return [times_slope(act, o.z, v).astype(dtype)]


def cotangent_sums_form(
    dy: jax.Array, *args: jax.Array, act: str | None, operands: tuple, map_axes: tuple, scale_axes: tuple, spans: Spans, **_: Any
) -> list[jax.Array]:
    o = Operands.of(args, operands, act)
    g = times_slope(act, o.z, read(dy))
    out = sums([o.scaled(g), o.scaled(g) * o.centered()], map_axes, spans)
    return out if o.scale is None else out + sums([g * o.mapped(), g], scale_axes, spans)


def _linear_of_fork(operands: tuple, **_: Any) -> int:
    return 2 if "residual" in operands else 1


def _linear_of_spread(operands: tuple, **_: Any) -> int:
    return 4 if "scale" in operands else 2


moments = Op("moments", moments_form, native=_native.moments)
apply = Op("apply", apply_form, native=_native.apply)
fork, spread = Op("fork", fork_form, _linear_of_fork), Op("spread", spread_form, _linear_of_spread)
cotangent_apply = Op("cotangent_apply", cotangent_apply_form, lambda **_: 3, native=_native.cotangent_apply)
cotangent_sums = Op("cotangent_sums", cotangent_sums_form, lambda **_: 1, native=_native.cotangent_sums)
adjoint(fork, cotangent_apply)
adjoint(spread, cotangent_sums)

__all__ = ["Operands", "apply", "cotangent_apply", "cotangent_sums", "fork", "moments", "spread"]
