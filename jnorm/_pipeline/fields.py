"""Means over the field around each element: a window on some axes of x, the whole of others.

A window of size s at i is [i - s//2, i + (s - 1)//2]. Sums over it are built by doubling: of two neighbors of length k one of length 2k.
Each is a sum of differences from the value at its own first place, so that a mean that is large against the spread costs no digits, also
where it is another in each window; and no sum is the difference of two longer ones.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._kernels._forms import counted, read
from .._stats import finite
from ..typing import Border


class Field(NamedTuple):
    """What is averaged around each element: an entry per axis, and what counts beyond the ends of an axis."""

    windows: tuple[int | None, ...]
    border: Border

    @property
    def whole(self) -> tuple[int, ...]:
        return tuple(i for i, size in enumerate(self.windows) if size is None)

    @property
    def local(self) -> tuple[int, ...]:
        """The axes with a window that holds more than the element itself."""
        return tuple(i for i, size in enumerate(self.windows) if size is not None and size > 1)

    def size(self, shape: Sequence[int]) -> int:
        """Elements of the field, with those beyond the ends."""
        return math.prod(shape[i] if size is None else size for i, size in enumerate(self.windows))

    def inside(self, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Elements of the field that x has, with 1 along the axes where it is the same number everywhere."""
        number = jnp.full((1,) * len(shape), math.prod(shape[i] for i in self.whole), dtype)
        for axis in self.local:
            n, size, at = shape[axis], self.windows[axis] or 1, jnp.arange(shape[axis])
            along = jnp.minimum(at + (size - 1) // 2, n - 1) - jnp.maximum(at - size // 2, 0) + 1
            number = number * along.astype(dtype).reshape([n if i == axis else 1 for i in range(len(shape))])
        return number


def check_field(field: Any, border: Any, ndim: int, name: str) -> Field:
    if border not in get_args(Border):
        raise ValueError(f'border must be "zero" or "renorm", got {border!r}.')
    if not isinstance(field, Sequence) or isinstance(field, str):
        raise TypeError(f"{name} must be a tuple with an entry for each axis of x, got {field!r}.")
    if len(field) != ndim:
        raise ValueError(f"{name}={field!r} has {len(field)} entries, but x has {ndim} axes; give one for each: 1, a window or None.")
    for size in field:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer)):
            raise TypeError(f"{name}={field!r} must hold ints, the size of a window, and None, the whole axis; got {size!r}.")
        if size is not None and size < 1:
            raise ValueError(f"{name}={field!r} has a window of {size}; the smallest is 1, the element itself.")
    return Field(tuple(None if size is None else int(size) for size in field), border)


def deviation(x: jax.Array, mask: jax.Array | None, field: Field) -> jax.Array:
    """x minus its mean over the field, in at least float32; 0 where the field counts nothing.

    Non-finite values under the mask are read as a mean that is near, a constant.
    """
    x = base = read(x)
    if mask is not None:
        near = _mean_nearby(x, mask, field)
        x, base = jnp.where(mask | jnp.isfinite(x), x, near), jnp.where(mask, x, near)
    base = lax.stop_gradient(base)
    base = base[tuple(slice(0, 1) if i in field.whole else slice(None) for i in range(x.ndim))]
    sums = _sums(counted(x - base, mask), mask, field, base)
    number, outside = _numbers(sums.count, x, field)
    v = (x - base) - (sums.total - outside * base) / jnp.maximum(number, 1)
    return jnp.where(number > 0, v, 0)


def _mean_nearby(x: jax.Array, mask: jax.Array, field: Field) -> jax.Array:
    """The mean of what is counted along all of the field's axes, and finite: a value to stand in for what is not counted."""
    axes = tuple(sorted((*field.whole, *field.local)))
    sound = mask & jnp.isfinite(x)
    number = jnp.maximum(sound.sum(axes, keepdims=True), 1).astype(x.dtype)
    return lax.stop_gradient((jnp.where(sound, x, 0) / number).sum(axes, keepdims=True))


def mean_square(v: jax.Array, mask: jax.Array | None, field: Field) -> jax.Array:
    """The mean of v² over the field; 0 where that counts nothing."""
    sums = _sums(finite(counted(v, mask) ** 2), mask, field)
    return finite(sums.total) / jnp.maximum(_numbers(sums.count, v, field)[0], 1)


def _numbers(count: jax.Array, x: jax.Array, field: Field) -> tuple[jax.Array, jax.Array | int]:
    """The divisor, and how many of it are the zeros beyond the ends, which are counted like elements."""
    if field.border == "renorm":
        return count, 0
    outside = field.size(x.shape) - field.inside(x.shape, count.dtype)
    return count + outside, outside


class _Sums(NamedTuple):
    """Over a window that starts at each place: how many are counted, and Σ (x - base), with the base of that place."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    total: jax.Array
    base: jax.Array | None = None

    def join(self, after: "_Sums", at: int, axis: int) -> "_Sums":
        """Windows that are longer by those that start `at` places later."""
        n = after.total.shape[axis] - at
        first, second = (jax.tree.map(lambda a, i=i: lax.slice_in_dim(a, i, i + n, axis=axis), s) for i, s in ((0, self), (at, after)))
        total = first.total + second.total
        if first.base is not None and second.base is not None:
            total = total + second.count * (second.base - first.base)
        return _Sums(first.count + second.count, total, first.base)

    def pad(self, axis: int, n: int, before: int, after: int) -> "_Sums":
        """Nothing is counted in what is added; its base is that of the nearest place."""

        def along(a: jax.Array, length: int) -> jax.Array:
            return jnp.broadcast_to(a, [length if i == axis else size for i, size in enumerate(a.shape)])

        def padded(a: jax.Array) -> jax.Array:
            return jnp.pad(along(a, n), [(before, after) if i == axis else (0, 0) for i in range(a.ndim)])

        def with_ends(a: jax.Array) -> jax.Array:
            # Not by jnp.pad, which slices the other axes too: these may be split over a mesh of explicit axes.
            first, last = (lax.slice_in_dim(a, i, i + 1, axis=axis) for i in (0, a.shape[axis] - 1))
            return jnp.concatenate([along(first, before), along(a, n), along(last, after)], axis)

        base = None if self.base is None else with_ends(self.base)
        return _Sums(padded(self.count), padded(self.total), base)


def _sums(v: jax.Array, mask: jax.Array | None, field: Field, base: jax.Array | None = None) -> _Sums:
    """Sums over the field of v, of which what is not counted is 0."""
    count = jnp.ones((1,) * v.ndim, v.dtype) if mask is None else mask.astype(v.dtype)
    repeats = math.prod(v.shape[i] for i in field.whole if count.shape[i] == 1)
    sums = _Sums(count.sum(field.whole, keepdims=True) * repeats, v.sum(field.whole, keepdims=True), base)
    for axis in field.local:
        if v.shape[axis]:
            sums = _along(sums, axis, v.shape[axis], field.windows[axis] or 1)
    return sums


def _along(sums: _Sums, axis: int, n: int, size: int) -> _Sums:
    """Sums over the window on one axis, with the base of its own place."""
    before, after = min(size // 2, n - 1), min((size - 1) // 2, n - 1)
    windows = _of_length(sums.pad(axis, n, before, after), before + after + 1, axis)
    if sums.base is None or windows.base is None:
        return windows
    return _Sums(windows.count, windows.total + windows.count * (windows.base - sums.base), sums.base)


def _of_length(sums: _Sums, length: int, axis: int) -> _Sums:
    """Windows of that many places, of sums that have one each."""
    if length == 1:
        return sums
    half = _of_length(sums, length // 2, axis)
    both = half.join(half, length // 2, axis)
    return both.join(sums, length - 1, axis) if length % 2 else both
