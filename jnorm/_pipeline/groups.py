"""Norms of each sample's positions, by channel or by groups of channels, as one fused op: where nothing is merged over named axes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._kernels import group
from .._kernels._forms import constant_axes
from .._stats import stats_dtype
from ..typing import Activation
from .arguments import check_activation
from .axes import Layout


def run_groups(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    layout: Layout,
    group_size: int | None,
    *,
    epsilon: float,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
    output: bool = False,
) -> jax.Array:
    """Normalize over the layout's reduced axes, and with `group_size` over so many contiguous channels of its one feature axis."""
    ones = jnp.ones(layout.feature_shape, stats_dtype(x.dtype))
    affine = (layout.feature_view(v) for v in (ones if scale is None else scale, 0 * ones if bias is None else bias))
    channel_axes = () if group_size is None else layout.features
    static = (layout.reduced, channel_axes, group_size or 1, epsilon, check_activation(activation), dtype, output)
    y = _groups(x, *affine, mask, static)
    return activation(y) if callable(activation) else y


def _params(x: jax.Array, scale: jax.Array, static: tuple) -> dict[str, Any]:
    names = ("axes", "channel_axes", "group_size", "epsilon", "act", "dtype", "output")
    return {"scale_axes": constant_axes(scale, x), **dict(zip(names, static, strict=True))}


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, static: tuple) -> list[jax.Array]:
    return group.group_norm(x, scale, bias, *([] if mask is None else [mask]), **_params(x, scale, static))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _groups(x: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, static: tuple) -> jax.Array:
    return _forward(x, scale, bias, mask, static)[0]


@_groups.defjvp
def _groups_jvp(static: tuple, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, scale, bias, mask = primals
    y, *stats = _forward(x, scale, bias, mask, static)
    shared = [y if static[-1] else x, *stats, scale, bias, *([] if mask is None else [mask])]
    return y, group.group_tangent(*tangents[:3], *shared, **_params(x, scale, static))[0]
