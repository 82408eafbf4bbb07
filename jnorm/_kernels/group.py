"""Group and instance norms where nothing is merged over named devices: statistics, map and application fused, one op each way.

    center, offset, rstd   of a set: the positions of a sample and, with `channel_axes`, the channels of a group; repeated for each channel
    xc = (x - center) - offset
    y  = act(xc·rstd·scale + bias)

With g = act'·dy, S the sum over a channel's positions, T the sum over the channels of a group, and n the counted elements of a set,
the derivative and its transpose are

    group_tangent(dx, ds, db) -> act'·(rstd·scale·dx + p + q·xc)    p = db - scale·rstd·T(S dx)/n     q = ds·rstd - scale·rstd³·T(S dx·xc)/n
    group_cotangent(dy)       -> rstd·scale·g + a + b·xc, Σ g·xc·rstd, Σ g
                                                     a = -rstd·T(scale·S g)/n     b = -rstd³·T(scale·S g·xc)/n

where the sums of dx take counted elements only, and only counted elements receive a + b·xc. With `output`, the derivative and its transpose
are given y in place of x.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._stats import Stats, all_concatenate, combine, inverse_sqrt, isolate
from . import _native
from ._forms import count, counted, read, reciprocal, sums, times_slope
from ._op import Op, Spans, adjoint, native_or
from .column import Operands, apply_form, cotangent_apply_form, cotangent_sums_form, moments_form


class _Groups(NamedTuple):
    """Which channels share their statistics: `size` contiguous ones, whose arrays the devices of `names` hold parts of."""

    axes: tuple[int, ...]
    size: int
    names: tuple

    @classmethod
    def of(cls, x: jax.Array, channel_axes: tuple[int, ...], group_size: int, spans: Spans) -> "_Groups":
        # Groups that lie whole on their device need nothing of the others.
        divided = any(x.shape[i] % group_size for i in channel_axes)
        return cls(channel_axes, group_size, spans(channel_axes) if divided else ())

    def merged(self, merge: Callable, values: Sequence[jax.Array]) -> list[jax.Array]:
        """`merge(values, axis)` over the channels of each group, repeated for each. Values are by sample and channel."""
        if not self.axes:
            return list(values)
        (axis,) = self.axes
        own = values[0].shape[axis]

        def split(v: jax.Array) -> jax.Array:
            return v.reshape(*v.shape[:axis], v.shape[axis] // self.size, self.size, *v.shape[axis + 1 :])

        def repeated(v: jax.Array) -> jax.Array:
            v = jnp.repeat(v, self.size, axis)
            return lax.dynamic_slice_in_dim(v, lax.axis_index(self.names) * own, own, axis) if self.names else v

        return [repeated(v) for v in merge([split(v) for v in all_concatenate(values, self.names, axis)], axis + 1)]

    def combined(self, stats: Stats) -> Stats:
        return Stats(*self.merged(lambda members, axis: combine(Stats(*members), axis), stats))

    def summed(self, *values: jax.Array) -> list[jax.Array]:
        return self.merged(lambda members, axis: [v.sum(axis) for v in members], values)


class _Group(NamedTuple):
    """A group norm's operands."""

    x: jax.Array
    center: jax.Array
    offset: jax.Array
    rstd: jax.Array
    scale: jax.Array
    bias: jax.Array
    mask: jax.Array | None

    @classmethod
    def of(cls, args: Sequence[jax.Array]) -> "_Group":
        x, center, offset, rstd, scale, bias, *mask = args
        return cls(x, center, offset, rstd, scale, bias, mask[0] if mask else None)

    def as_column(self, output: bool = False) -> tuple[list[jax.Array], dict[str, Any]]:
        """Operands and parameters of column.py's forms."""
        mul = self.rstd * self.scale
        inverse = reciprocal(mul) if output else None
        o = Operands(self.x, self.center, self.offset, self.offset, mul, self.bias, mask=self.mask, inverse=inverse)
        return o.present(), {"operands": o.params()["operands"]}


def group_norm_form(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *mask: jax.Array, axes: tuple, channel_axes: tuple, group_size: int, epsilon: float,
    act: str | None, dtype: Any, spans: Spans, moments: Callable = moments_form, apply: Callable = apply_form, **_: Any,
) -> list[jax.Array]:  # fmt: skip
    stats = Stats(*moments(x, *mask, axes=axes, spans=spans))
    stats = _Groups.of(x, channel_axes, group_size, spans).combined(stats)
    total = stats.var + epsilon
    # Nothing counted, or nothing to divide by: the bias.
    nothing = (stats.count == 0) | (total == 0)
    rstd = jnp.where(nothing, 0, inverse_sqrt(jnp.where(nothing, 1, total)))
    operands, params = _Group.of((x, stats.center, stats.offset, rstd, scale, bias, *mask)).as_column()
    y = apply(*operands, act=act, dtype=dtype, spans=spans, **params)
    return [*y, stats.center, stats.offset, rstd]


def group_tangent_form(
    dx: jax.Array, ds: jax.Array, db: jax.Array, *args: jax.Array, axes: tuple, channel_axes: tuple, group_size: int, act: str | None,
    output: bool, dtype: Any, spans: Spans, **_: Any,
) -> list[jax.Array]:  # fmt: skip
    group = _Group.of(args)
    operands, params = group.as_column(output)
    o, dx = Operands.of(operands, act=act, **params), read(dx)
    moving = counted(dx, group.mask)
    elements = count(group.x, group.mask, axes, spans)
    local = sums([moving, moving * o.centered()], axes, spans)
    n, first, second = _Groups.of(group.x, channel_axes, group_size, spans).summed(elements, *local)
    n, rstd, scale = jnp.maximum(n, 1), group.rstd, group.scale
    # A factor at a time: the powers of rstd alone may be out of range.
    p = db - scale * (rstd * (first / n))
    q = ds * rstd - scale * (rstd * (rstd * (rstd * (second / n))))
    v = o.usable(dx * o.mul) + (isolate(p) + isolate(q) * o.centered())
    return [times_slope(act, o.z, v).astype(dtype)]


def group_cotangent_form(
    dy: jax.Array, *args: jax.Array, axes: tuple, channel_axes: tuple, group_size: int, scale_axes: tuple, act: str | None, output: bool,
    spans: Spans, cotangent_sums: Callable = cotangent_sums_form, cotangent_apply: Callable = cotangent_apply_form, **_: Any,
) -> list[jax.Array]:  # fmt: skip
    group = _Group.of(args)
    operands, params = group.as_column(output)
    params |= {"act": act, "spans": spans}
    first, second = cotangent_sums(dy, *operands, map_axes=axes, scale_axes=(), **params)
    # Times rstd at once: what follows is of the size of dy, whatever x's is.
    second = second * group.rstd
    elements = count(group.x, group.mask, axes, spans)
    groups = _Groups.of(group.x, channel_axes, group_size, spans)
    n, s1, s2 = groups.summed(elements, group.scale * first, group.scale * second)
    n, rstd = jnp.maximum(n, 1), group.rstd
    a, b = -rstd * (s1 / n), -rstd * (rstd * (s2 / n))
    dx = cotangent_apply(dy, a, b, *operands, **params)
    return [*dx, *sums([second, first], [i for i in scale_axes if i not in axes], spans)]


# What one kernel does not have is taken by those of column.py.
_norm_by_columns = functools.partial(
    group_norm_form, moments=native_or(moments_form, _native.moments), apply=native_or(apply_form, _native.apply)
)
_cotangent_by_columns = functools.partial(
    group_cotangent_form,
    cotangent_sums=native_or(cotangent_sums_form, _native.cotangent_sums),
    cotangent_apply=native_or(cotangent_apply_form, _native.cotangent_apply),
)

group_norm = Op("group_norm", group_norm_form, native=native_or(_norm_by_columns, _native.group_norm))
group_tangent = Op("group_tangent", group_tangent_form, lambda **_: 3)
group_cotangent = Op(
    "group_cotangent", group_cotangent_form, lambda **_: 1, native=native_or(_cotangent_by_columns, _native.group_cotangent)
)
adjoint(group_tangent, group_cotangent)
