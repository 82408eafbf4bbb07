"""Any axes of x as the native kernels see them: [O, R, C] for statistics by column, [O, R] for rows. Reshapes only: nothing moves."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# What is reduced outside of the kernel is as large as x / R.
_SHORTEST_R = 16


class Columns(NamedTuple):
    """x as [O, R, C]: its last kept axes are C, the reduced ones before them R, and all before those O.

    `extra` are reduced axes in O: there the kernel's statistics are merged, or its sums added, afterwards.
    """

    shape: tuple[int, ...]
    o: tuple[int, ...]
    r: tuple[int, ...]
    c: tuple[int, ...]
    extra: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], reduced: Sequence[int]) -> "Columns | None":
        if 0 in shape or not shape:
            return None
        left = len(shape)

        def run(wanted: bool) -> tuple[int, ...]:
            nonlocal left
            end = left
            while left and ((left - 1 in reduced) is wanted or shape[left - 1] == 1):
                left -= 1
            return tuple(range(left, end))

        c, r = run(False), run(True)
        o = tuple(range(left))
        extra = tuple(i for i in o if i in reduced and shape[i] > 1)
        columns = cls(shape, o, r, c, extra)
        return None if extra and columns.sizes[1] < _SHORTEST_R else columns

    @property
    def sizes(self) -> tuple[int, int, int]:
        o, r, c = (math.prod(self.shape[i] for i in axes) for axes in (self.o, self.r, self.c))
        return o, r, c

    @property
    def small_shape(self) -> tuple[int, ...]:
        """The kernel's statistics with x's rank."""
        return tuple(1 if i in self.r else n for i, n in enumerate(self.shape))

    def large(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.sizes)

    def small(self, v: jax.Array) -> jax.Array:
        o, _, c = self.sizes
        return jnp.broadcast_to(v, self.small_shape).reshape(o, c)

    def mask(self, mask: jax.Array) -> jax.Array:
        return _collapsed(mask, self.shape, (self.o, self.r, self.c))

    def small_aval(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        o, _, c = self.sizes
        return jax.ShapeDtypeStruct((o, c), dtype)

    def large_aval(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.sizes, dtype)


class Rows(NamedTuple):
    """x as [O, R], its reduced axes being the last; scale and bias as [G, R], where O is (anything, G, inner)."""

    shape: tuple[int, ...]
    o: tuple[int, ...]
    r: tuple[int, ...]
    g: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], reduced: Sequence[int], scale_shape: tuple[int, ...]) -> "Rows | None":
        columns = Columns.of(shape, reduced)
        if columns is None or columns.extra or columns.sizes[2] != 1:
            return None
        varying = [i for i in columns.o if scale_shape[i] != 1]
        g = tuple(range(varying[0], varying[-1] + 1)) if varying else ()
        return cls(shape, columns.o, (*columns.r, *columns.c), g)

    @property
    def sizes(self) -> tuple[int, int]:
        o, r = (math.prod(self.shape[i] for i in axes) for axes in (self.o, self.r))
        return o, r

    @property
    def inner(self) -> int:
        return math.prod(self.shape[i] for i in self.o if self.g and i > self.g[-1])

    @property
    def affine_shape(self) -> tuple[int, ...]:
        """Scale and bias with x's rank."""
        return tuple(n if i in self.g or i in self.r else 1 for i, n in enumerate(self.shape))

    def large(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.sizes)

    def affine(self, v: jax.Array) -> jax.Array:
        return jnp.broadcast_to(v, self.affine_shape).reshape(-1, self.sizes[1])

    def small(self, v: jax.Array) -> jax.Array:
        return v.reshape(self.sizes[0])

    def small_shape(self) -> tuple[int, ...]:
        return tuple(1 if i in self.r else n for i, n in enumerate(self.shape))

    def mask(self, mask: jax.Array) -> jax.Array:
        return _collapsed(mask, self.shape, (self.o, self.r, ()))


def _collapsed(mask: jax.Array, shape: tuple[int, ...], runs: Sequence[tuple[int, ...]]) -> jax.Array:
    """A mask with one axis for each run of axes, of size 1 where it is constant along all of them."""
    full = list(mask.shape)
    for run in runs:
        if any(mask.shape[i] != 1 for i in run):
            for i in run:
                full[i] = shape[i]
    return jnp.broadcast_to(mask, full).reshape([math.prod(full[i] for i in run) for run in runs])
