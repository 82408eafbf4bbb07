"""The ops as calls of the native kernels. Each has its XLA form's arguments and results; None where the kernels do not have the case."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._stats import Stats, all_combine, all_sum, combine, stats_dtype
from ._canonical import Columns, Rows
from ._forms import wider_dtype
from ._op import Spans

_ACTS = (None, "relu", "leaky_relu", "silu", "gelu")
_DTYPES = ("float32", "float64", "bfloat16", "float16")
# Shorter rows are faster in XLA's code, which takes several of them at once.
_SHORTEST_ROW = 8
# A row is one thread's: few long ones are faster in XLA's code, which divides them.
_LONG_ROW, _FEWEST_LONG_ROWS = 1 << 16, 8


def _fits(*dtypes: Any) -> bool:
    """Whether the kernels compute with these: the storage types of one type of arithmetic."""
    names = [jnp.dtype(d).name for d in dtypes]
    return all(n in _DTYPES for n in names) and len({n == "float64" for n in names}) == 1


def _call(name: str, results: Sequence[jax.ShapeDtypeStruct], operands: Sequence[jax.Array | None], **attributes: Any) -> list[jax.Array]:
    return list(jax.ffi.ffi_call(f"jnorm_{name}", list(results))(*[v for v in operands if v is not None], **attributes))


def _act(act: str | None) -> np.int32:
    return np.int32(_ACTS.index(act))


# --- columns --------------------------------------------------------------------------------------------------------------------------


def moments(x: jax.Array, *mask: jax.Array, axes: Sequence[int], spans: Spans) -> list[jax.Array] | None:
    columns = Columns.of(x.shape, axes)
    if columns is None or not _fits(x.dtype):
        return None
    small = columns.small_aval(stats_dtype(x.dtype))
    found = _call("moments", [small] * 4, [columns.large(x), *map(columns.mask, mask)], mask=bool(mask))
    stats = Stats(*(v.reshape(columns.small_shape) for v in found))
    for i in columns.extra:
        stats = Stats(*(jnp.expand_dims(v, i) for v in combine(stats, i)))
    return list(all_combine(stats, spans(axes), partitioned=True))


def _smalls(named: dict[str, jax.Array]) -> tuple[str, ...]:
    """The center, or what stands in its place where y is kept instead of x."""
    return "inverse" if "inverse" in named else "center", "offset", "shift", "mul", "add"


class _Column:
    """The operands that all ops but `moments` share, as the kernels take them."""

    def __init__(self, columns: Columns, named: dict[str, jax.Array]):
        self.columns, self.x = columns, named["x"]
        self.residual, self.mask = named.get("residual"), named.get("mask")
        self.output = "inverse" in named
        self.smalls = [columns.small(named[k]) for k in _smalls(named)]

    @classmethod
    def of(cls, args: Sequence[jax.Array], operands: tuple[str, ...], *more: jax.Array, dtypes: Sequence[Any]) -> "_Column | None":
        """None where the kernels do not have the case; `more` are further small operands, `dtypes` those of y or dy."""
        named = dict(zip(operands, args, strict=True))
        x, residual = named["x"], named.get("residual")
        if "scale" in named or not _fits(x.dtype, *dtypes, *([] if residual is None else [residual.dtype])):
            return None
        smalls = [*more, *(named[k] for k in _smalls(named))]
        columns = Columns.of(x.shape, [i for i in range(x.ndim) if all(v.shape[i] == 1 for v in smalls)])
        return None if columns is None else cls(columns, named)

    def operands(self) -> list[jax.Array | None]:
        c = self.columns
        return [
            c.large(self.x),
            *self.smalls,
            None if self.residual is None else c.large(self.residual),
            None if self.mask is None else c.mask(self.mask),
        ]

    def attributes(self, act: str | None) -> dict[str, Any]:
        return {"act": _act(act), "residual": self.residual is not None, "mask": self.mask is not None}


def apply(*args: jax.Array, act: str | None, dtype: Any, operands: tuple, spans: Spans, **_: Any) -> list[jax.Array] | None:
    column = _Column.of(args, operands, dtypes=[dtype])
    if column is None:
        return None
    [y] = _call("apply", [column.columns.large_aval(dtype)], column.operands(), **column.attributes(act))
    return [y.reshape(column.x.shape)]


def cotangent_sums(
    dy: jax.Array, *args: jax.Array, act: str | None, operands: tuple, map_axes: tuple, spans: Spans, **_: Any
) -> list[jax.Array] | None:
    column = _Column.of(args, operands, dtypes=[dy.dtype])
    if column is None:
        return None
    columns = column.columns
    small = columns.small_aval(stats_dtype(column.x.dtype))
    given = [columns.large(dy), *column.operands()]
    found = _call("cotangent_sums", [small] * 2, given, **column.attributes(act), output=column.output)
    return all_sum([v.reshape(columns.small_shape).sum(columns.extra, keepdims=True) for v in found], spans(map_axes))


def cotangent_apply(
    dy: jax.Array, a: jax.Array, b: jax.Array, *args: jax.Array, act: str | None, operands: tuple, spans: Spans, **_: Any
) -> list[jax.Array] | None:
    column = _Column.of(args, operands, a, b, dtypes=[dy.dtype])
    if column is None:
        return None
    columns = column.columns
    large = [v for v in (column.x, column.residual) if v is not None]
    out = _call(
        "cotangent_apply",
        [columns.large_aval(v.dtype) for v in large],
        [columns.large(dy), columns.small(a), columns.small(b), *column.operands()],
        **column.attributes(act),
        output=column.output,
    )
    return [v.reshape(column.x.shape) for v in out]


# --- groups ---------------------------------------------------------------------------------------------------------------------------


def _group_columns(x: jax.Array, axes: tuple, channel_axes: tuple, group_size: int, spans: Spans) -> Columns | None:
    """Where a sample's statistics are all on this device, and the channels of a group are neighbors in memory."""
    columns = Columns.of(x.shape, axes)
    if columns is None or columns.extra or spans(axes):
        return None
    for i in channel_axes:
        last = [k for k in columns.c if x.shape[k] > 1][-1:]
        if x.shape[i] % group_size or (group_size > 1 and last != [i]):
            return None
    return columns


def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *mask: jax.Array, axes: tuple, channel_axes: tuple, group_size: int, epsilon: float,
    act: str | None, dtype: Any, spans: Spans, **_: Any,
) -> list[jax.Array] | None:  # fmt: skip
    columns = _group_columns(x, axes, channel_axes, group_size, spans)
    if columns is None or not _fits(x.dtype, dtype):
        return None
    small = columns.small_aval(stats_dtype(x.dtype))
    y, *stats = _call(
        "group_norm",
        [columns.large_aval(dtype), small, small, small],
        [columns.large(x), columns.small(scale), columns.small(bias), *map(columns.mask, mask)],
        act=_act(act), group=np.int64(group_size if channel_axes else 1), epsilon=np.float64(epsilon), mask=bool(mask),
    )  # fmt: skip
    return [y.reshape(x.shape), *(v.reshape(columns.small_shape) for v in stats)]


def group_cotangent(
    dy: jax.Array, x: jax.Array, *args: jax.Array, axes: tuple, channel_axes: tuple, group_size: int, scale_axes: tuple, act: str | None,
    output: bool, spans: Spans, **_: Any,
) -> list[jax.Array] | None:  # fmt: skip
    columns = _group_columns(x, axes, channel_axes, group_size, spans)
    if columns is None or not _fits(x.dtype, dy.dtype):
        return None
    small = columns.small_aval(stats_dtype(x.dtype))
    dx, *affine = _call(
        "group_cotangent",
        [columns.large_aval(x.dtype), small, small],
        [columns.large(dy), columns.large(x), *map(columns.small, args[:5]), *map(columns.mask, args[5:])],
        act=_act(act), group=np.int64(group_size if channel_axes else 1), mask=len(args) > 5, output=output,
    )  # fmt: skip
    rest = [i for i in scale_axes if i not in axes]
    return [dx.reshape(x.shape), *all_sum([v.reshape(columns.small_shape).sum(rest, keepdims=True) for v in affine], spans(scale_axes))]


# --- rows -----------------------------------------------------------------------------------------------------------------------------


def _rows(x: jax.Array, scale: jax.Array, axes: tuple, spans: Spans, *dtypes: Any) -> Rows | None:
    rows = Rows.of(x.shape, axes, scale.shape)
    if rows is None or spans(axes) or not _fits(x.dtype, *dtypes):
        return None
    number, length = rows.sizes
    return None if length < _SHORTEST_ROW or (number < _FEWEST_LONG_ROWS and length > _LONG_ROW) else rows


def row_norm(
    x: jax.Array, *args: jax.Array, axes: tuple, epsilon: float, centered: bool, adds: bool, act: str | None, dtype: Any, spans: Spans,
    **_: Any,
) -> list[jax.Array] | None:  # fmt: skip
    residual, (scale, bias, *mask) = (args[0], args[1:]) if adds else (None, args)
    rows = _rows(x, scale, axes, spans, dtype, *([] if residual is None else [residual.dtype]))
    if rows is None:
        return None
    large = [dtype] if residual is None else [dtype, wider_dtype(x, residual)]
    small = jax.ShapeDtypeStruct(rows.sizes[:1], stats_dtype(large[-1] if adds else x.dtype))
    out = _call(
        "row_norm",
        [*(jax.ShapeDtypeStruct(rows.sizes, d) for d in large), *[small] * 4],
        [rows.large(x), None if residual is None else rows.large(residual), rows.affine(scale), rows.affine(bias), *map(rows.mask, mask)],
        act=_act(act), inner=np.int64(rows.inner), centered=centered, epsilon=np.float64(epsilon), residual=adds, mask=bool(mask),
    )  # fmt: skip
    return [*(v.reshape(x.shape) for v in out[: len(large)]), *(v.reshape(rows.small_shape()) for v in out[len(large) :])]


def row_cotangent(
    dy: jax.Array, *args: jax.Array, axes: tuple, scale_axes: tuple, centered: bool, adds: bool, output: bool, act: str | None,
    spans: Spans, **_: Any,
) -> list[jax.Array] | None:  # fmt: skip
    dsum, (x, *stats) = (args[0], args[1:]) if adds else (None, args)
    stats, (scale, bias, *mask) = stats[:4], stats[4:]
    rows = _rows(x, scale, axes, spans, dy.dtype)
    if rows is None:
        return None
    affine = jax.ShapeDtypeStruct(rows.affine(scale).shape, scale.dtype)
    dx, *sums = _call(
        "row_cotangent",
        [jax.ShapeDtypeStruct(rows.sizes, x.dtype), affine, affine],
        [
            rows.large(dy), None if dsum is None else rows.large(dsum), rows.large(x), *map(rows.small, stats), rows.affine(scale),
            rows.affine(bias), *map(rows.mask, mask),
        ],
        act=_act(act), inner=np.int64(rows.inner), centered=centered, residual=adds, mask=bool(mask), output=output,
    )  # fmt: skip
    rest = [i for i in scale_axes if rows.affine_shape[i] > 1]
    return [dx.reshape(x.shape), *all_sum([v.reshape(rows.affine_shape).sum(rest, keepdims=True) for v in sums], spans(scale_axes))]
