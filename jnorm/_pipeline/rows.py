"""Row norms: one fused op where nothing is merged over named axes, else the unit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._kernels import row
from .._kernels._forms import constant_axes
from .._stats import Stats, inverse_sqrt, stats_dtype
from ..typing import Activation
from .arguments import Across, check_activation
from .axes import Layout
from .normalize import run


def run_rows(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    axes: tuple[int, ...],
    across: Across,
    *,
    epsilon: float,
    centered: bool,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
    output: bool = False,
) -> jax.Array:
    """Normalize rows, which may have a scale and bias along them, both of x's rank; one fused op where nothing is merged over names."""
    static = (axes, epsilon, centered, check_activation(activation), dtype, output)
    scale, bias = _affine(x, scale, bias)
    if across.names:
        if output:
            raise ValueError(f'save="output" is not for rows whose statistics are merged over devices, got axis_name={across.names}.')
        return _merged(x, scale, bias, mask, across, activation, static)
    y = _rows(x, None, scale, bias, mask, static)[0]
    return activation(y) if callable(activation) else y


def run_added_rows(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    axes: tuple[int, ...],
    across: Across,
    *,
    epsilon: float,
    centered: bool,
    mask: jax.Array | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The rows of x + residual normalized, and that sum."""
    static = (axes, epsilon, centered, None, dtype, False)
    scale, bias = _affine(wider(x, residual), scale, bias)
    if across.names:
        total = row.added(x, residual)
        return _merged(total, scale, bias, mask, across, None, static), total
    y, total = _rows(x, residual, scale, bias, mask, static)
    return y, total


def wider(x: jax.Array, residual: jax.Array) -> jax.Array:
    """The one whose dtype decides that of the statistics of their sum."""
    return max((x, residual), key=lambda a: jnp.finfo(a.dtype).bits)


def _affine(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> list[jax.Array]:
    """Both of one shape; ones and zeros where there are none."""
    ones = jnp.ones((1,) * x.ndim, stats_dtype(x.dtype))
    return jnp.broadcast_arrays(ones if scale is None else scale, 0 * ones if bias is None else bias)


def _merged(
    x: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, across: Across, activation: Activation | None, static: tuple
) -> jax.Array:
    """Rows whose statistics are merged over named axes: the unit."""
    axes, epsilon, centered, _, dtype, _ = static
    row_map = functools.partial(_row_map, epsilon, centered)
    return run(x, row_map, (scale, bias), Layout(x.shape, axes, ()), across, mask=mask, activation=activation, dtype=dtype)[0]


def _row_map(epsilon: float, centered: bool, stats: Stats, aux: tuple) -> tuple:
    square = stats.var if centered else stats.var + stats.mean**2
    rstd = jnp.where(stats.count > 0, inverse_sqrt(square + epsilon), 0)
    return stats.offset if centered else -stats.center, rstd, jnp.zeros_like(rstd), *aux


def _row_params(x: jax.Array, scale: jax.Array, adds: bool, static: tuple) -> dict[str, Any]:
    names = ("axes", "epsilon", "centered", "act", "dtype", "output")
    return {"scale_axes": constant_axes(scale, x), "adds": adds, **dict(zip(names, static, strict=True))}


def _row_forward(
    x: jax.Array, residual: jax.Array | None, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, static: tuple
) -> tuple[tuple, list]:
    """(y,) or (y, x + residual), and the statistics."""
    adds = residual is not None
    operands = [v for v in (x, residual, scale, bias, mask) if v is not None]
    out = row.row_norm(*operands, **_row_params(x, scale, adds, static))
    number = 2 if adds else 1
    return tuple(out[:number]), out[number:]


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _rows(
    x: jax.Array, residual: jax.Array | None, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, static: tuple
) -> tuple[jax.Array, ...]:
    return _row_forward(x, residual, scale, bias, mask, static)[0]


@_rows.defjvp
def _rows_jvp(static: tuple, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    x, residual, scale, bias, mask = primals
    dx, dresidual, dscale, dbias, _ = tangents
    out, stats = _row_forward(x, residual, scale, bias, mask, static)
    kept = out[0] if static[-1] else x if residual is None else out[1]
    if residual is not None:
        dx = dx.astype(kept.dtype) + dresidual.astype(kept.dtype)
    shared = [kept, *stats, scale, bias, *([] if mask is None else [mask])]
    return out, tuple(row.row_tangent(dx, dscale, dbias, *shared, **_row_params(x, scale, residual is not None, static)))
