"""Weight normalization."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._pipeline.arguments import Across, check_affine, check_dtype, check_epsilon, check_x
from .._pipeline.axes import Layout, canonical_axes, others
from .._pipeline.rows import run_rows
from .._stats import stats_dtype
from ..typing import Axes


def weight_norm(
    v: jax.Array,
    scale: jax.Array | None = None,
    *,
    feature_axes: Axes | None = -1,
    epsilon: float = 1e-12,
    dtype: Any = None,
) -> jax.Array:
    r"""Weight normalization: a weight as direction times length.

    .. math:: w = g\,\frac{v}{\sqrt{\sum v^2 + \epsilon}}

    with the sum over all axes but `feature_axes`, one length for each feature.

    Args:
      v: the direction, floating: a kernel `(..., C)`, or features on any axes.
      scale: g, of the shape of the feature axes; 1 where None.
      feature_axes: the axes along which the length varies. None: one length for the whole of v, and a scalar scale.
      epsilon: added to the sum of squares.
      dtype: w's dtype; v's where None.

    Returns:
      w of v's shape; 0 where v is 0 along all of a feature.

    Raises:
      ValueError: shapes or axes that do not fit.
      TypeError: v is not floating.

    Numerics:
      Sums in at least float32, and right up to the largest finite v: they are taken of v times a power of two. Kept for the backward
      pass: v and a few numbers per feature. The gradient of v is orthogonal to v where epsilon is negligible. With `epsilon=0` v below
      about 1e-15 is lost, as its squares are.

    Distributed:
      Nothing is merged over named axes; under jit a sharded v is reduced over its shards.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> v = jnp.array([[3.0], [4.0]])
      >>> jnorm.reparam.weight_norm(v, jnp.array([10.0])).ravel().round(4).tolist()
      [6.0, 8.0]

    References:
      Salimans, Kingma, "Weight Normalization", 2016, https://arxiv.org/abs/1602.07868. The formula and epsilon are Flax's. PyTorch's
      starts with g = ‖v‖, so that w = v at first; Flax's modules, and jnorm's, with g = 1.
    """
    v = check_x(v, name="v")
    features = () if feature_axes is None else canonical_axes(feature_axes, v.ndim, "feature_axes", of="v")
    layout = Layout(v.shape, others(v.ndim, features), features)
    scale = check_affine(scale, "scale", layout, v, of="v")
    view = None if scale is None else layout.feature_view(scale)
    return l2_normalize(v, layout.reduced, view, epsilon=check_epsilon(epsilon), dtype=check_dtype(dtype, v))


def l2_normalize(v: jax.Array, axes: tuple[int, ...], scale: jax.Array | None = None, *, epsilon: float, dtype: Any) -> jax.Array:
    """scale·v/√(Σv² + epsilon) as a row norm over n numbers, whose mean square is Σv²/n. Scale is of v's rank."""
    if not axes:  # each number by itself: rows of one
        view = None if scale is None else scale[..., None]
        return l2_normalize(v[..., None], (v.ndim,), view, epsilon=epsilon, dtype=dtype)[..., 0]
    n = max(math.prod(v.shape[i] for i in axes), 1)
    length = jnp.full((1,) * v.ndim, 1 / math.sqrt(n), stats_dtype(v.dtype)) * (1 if scale is None else scale)
    return run_rows(v, length, None, axes, Across(), epsilon=epsilon / n, centered=False, dtype=dtype)
