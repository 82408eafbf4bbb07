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
) -> jax.Array:
    """Normalize rows, which may have a scale and bias along them, both of x's rank; one fused op where nothing is merged over names."""
    ones = jnp.ones((1,) * x.ndim, stats_dtype(x.dtype))
    scale, bias = (ones if scale is None else scale), (0 * ones if bias is None else bias)
    if across.names:
        layout = Layout(x.shape, axes, ())
        row_map = functools.partial(_row_map, epsilon, centered)
        return run(x, row_map, (scale, bias), layout, across, mask=mask, activation=activation, dtype=dtype)[0]
    shape = jnp.broadcast_shapes(scale.shape, bias.shape)
    scale, bias = jnp.broadcast_to(scale, shape), jnp.broadcast_to(bias, shape)
    act = check_activation(activation)
    y = _rows(x, scale, bias, mask, (axes, epsilon, centered, act, dtype))
    return activation(y) if callable(activation) else y


def _row_map(epsilon: float, centered: bool, stats: Stats, aux: tuple) -> tuple:
    square = stats.var if centered else stats.var + stats.mean**2
    rstd = jnp.where(stats.count > 0, inverse_sqrt(square + epsilon), 0)
    return stats.offset if centered else -stats.center, rstd, jnp.zeros_like(rstd), *aux


def _row_params(x: jax.Array, scale: jax.Array, static: tuple) -> dict[str, Any]:
    axes, epsilon, centered, act, dtype = static
    return {"axes": axes, "scale_axes": constant_axes(scale, x), "epsilon": epsilon, "centered": centered, "act": act, "dtype": dtype}


def _row_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, static: tuple) -> list[jax.Array]:
    return row.row_norm(x, scale, bias, *([] if mask is None else [mask]), **_row_params(x, scale, static))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _rows(x: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, static: tuple) -> jax.Array:
    return _row_forward(x, scale, bias, mask, static)[0]


@_rows.defjvp
def _rows_jvp(static: tuple, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, scale, bias, mask = primals
    y, *stats = _row_forward(x, scale, bias, mask, static)
    shared = [x, *stats, scale, bias, *([] if mask is None else [mask])]
    return y, row.row_tangent(*tangents[:3], *shared, **_row_params(x, scale, static))[0]
