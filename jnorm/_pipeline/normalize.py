"""The one differentiable unit: statistics of x, a norm's map of them, and the map applied to x."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from .._jax_internals import align, zeros_of
from .._kernels import column
from .._kernels._forms import reciprocal
from .._stats import Stats, all_sum
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Map, Mask
from .arguments import Across, broadcast_mask, check_activation, check_dtype, check_residual, check_x
from .axes import Layout
from .moments import keepdims_moments, stats_tangent


class _Unit(NamedTuple):
    """What is static about one call of the unit."""

    map: Map
    layout: Layout
    across: Across
    act: str | None
    dtype: Any
    output: bool
    """Whether y is kept for the derivative, in place of x."""

    def mapped(self, stats: Stats, aux: Any) -> tuple[jax.Array, ...]:
        """The map's results, of x's rank: shift, mul and add of one shape, then scale and bias where there are any."""
        out = self.map(jax.tree.map(self.layout.squeeze, stats), aux)
        if not isinstance(out, tuple | list) or len(out) not in (3, 5):
            raise ValueError("map must return (shift, mul, add) or (shift, mul, add, scale, bias).")
        dtype = stats.center.dtype
        views = [self.layout.expand(jnp.asarray(v).astype(dtype)) for v in out]
        shape = self._shape_of_map(stats.center.shape, [v.shape for v in views])
        return (*(jnp.broadcast_to(v, shape) for v in views[:3]), *views[3:])

    def _shape_of_map(self, stats: tuple[int, ...], shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The common shape of shift, mul and add, all shapes being of x's rank."""
        try:
            shape = jnp.broadcast_shapes(stats, *shapes[:3])
            fits = jnp.broadcast_shapes(self.layout.shape, shape, *shapes[3:]) == self.layout.shape
        except ValueError:
            shape, fits = (), False
        if not fits:
            raise ValueError(
                f"map returned arrays of shapes {shapes} (seen with x's rank), which must broadcast against the statistics, {stats}, "
                f"or against x, {self.layout.shape}."
            )
        return shape

    def operands(
        self, x: jax.Array, stats: Stats, mapped: tuple, residual: jax.Array | None, mask: jax.Array | None, output: bool = False
    ) -> column.Operands:
        """Of x, or with `output` of y in its place."""
        scale, bias = mapped[3:] or (None, None)
        shift, mul, add = mapped[:3]
        inverse = reciprocal(mul) if output else None
        return column.Operands(x, stats.center, stats.offset, shift, mul, add, scale, bias, residual, mask, inverse)

    def apply(self, operands: column.Operands) -> jax.Array:
        return column.apply(*operands.present(), act=self.act, dtype=self.dtype, **operands.params())[0]

    def tangent(
        self, x: jax.Array, aux: Any, residual: Any, mask: Any, stats: Stats, *, fixed: bool, dx: Any, daux: Any, dres: Any
    ) -> jax.Array:
        """The derivative of y, in ops whose transposes are two passes over x, or over y with `output`. A tangent of None is zero."""
        mapped = self.mapped(stats, aux)
        # Without an activation the residual only passes through, and need not be kept.
        o = self.operands(x, stats, mapped, residual if self.act else None, mask, self.output)
        params = {"act": self.act, "dtype": self.dtype, **o.params()}
        dstats, terms = jax.tree.map(jnp.zeros_like, stats), []
        if dx is not None or (dres is not None and self.act):
            linear = [jnp.zeros_like(x) if dx is None else dx]
            if o.residual is not None:
                linear.append(jnp.zeros_like(o.residual) if dres is None else dres)
            through, *sums = column.fork(*linear, *o.present(), **params)
            terms.append(through)
            if not fixed and dx is not None:
                dstats = stats_tangent(stats, *all_sum(sums, *self.across))
        if dres is not None and not self.act:
            terms.append(dres.astype(self.dtype))
        _, (dshift, dmul, dadd, *daffine) = jax.jvp(self.mapped, (stats, aux), (dstats, daux))
        pq = jnp.stack([dadd - o.mul * dshift + (stats.offset - o.shift) * dmul, dmul])
        # One cast of both to x's type, so that its transpose is one all-reduce.
        p, q = align([pq, x])[0]
        terms.append(column.spread(p, q, *daffine, *o.present(), **params)[0])
        return functools.reduce(jnp.add, terms)


def _or_none(t: Any) -> Any:
    return None if isinstance(t, SymbolicZero) else t


def _or_zeros(t: Any) -> Any:
    return zeros_of(t.aval) if isinstance(t, SymbolicZero) else t


def run(
    x: jax.Array,
    map: Map,
    aux: Any,
    layout: Layout,
    across: Across,
    *,
    mask: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
    fixed: Stats | None = None,
    output: bool = False,
) -> tuple[jax.Array, Stats]:
    """The unit over checked arguments; with `fixed` statistics, of x's rank, none are taken. Statistics come back of x's rank.

    With `output`, y is kept in place of x: the map's mul must not be so small that x is lost in y's rounding.
    """
    act = check_activation(activation)
    unit = _Unit(map, layout, across, act, dtype, output)

    def forward(x: jax.Array, aux: Any, residual: Any, mask: Any, fixed: Any) -> tuple[jax.Array, Stats]:
        stats = keepdims_moments(x, mask, layout.reduced, across) if fixed is None else fixed
        return unit.apply(unit.operands(x, stats, unit.mapped(stats, aux), residual, mask)), stats

    differentiable = jax.custom_jvp(forward)

    @functools.partial(differentiable.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple:
        y, stats = forward(*primals)
        x, aux, residual, mask, fixed = primals
        is_zero = {"is_leaf": lambda t: isinstance(t, SymbolicZero)}
        dx, daux, dres = (_or_none(tangents[0]), jax.tree.map(_or_zeros, tangents[1], **is_zero), _or_none(tangents[2]))
        # Checkpointed, so that of small arrays too only the statistics are kept, and not what the map makes of them.
        tangent = jax.checkpoint(functools.partial(unit.tangent, fixed=fixed is not None), prevent_cse=False)
        dy = tangent(y if output else x, aux, residual, mask, stats, dx=dx, daux=daux, dres=dres)
        return (y, stats), (dy, jax.tree.map(jnp.zeros_like, stats))

    y, stats = differentiable(x, aux, residual, mask, lax.stop_gradient(fixed))
    return (activation(y) if callable(activation) else y), stats


def normalize(
    x: jax.Array,
    map: Map,
    aux: Any,
    *,
    reduction_axes: Axes,
    feature_axes: Axes,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    residual: jax.Array | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, Stats]:
    r"""Normalize x by any map of its statistics: the unit that every norm of jnorm is made of, for norms of your own.

    .. math:: y &= \text{act}\left((x - \text{center} - \text{shift})\cdot\text{mul} + \text{add} + \text{residual}\right) \\
              (\text{shift}, \text{mul}, \text{add}) &= \text{map}(\text{stats}, \text{aux})

    Args:
      x: floating, any shape.
      map: `map(stats, aux) -> (shift, mul, add)`, each of which broadcasts against the arrays of `stats`, or has x's rank and broadcasts
        against x. To subtract the mean, shift is `stats.offset`. Where a scale lies along reduced axes (as in layer norm), return
        `(shift, mul, add, scale, bias)`: y = act(((x - center - shift)·mul + add)·scale + bias + residual), both of x's rank. The map must
        not close over traced values: they go into `aux`.
      aux: any tree of arrays, such as `(scale, bias)`; differentiable.
      reduction_axes: the axes to take statistics over.
      feature_axes: the arrays of statistics have the shape (kept axes that are not features, kept feature axes).
      mask: broadcasts against x; nonzero counts. A non-finite x elsewhere is read as the value of the mean, which is
        a constant to the derivative.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count.
      axis_index_groups: groups of equal size within that axis.
      residual: of x's shape, added before the activation.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable (applied after, its input is kept).
      dtype: y's dtype; x's where None.

    Returns:
      y, and the merged :class:`Stats` of x, through which no gradient flows.

    Raises:
      ValueError, TypeError: as the norms do; also for a map whose results do not fit.

    Numerics:
      Statistics in at least float32, the mean as two floats; only y is cast. Kept for the backward pass: x, and the residual where a named
      activation follows it.

    Distributed:
      One packed all-gather forward (two all-reduces above 64 participants or 4 MiB), one all-reduce backward.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, jnorm
      >>> def map(stats, aux):  # divide by the root mean square of each channel
      ...     scale, = aux
      ...     return -stats.center, scale * jax.lax.rsqrt(stats.var + stats.mean**2), jnp.zeros_like(stats.mean)
      >>> y, stats = jnorm.normalize(jnp.array([[3.0], [4.0]]), map, (jnp.ones(1),), reduction_axes=0, feature_axes=-1)
      >>> print(np.asarray(y).ravel().round(3))
      [0.849 1.131]

    References:
      Ioffe, Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, for the map that started it.
    """
    x = check_x(x)
    if not callable(map):
        raise TypeError(f"map must be a function of statistics and aux, got {type(map).__name__}.")
    layout = Layout.of(x, reduction_axes, feature_axes)
    across = Across.of(axis_name, axis_index_groups)
    y, stats = run(
        x, map, aux, layout, across,
        mask=broadcast_mask(mask, x), residual=check_residual(residual, x), activation=activation, dtype=check_dtype(dtype, x),
    )  # fmt: skip
    return y, jax.tree.map(layout.squeeze, stats)


def affine(mul: jax.Array, scale: jax.Array | None, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The mul and add of a map from 1/s, scale and bias, which have the shape of the features: the last axes of the statistics."""

    def aligned(v: jax.Array) -> jax.Array:
        return v.reshape((1,) * (mul.ndim - v.ndim) + v.shape)

    return mul if scale is None else mul * aligned(scale), jnp.zeros_like(mul) if bias is None else aligned(bias)
