"""Statistics of a batch that is seen in micro-batches, one at a time; differentiable."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._stats import Stats, all_combine, all_sum, combine
from ..typing import Axes, AxisIndexGroups, AxisName
from .arguments import Across
from .moments import moments, stats_tangent


def accumulated_moments(
    f: Callable[[Any], Any],
    batches: Any,
    reduction_axes: Axes,
    *,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Stats:
    r"""Statistics of f over all micro-batches of a batch, with the memory of one; differentiable.

    .. math:: n = \sum_k n_k, \qquad \text{mean} = \frac{1}{n}\sum_k n_k\,\text{mean}_k, \qquad
              m_2 = \sum_k m_{2,k} + n_k\,(\text{mean}_k - \text{mean})^2

    over the micro-batches k of all devices. Given to :func:`batch_norm` as `statistics`, they normalize each micro-batch as the whole batch
    would be, and the gradient through them is that of the whole batch: two sweeps over the micro-batches, for the statistics and for the
    loss, are one large batch.

    Args:
      f: what a norm normalizes, as a function of one micro-batch: the layers before it. It returns x, or (x, mask). Parameters that it
        closes over get their gradients.
      batches: a tree of arrays, stacked: the leading axis of each is that of the micro-batches.
      reduction_axes: the axes of x to reduce over; the micro-batches always are.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge over, by count.
      axis_index_groups: groups of equal size within that axis.

    Returns:
      :class:`Stats` whose arrays have the shape of the axes of x that are kept.

    Raises:
      ValueError: no micro-batches, or different numbers of them; axes, a mask or names that do not fit.
      TypeError: x is not floating; f is no function, or returns something else.

    Numerics:
      As :func:`moments` and :func:`combine`: merged by count, all at once, so that uneven and empty micro-batches (masks) weigh what they
      count. In the backward pass f runs again for each micro-batch: beside the batches, four numbers per feature and micro-batch are kept.

    Distributed:
      One packed all-gather of 4 numbers per statistic, after the last micro-batch, up to 64 participants, two all-reduces above; one
      all-reduce in the derivative. What f itself does, it does for each micro-batch.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> x = jnp.arange(12.0).reshape(6, 2)
      >>> whole = jnorm.batch_norm(x, jnorm.batch_norm_state(2))[0]
      >>> parts = x.reshape(3, 2, 2)  # three micro-batches
      >>> stats = jnorm.accumulated_moments(lambda x: x, parts, 0)
      >>> y, _ = jnorm.batch_norm(parts[1], jnorm.batch_norm_state(2), statistics=stats)
      >>> bool(jnp.allclose(y, whole[2:4]))
      True

    References:
      Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    across = Across.of(axis_name, axis_index_groups)
    if not callable(f):
        raise TypeError(f"f must be a function of one micro-batch that returns x, or (x, mask), got {type(f).__name__}.")
    _check_batches(batches)

    # The scan itself keeps a micro-batch from being computed twice at once.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_one(batch: Any) -> Stats:
        x, mask = _x_and_mask(f(batch))
        return moments(x, reduction_axes, mask=mask)

    return _merged(lax.map(of_one, batches), across)


def _x_and_mask(out: Any) -> tuple[Any, Any]:
    x, mask = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    if not jax.tree_util.all_leaves([x] if mask is None else [x, mask]):
        raise TypeError(f"f must return x, or (x, mask), each an array, got {jax.tree.structure(out)}.")
    return x, mask


def _check_batches(batches: Any) -> None:
    shapes = [jnp.shape(a) for a in jax.tree.leaves(batches)]
    numbers = {shape[0] for shape in shapes if shape}
    if not shapes or () in shapes or len(numbers) > 1:
        raise ValueError(f"batches must be arrays whose leading axis is that of the micro-batches, got the shapes {shapes}.")
    if numbers == {0}:
        raise ValueError(f"there are no micro-batches: batches have the shapes {shapes}.")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _merged(parts: Stats, across: Across) -> Stats:
    """Over the leading axis, and then over the named axes."""
    return all_combine(combine(parts, 0), *across)


@_merged.defjvp
def _merged_jvp(across: Across, primals: tuple, tangents: tuple) -> tuple[Stats, Stats]:
    """Σ count·(mean - the merged mean) = 0: what the merged mean does to m2 cancels."""
    (parts,), (dparts,) = primals, tangents
    stats = _merged(parts, across)
    deviation = jnp.where(parts.count > 0, (parts.center - stats.center[None]) + (parts.offset - stats.offset[None]), 0)
    first = parts.count * (dparts.center + dparts.offset)
    sums = all_sum([first.sum(0), (0.5 * dparts.m2 + deviation * first).sum(0)], *across)
    return stats, stats_tangent(stats, *sums)
