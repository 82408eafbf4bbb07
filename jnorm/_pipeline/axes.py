"""Any axes of x to the layout of statistics and back."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..typing import Axes
from .values import as_array, told


def canonical_axes(axes: Axes, ndim: int, name: str, of: str = "x") -> tuple[int, ...]:
    """Axes in ascending order, none negative."""
    given = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if not all(isinstance(a, int | np.integer) for a in given):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {axes!r}.")
    if not given:
        raise ValueError(f"{name} is empty: there is no axis to use. {of} has {ndim} axes.")
    if not ndim:
        raise ValueError(f"{name}={axes!r} is out of range: {of} is a scalar, without an axis.")
    outside = [a for a in given if not -ndim <= a < ndim]
    if outside:
        raise ValueError(f"{name}={axes!r} is out of range for {of} of {ndim} axes: {outside[0]} is not in [{-ndim}, {ndim - 1}].")
    positive = tuple(sorted(int(a) % ndim for a in given))
    if len(set(positive)) != len(positive):
        raise ValueError(f"{name}={axes!r} names an axis twice; {of} has {ndim} axes.")
    return positive


class Layout(NamedTuple):
    """How statistics lie: kept axes that are not features, in order, then kept feature axes, in order; reduced axes not at all."""

    shape: tuple[int, ...]
    reduced: tuple[int, ...]
    features: tuple[int, ...]

    @classmethod
    def of(cls, x: jax.Array, reduction_axes: Axes, feature_axes: Axes) -> "Layout":
        return cls(x.shape, canonical_axes(reduction_axes, x.ndim, "reduction_axes"), canonical_axes(feature_axes, x.ndim, "feature_axes"))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.features)

    @property
    def reduced_size(self) -> int:
        return math.prod(self.shape[i] for i in self.reduced)

    @property
    def _kept(self) -> tuple[int, ...]:
        kept = [i for i in range(self.ndim) if i not in self.reduced]
        return tuple([i for i in kept if i not in self.features] + [i for i in kept if i in self.features])

    def squeeze(self, a: jax.Array) -> jax.Array:
        """From x's rank, with 1 along reduced axes, to the shape of statistics."""
        return a.transpose(self._kept + self.reduced).reshape([a.shape[i] for i in self._kept])

    def expand(self, a: jax.Array) -> jax.Array:
        """From anything that broadcasts to the shape of statistics to x's rank; what has x's rank already stays."""
        if a.ndim == self.ndim:
            return a
        kept = self._kept
        if a.ndim > len(kept):
            raise ValueError(f"{a.shape} has more axes than the statistics' shape {tuple(self.shape[i] for i in kept)}, but not x's rank.")
        full = a.reshape((1,) * (len(kept) - a.ndim) + a.shape + (1,) * len(self.reduced))
        return full.transpose(np.argsort(kept + self.reduced))

    def feature_view(self, v: jax.Array) -> jax.Array:
        """From the shape of the feature axes to x's rank."""
        return v.reshape([n if i in self.features else 1 for i, n in enumerate(self.shape)])


def others(ndim: int, *axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of x that are in none of the given sets."""
    return tuple(i for i in range(ndim) if not any(i in a for a in axes))


def pad_batch(x: jax.Array, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Pad the first axis with zeros up to a multiple, and mask what was added.

    Args:
      x: `(N, ...)`.
      multiple: the length of the result is the least multiple of this that is at least N, such as the number of devices.

    Returns:
      x padded, `(N', ...)`, and a bool mask `(N', 1, ..., 1)` of x's rank, True for the N given rows: the `mask` of every norm.

    Raises:
      ValueError: x has no axes, or multiple is not positive.
      TypeError: multiple is no int.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x, mask = jnorm.pad_batch(jnp.ones((5, 2)), 4)
      >>> x.shape, mask.ravel().tolist()
      ((8, 2), [True, True, True, True, True, False, False, False])
    """
    x = as_array(x)
    if not isinstance(multiple, int | np.integer):
        raise TypeError(f"multiple must be an int, such as the number of devices, got {told(multiple)}.")
    if x.ndim == 0 or multiple < 1:
        raise ValueError(f"pad_batch needs x with a batch axis and a positive multiple, got shape {x.shape} and multiple {multiple}.")
    missing = -len(x) % multiple
    mask = jnp.arange(len(x) + missing) < len(x)
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), mask.reshape(-1, *(1,) * (x.ndim - 1))
