"""What the XLA forms of the ops are written with."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax_internals import clamp, lies_whole_along
from .._stats import all_sum, stats_dtype
from ._op import Spans

# An exact factor, after which sums of the largest numbers are in range.
DOWN = 2.0**-30

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


# Those of which z can be told from y.
INVERTIBLE = (None, "leaky_relu")


def activate(act: str | None, z: jax.Array) -> jax.Array:
    return z if act is None else ACTIVATIONS[act](z)


def inverted(act: str | None, y: jax.Array) -> jax.Array:
    """The z of which y = act(z)."""
    return jnp.where(y < 0, y / 0.01, y) if act == "leaky_relu" else y


def reciprocal(v: jax.Array) -> jax.Array:
    """1 / v, 0 where v is: what has been multiplied by 0 is read as the mean."""
    return jnp.where(v == 0, 0, 1 / jnp.where(v == 0, 1, v))


def times_slope(act: str | None, z: Callable[[], jax.Array], v: jax.Array) -> jax.Array:
    """v times the activation's derivative at z(), which is not computed where there is no activation.

    0 where v is: what stands under a mask may be so large that the derivative there is NaN.
    """
    if act is None:
        return v
    at = z()
    return jnp.where(v == 0, 0, jax.jvp(ACTIVATIONS[act], (at,), (jnp.ones_like(at),))[1] * v)


def read(x: jax.Array) -> jax.Array:
    return x.astype(stats_dtype(x.dtype))


def wider_dtype(a: jax.Array, b: jax.Array) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a.dtype, b.dtype)


def apart(a: jax.Array, k: int) -> jax.Array:
    """The same array with k axes of size 1 before the last, so that what is computed from it is an expression of its own to the compiler.

    Where two reductions share an x-sized expression with small arrays broadcast along rows, XLA:CPU materializes that. It never does where
    each reduction has its own view of x: LayerNorm's step needs no x-sized temporary in float32, instead of two.
    """
    return a.reshape(*a.shape[:-1], *(1,) * k, a.shape[-1]) if k else a


def local_sum(v: jax.Array, axes: Sequence[int], k: int = 0) -> jax.Array:
    """Sum over axes, which stay with size 1, of v that is seen `apart` by k.

    The clamp to ±infinity changes nothing. It ends XLA:CPU's library fusion of the reduction, which otherwise swallows what follows, and
    then materializes or recomputes arrays of x's size: LayerNorm's step is up to 10 times slower without.
    """
    infinity, last = jnp.full((), jnp.inf, v.dtype), v.ndim - k - 1
    keep = [1 if i in axes else n for i, n in enumerate((*v.shape[:last], v.shape[-1]))]
    seen = [i if i < last else v.ndim - 1 for i in axes]
    return clamp(-infinity, v.sum((*seen, *range(last, last + k))).reshape(keep), infinity)


def sums(values: Sequence[jax.Array], axes: Sequence[int], spans: Spans) -> list[jax.Array]:
    """Sums over axes on all the devices that these axes are split over, in one all-reduce."""
    return all_sum([local_sum(v, axes) for v in values], spans(axes))


def counted(v: jax.Array, mask: jax.Array | None) -> jax.Array:
    return v if mask is None else jnp.where(mask, v, 0)


def usable(v: jax.Array, x: jax.Array, mask: jax.Array | None, otherwise: jax.Array | int = 0) -> jax.Array:
    """v where x enters y: everywhere, but for non-finite values under the mask, which are read as the mean."""
    return v if mask is None else jnp.where(mask | jnp.isfinite(x), v, otherwise)


def constant_axes(a: jax.Array | None, x: jax.Array) -> tuple[int, ...]:
    """The axes of x along which `a`, of x's rank, is constant."""
    return () if a is None else tuple(i for i in range(x.ndim) if a.shape[i] == 1 and x.shape[i] != 1)


def count(x: jax.Array, mask: jax.Array | None, axes: Sequence[int], spans: Spans) -> jax.Array:
    """Counted elements along axes, of shape x with size 1 there."""
    keep = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    dtype = stats_dtype(x.dtype)
    shards = math.prod(lax.axis_size(name) for name in spans(axes))
    if mask is None:
        return jnp.full(keep, shards * math.prod(x.shape[i] for i in axes), dtype)
    along = [i for i in axes if mask.shape[i] > 1]
    repeats = math.prod(x.shape[i] for i in axes if mask.shape[i] == 1)
    part = mask.astype(dtype).sum(along, keepdims=True) * repeats
    return all_sum([jnp.broadcast_to(part, keep)], spans(axes))[0]


def mean(v: jax.Array, n: jax.Array, axes: Sequence[int], spans: Spans) -> jax.Array:
    """Sum over axes divided by the count n."""
    return sums([v], axes, spans)[0] / jnp.maximum(n, 1)


def first_center(v: jax.Array, mask: jax.Array | None, n: jax.Array, axes: Sequence[int], spans: Spans) -> jax.Array:
    """A value near the mean to subtract first: the first element where that is counted and on every device, else a first mean."""
    if mask is None and not spans(axes) and v.size and lies_whole_along(v, axes):
        return v[tuple(slice(0, 1) if i in axes else slice(None) for i in range(v.ndim))]
    # Any value near the mean does; scaled, the sum of the largest numbers is in range.
    return mean(counted(v * DOWN, mask), n, axes, spans) / DOWN
