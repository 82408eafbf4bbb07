"""Statistics that merge exactly, and the only named collectives of jnorm.

A sum of squares that is taken around the mean can be merged with others without ever forming E[x²] - E[x]² (Chan, Golub, LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979). Channels of a group, shards, windows and streams
are all merged by :func:`combine`.
"""

import math
import operator
from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._jax_internals import bound_axis_sizes, clamp, manual_axes, mesh_axes, types_track_varying, varying_axes

# Beyond either, two dependent all-reduces are faster on most networks: they move less than one all-gather of everybody's statistics, and
# do not wait for every participant in turn, as a ring does. docs/guide/collectives.md has the numbers.
GATHER_LIMIT = 64  # participants
GATHER_BYTES = 4 * 2**20  # received by each: 64 participants with 4,096 features in float32


class Stats(NamedTuple):
    """Count, mean and sum of squared deviations of the counted elements.

    The mean is `center + offset`: one float32 is not enough, since a spread of 1e-3 around 1e4 is below its resolution there.
    All four arrays have the same shape and are float32, or float64 where x is.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # a tuple's own count is of no use here
    center: jax.Array
    offset: jax.Array
    m2: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Mean of the counted elements; 0 where nothing is counted."""
        return self.center + self.offset

    @property
    def var(self) -> jax.Array:
        """Biased variance of the counted elements; 0 where nothing is counted."""
        return self.m2 / jnp.maximum(self.count, 1)


def stats_dtype(dtype: Any) -> Any:
    """The dtype of statistics of x: at least float32, wider where x is, complex where x is."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def isolate(a: jax.Array) -> jax.Array:
    """The same values, computed once before they are broadcast against x: a / 1 by a 1 that the compiler cannot see.

    XLA:CPU repeats cheap small arithmetic for each element of x that it is broadcast to, but nothing that it holds expensive, a division.
    Measured on (32, 14, 14, 1024): GroupNorm's training step is 1.1 (float32) to 2.7 (bfloat16) times slower without.
    """
    return a / clamp(jnp.ones((), a.dtype), a, jnp.ones((), a.dtype))


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest float to a + b, and exactly what is missing (Knuth)."""
    # Else the compiler may contract a product in b with the sum, and not do so where it computes the sum again.
    a, b = isolate(a), isolate(b)
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@jax.custom_jvp
def inverse_sqrt(v: jax.Array) -> jax.Array:
    """1/√v, whose derivative -½·v^(-3/2)·dv is multiplied up from dv, since v^(-3/2) underflows from v = 1e25 on."""
    return lax.rsqrt(v)


@inverse_sqrt.defjvp
def _inverse_sqrt_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    r = inverse_sqrt(primals[0])
    return r, ((-0.5 * tangents[0] * r) * r) * r


def combine(stats: Stats, axis: int) -> Stats:
    """Merge statistics along one axis of their arrays, as if taken over all elements at once.

    With w = count / Σ count: mean = Σ w·meanᵢ and m2 = Σ m2ᵢ + countᵢ·(meanᵢ - mean)². Members that counted nothing contribute nothing.

    Args:
      stats: arrays of one common shape.
      axis: the axis to merge, which the result does not have.

    Returns:
      The merged :class:`Stats`; zeros where no member counted anything.

    Raises:
      TypeError: stats are none.

    Numerics:
      Means are compared by their difference from a common center, so merging shards at mean 1e4 keeps the accuracy of each.

    Distributed:
      No collective: the members are on one device. The norms merge across devices by themselves, given `axis_name`.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.arange(6.0)
      >>> halves = jnorm.moments(x.reshape(2, 3), 1)
      >>> whole = jnorm.combine(halves, 0)
      >>> float(whole.mean), round(float(whole.var), 4)
      (2.5, 2.9167)

    References:
      Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    if not isinstance(stats, Stats):
        raise TypeError(f"stats must be jnorm.Stats, as jnorm.moments returns them, got {type(stats).__name__}.")
    stats = Stats(stats.count, *(jnp.where(stats.count > 0, a, 0) for a in stats[1:]))
    count = stats.count.sum(axis, keepdims=True)
    weight = stats.count / jnp.maximum(count, 1)
    near_mean = (weight * stats.center).sum(axis, keepdims=True)
    deviation = (stats.center - near_mean) + stats.offset
    shift = (weight * deviation).sum(axis, keepdims=True)
    # Of a member that counted nothing the square may overflow, and 0·infinity is not a number.
    between = jnp.where(stats.count > 0, stats.count * (deviation - shift) ** 2, 0)
    m2 = finite((stats.m2 + between).sum(axis))
    center, offset = two_sum(near_mean, shift)
    return Stats(count.squeeze(axis), center.squeeze(axis), offset.squeeze(axis), m2)


def finite(m2: jax.Array) -> jax.Array:
    """Clip overflow, so that beyond 1e18 the result is finite, if no longer exact; NaN stays NaN."""
    return jnp.minimum(m2, jnp.finfo(m2.dtype).max)


# --- named axes --------------------------------------------------------------------------------------------------------------

AxisNames = tuple[Hashable, ...]
Groups = tuple[tuple[int, ...], ...] | None


def canonical_axis_names(
    axis_name: Hashable | Sequence[Hashable] | None, axis_index_groups: Sequence[Sequence[int]] | None, called: str = "axis_name"
) -> tuple[AxisNames, Groups]:
    """Check `axis_name`, which may be `called` otherwise, and `axis_index_groups` against the axes that are bound here; as tuples."""
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError("axis_index_groups was given without axis_name; pass the name of the axis that the groups divide.")
        return (), None
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not all(isinstance(name, Hashable) for name in names):
        raise TypeError(f"{called} must be a name or a tuple of names, got {axis_name!r}.")
    if len(set(names)) != len(names):
        raise ValueError(f"{called}={axis_name!r} names an axis twice.")
    sizes = bound_axis_sizes()
    for name in names:
        _check_bound(name, sizes, called)
    if axis_index_groups is None:
        return names, None
    if len(names) != 1:
        raise ValueError(f"axis_index_groups divide a single named axis, but axis_name is {names!r}; pass one name.")
    groups = _indices(axis_index_groups)
    if sorted(i for group in groups for i in group) != list(range(sizes[names[0]])):
        raise ValueError(f"axis_index_groups must hold every index of axis {names[0]!r} (0 to {sizes[names[0]] - 1}) once, got {groups}.")
    if len({len(group) for group in groups}) != 1:
        raise ValueError(f"axis_index_groups must be of equal size, got sizes {[len(group) for group in groups]}.")
    return names, groups


def _indices(groups: Any) -> tuple[tuple[int, ...], ...]:
    try:
        return tuple(tuple(operator.index(i) for i in group) for group in groups)
    except TypeError:
        raise TypeError(f"axis_index_groups must be a sequence of groups of ints, such as [[0, 1], [2, 3]], got {groups!r}.") from None


def _check_bound(name: Hashable, sizes: dict, called: str) -> None:
    if name in mesh_axes() - set(sizes):
        raise ValueError(
            f"{called} {name!r} is not bound here: it is an axis of the mesh that the compiler partitions over, where statistics are "
            "global without axis_name. Leave it out, or call inside jax.shard_map over that axis."
        )
    if name not in sizes:
        bound = ", ".join(map(repr, sizes)) or "none"
        raise ValueError(
            f"{called} {name!r} is not bound here (bound: {bound}). Call inside jax.pmap, jax.shard_map or jax.vmap with that "
            "axis name, or leave axis_name out; under jit over sharded arrays statistics are global without it."
        )
    if types_track_varying() and name not in manual_axes():
        raise ValueError(
            f"{called} {name!r} belongs to a jax.vmap inside jax.shard_map with check_vma=True, where JAX cannot run a collective "
            "over it. Use check_vma=False, or swap the two."
        )


def participants(names: AxisNames, groups: Groups) -> int:
    return len(groups[0]) if groups else math.prod(lax.axis_size(n) for n in names)


def gathers(values: Sequence[jax.Array], names: AxisNames, groups: Groups = None) -> bool:
    """Whether everybody's values are few enough to be gathered. Where JAX takes no groups, those of all groups are."""
    senders = participants(names, groups if groups and _collectives_take_groups(names[0]) else None)
    return senders <= GATHER_LIMIT and senders * sum(v.nbytes for v in values) <= GATHER_BYTES


def _collectives_take_groups(name: Hashable) -> bool:
    # psum and all_gather refuse groups under vmap and where types track what varies.
    return name in manual_axes() and not types_track_varying()


def _place(groups: tuple[tuple[int, ...], ...], name: Hashable) -> tuple[jax.Array, jax.Array]:
    """This participant's group, and the members of that group."""
    group_of = np.empty(sum(map(len, groups)), np.int32)
    for g, members in enumerate(groups):
        group_of[list(members)] = g
    mine = jnp.asarray(group_of)[lax.axis_index(name)]
    return mine, jnp.asarray(groups)[mine]


def _gather(v: jax.Array, names: AxisNames, groups: Groups = None, partitioned: bool = False) -> jax.Array:
    """Stack everybody's v along a new leading axis; the result is typed as replicated where types are tracked."""
    # Tiled: to a new axis JAX mistakes which axes are split over explicit axes of the mesh.
    if groups and _collectives_take_groups(names[0]):
        return lax.all_gather(v[None], names[0], axis_index_groups=groups, tiled=True)
    if groups:
        return _gather(v, names)[_place(groups, names[0])[1]]
    tracked = [n for n in names if n in varying_axes(v)]
    rest = [n for n in names if n not in tracked]
    of_mesh = [n for n in rest if partitioned or n in manual_axes()]
    v = v[None]
    for n in rest:
        # vmap gathers over one name at a time.
        if n not in of_mesh:
            v = lax.all_gather(v, n, tiled=True)
    if of_mesh and types_track_varying():
        # Everybody holds the same v.
        members = math.prod(lax.axis_size(n) for n in of_mesh)
        v = jnp.broadcast_to(v, (members, *v.shape)).reshape(members * v.shape[0], *v.shape[1:])
    elif of_mesh:
        # Not with to="invarying": what JAX transposes inside pmap is then silently wrong.
        v = lax.all_gather(v, tuple(of_mesh), tiled=True)
    return lax.all_gather(v, tuple(tracked), tiled=True, to="invarying") if tracked else v


def _sum_over(v: jax.Array, names: AxisNames, groups: Groups) -> jax.Array:
    if groups is None:
        # psum takes what varies over all of the names; what is the same everywhere counts once for each participant.
        alike = tuple(n for n in names if n not in varying_axes(v)) if types_track_varying() else ()
        return lax.psum(lax.pcast(v, alike, to="varying") if alike else v, names)
    if _collectives_take_groups(names[0]):
        return lax.psum(v, names[0], axis_index_groups=groups)
    mine = _place(groups, names[0])[0]
    slots = jnp.arange(len(groups)).reshape(-1, *(1,) * v.ndim) == mine
    return lax.psum(jnp.where(slots, v[None], 0), names)[mine]


def all_sum(values: Sequence[jax.Array], names: AxisNames, groups: Groups = None) -> list[jax.Array]:
    """Sum each array over the named axes, all of them in one all-reduce."""
    if not names:
        return list(values)
    flat = _sum_over(jnp.concatenate([v.ravel() for v in values]), names, groups)
    ends = np.cumsum([v.size for v in values])[:-1]
    return [part.reshape(v.shape) for part, v in zip(jnp.split(flat, ends), values, strict=True)]


def all_stack(values: Sequence[jax.Array], names: AxisNames, groups: Groups = None) -> jax.Array | None:
    """Everybody's arrays of one shape, in one all-gather: (participants, arrays, ...). None where that is too much."""
    return _gather(jnp.stack(values), names, groups) if gathers(values, names, groups) else None


def max_over(value: jax.Array, names: Collection[Hashable]) -> jax.Array:
    """The largest of the devices of the named axes, over which its type must vary."""
    return lax.pmax(value, tuple(names)) if names else value


def all_concatenate(values: Sequence[jax.Array], names: AxisNames, axis: int) -> list[jax.Array]:
    """Join everybody's part of each array, all of one shape, along an axis, in one all-gather; the names as in `partitioned` below."""
    return list(lax.all_gather(jnp.stack(values), names, axis=axis + 1, tiled=True)) if names else list(values)


def all_combine(stats: Stats, names: AxisNames, groups: Groups = None, partitioned: bool = False) -> Stats:
    """Merge statistics over the named axes: one all-gather, or two all-reduces above 64 participants or 4 MiB.

    `partitioned`: the names are mesh axes inside one device's part of a program that the compiler partitions.
    """
    if not names:
        return stats
    if gathers(stats, names, groups):
        packed = _gather(jnp.stack(stats), names, groups, partitioned)
        return combine(Stats(*(packed[:, i] for i in range(4))), 0)
    count, weighted = all_sum([stats.count, stats.count * stats.center], names, groups)
    near_mean = weighted / jnp.maximum(count, 1)
    deviation = jnp.where(stats.count > 0, (stats.center - near_mean) + stats.offset, 0)
    first, second = all_sum([stats.count * deviation, stats.m2 + stats.count * deviation**2], names, groups)
    shift = first / jnp.maximum(count, 1)
    center, offset = two_sum(near_mean, shift)
    # What has overflowed stays so: infinity less infinity is not a number.
    m2 = jnp.where(second == jnp.inf, second, jnp.maximum(second - count * shift**2, 0))
    return Stats(count, center, offset, finite(m2))
