"""What norms over a batch share: their arguments, checked once, and normalization with running statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._jax_internals import lying_along
from .._stats import Stats
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Map, Mask, Save
from .arguments import (
    Across,
    away_from_zero,
    broadcast_mask,
    check_activation,
    check_affine,
    check_dtype,
    check_given,
    check_residual,
    check_save,
    check_switches,
    check_x,
)
from .axes import Layout, canonical_axes, others
from .moments import keepdims_moments
from .normalize import run


class Batch(NamedTuple):
    """The checked arguments of one call of a norm over a batch."""

    x: jax.Array
    layout: Layout
    across: Across
    scale: jax.Array | None
    bias: jax.Array | None
    mask: jax.Array | None
    residual: jax.Array | None
    activation: Activation | None
    dtype: Any
    output: bool
    evaluates: bool
    """Whether running statistics normalize."""
    updates: bool
    """Whether they move."""
    given: Stats | None = None
    """Statistics that normalize in place of those of x, of the shape of the features."""

    @classmethod
    def of(
        cls,
        name: str,
        x: Any,
        state: Any,
        scale: Any,
        bias: Any,
        *,
        use_running_average: Any,
        update_running: Any,
        feature_axes: Axes,
        mask: Mask | None,
        axis_name: AxisName | None,
        axis_index_groups: AxisIndexGroups | None,
        activation: Activation | None,
        residual: Any,
        dtype: Any,
        save: Save,
        allow_complex: bool = False,
        statistics: Any = None,
    ) -> "Batch":
        x = check_x(x, allow_complex=allow_complex)
        features = canonical_axes(feature_axes, x.ndim, "feature_axes")
        layout = Layout(x.shape, others(x.ndim, features), features)
        if jnp.iscomplexobj(x) and check_activation(activation):
            raise TypeError(f"activation {activation!r} is for real x; pass a callable of complex arrays.")
        evaluates, updates = check_switches(use_running_average, update_running, state)
        given = check_given(statistics, layout, x, bool(use_running_average))
        takes = given is None and (updates or not evaluates)
        across = Across.of(axis_name, axis_index_groups, needed=takes)
        if takes and not layout.reduced and not across.names:
            raise ValueError(
                f"{name} has no axis to reduce: feature_axes={feature_axes!r} are all of x's {x.ndim} axes. "
                "One example alone has no batch statistics: give x a batch axis, or the batch's axis_name under vmap."
            )
        residual, dtype = check_residual(residual, x), check_dtype(dtype, x)
        output = check_save(save, x, dtype, activation, residual)
        scale, bias = (check_affine(v, of, layout, x) for v, of in ((scale, "scale"), (bias, "bias")))
        return cls(
            x,
            layout,
            across,
            away_from_zero(scale) if output else scale,
            bias,
            broadcast_mask(mask, x),
            residual,
            activation,
            dtype,
            output,
            evaluates,
            updates,
            given,
        )

    def run(self, map: Map, aux: Any, running_mean: jax.Array) -> tuple[jax.Array, Stats]:
        """y and the statistics of the batch, which in evaluation are taken only if they update the state.

        In evaluation the map gets statistics that count nothing, around the running mean; where some are given, around theirs, and takes
        those given, through which the gradient flows, from aux.
        """
        aux, running_mean = self._beside_features((aux, running_mean))
        y, stats = run(
            self.x,
            map,
            aux,
            self.layout,
            self.across,
            mask=self.mask,
            residual=self.residual,
            activation=self.activation,
            dtype=self.dtype,
            fixed=self._fixed(running_mean),
            output=self.output,
        )
        if self.given is not None:
            return y, self.given
        if self.evaluates and self.updates:
            stats = keepdims_moments(self.x, self.mask, self.layout.reduced, self.across)
        return y, jax.tree.map(self.layout.squeeze, stats)

    def _beside_features(self, tree: Any) -> Any:
        """With x's sharding in the types of what is by feature, as the statistics have it: running ones may lie otherwise."""

        def beside(a: jax.Array) -> jax.Array:
            features = self.layout.feature_shape
            return lying_along(a, self.x, self.layout.features) if a.shape[a.ndim - len(features) :] == features else a

        return jax.tree.map(beside, tree)

    def _fixed(self, running_mean: jax.Array) -> Stats | None:
        if self.evaluates:
            return _around(running_mean, jnp.zeros_like(running_mean), self.layout)
        if self.given is None:
            return None
        counted = self.given.count > 0
        center, offset = jnp.where(counted, self.given.center, running_mean), jnp.where(counted, self.given.offset, 0)
        return _around(center, offset, self.layout)


def _around(center: jax.Array, offset: jax.Array, layout: Layout) -> Stats:
    """Statistics that count nothing, around a mean that is a constant to the derivative."""
    center, offset = (lax.stop_gradient(layout.expand(a)) for a in (center, offset))
    zero = jnp.zeros_like(center)
    return Stats(zero, center, offset, zero)
