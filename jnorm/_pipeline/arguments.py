"""Checks of the arguments that all norms share: what is static is refused here, at trace time."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from .._jax_internals import bound_axis_sizes, lying_along
from .._kernels._forms import ACTIVATIONS, INVERTIBLE
from .._stats import AxisNames, Groups, Stats, canonical_axis_names, stats_dtype
from ..typing import Activation, AxisIndexGroups, AxisName, Mask, Save
from .axes import Layout
from .marks import STATISTICS, UPDATES, marks_of
from .values import as_array, as_dtype


class Across(NamedTuple):
    """The named axes that statistics are merged over."""

    names: AxisNames = ()
    groups: Groups = None

    @classmethod
    def of(
        cls, axis_name: AxisName | None, axis_index_groups: AxisIndexGroups | None, needed: bool = True, called: str = "axis_name"
    ) -> "Across":
        """Where they are not `needed`, as in evaluation, which merges nothing, names that are not bound are none."""
        if not needed and axis_name is not None and not _are_bound(axis_name):
            return cls()
        return cls(*canonical_axis_names(axis_name, axis_index_groups, called))


def _are_bound(axis_name: AxisName) -> bool:
    names, sizes = axis_name if isinstance(axis_name, tuple | list) else (axis_name,), bound_axis_sizes()
    return all(isinstance(name, Hashable) and name in sizes for name in names)


def check_x(x: Any, allow_complex: bool = False, name: str = "x") -> jax.Array:
    x = as_array(x, name)
    kinds = (jnp.floating, jnp.complexfloating) if allow_complex else (jnp.floating,)
    if not any(jnp.issubdtype(x.dtype, k) for k in kinds):
        hint = "only batch_norm takes complex x" if jnp.iscomplexobj(x) else f"convert it first, such as {name}.astype(jnp.float32)"
        raise TypeError(f"{name} must be of a floating dtype, got {x.dtype}; {hint}.")
    return x


def check_state_dtype(dtype: Any) -> None:
    """Of a state that is made for real x."""
    dtype = as_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        hint = "; only batch_norm takes complex x" if jnp.issubdtype(dtype, jnp.complexfloating) else ""
        raise TypeError(f"dtype must be floating, got {dtype}{hint}.")


def check_activation(activation: Activation | None) -> str | None:
    """The name of a fused activation; None for a callable, which is applied after the unit."""
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; pass one of {sorted(ACTIVATIONS)} or a callable.")
    if not (activation is None or isinstance(activation, str) or callable(activation)):
        raise TypeError(f"activation must be None, a name out of {sorted(ACTIVATIONS)} or a callable, got {activation!r}.")
    return activation if isinstance(activation, str) else None


def check_save(save: Save, x: jax.Array, dtype: Any, activation: Activation | None, residual: Any = None) -> bool:
    """Whether y is kept for the backward pass in place of x, from which x must be told."""
    if save not in ("input", "output"):
        raise ValueError(f'save must be "input" or "output", got {save!r}.')
    if save == "input":
        return False
    named = check_activation(activation)
    if named not in INVERTIBLE:
        raise ValueError(
            f'save="output" cannot tell x from the output of {named!r}; use "leaky_relu", None, or a callable, which is applied after '
            "and keeps its own input."
        )
    if residual is not None:
        raise ValueError('save="output" cannot tell x from an output that a residual was added to; add it after the norm.')
    if jnp.iscomplexobj(x):
        raise TypeError('save="output" is for real x.')
    if dtype != x.dtype:
        raise ValueError(f'save="output" keeps y in place of x, so that dtype must be that of x, {x.dtype}, got {jnp.dtype(dtype)}.')
    return True


# A scale below it is taken for it where x is told from the output: in float32, with a bias of up to 1, xhat then has 13 bits or more.
SMALLEST_SCALE = 2.0**-10


def away_from_zero(scale: jax.Array | None) -> jax.Array | None:
    """sign(scale)·max(|scale|, SMALLEST_SCALE), whose derivative is taken to be 1: a scale that starts at 0 has to be able to leave."""
    if scale is None:
        return None
    smallest = jnp.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE).astype(scale.dtype)
    return jnp.where(jnp.abs(scale) < SMALLEST_SCALE, smallest + (scale - lax.stop_gradient(scale)), scale)


def check_flag(value: Any, name: str) -> bool:
    """A static switch: what it chooses is compiled."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is static and must be a Python bool; mark it so in jax.jit, with static_argnames.")
    if not isinstance(value, int | np.bool_) or value not in (0, 1):
        raise TypeError(f"{name} must be a bool, got {value!r}.")
    return bool(value)


def check_switches(use_running_average: Any, update_running: Any, state: Any) -> tuple[bool, bool]:
    """Whether running statistics normalize, and whether they move: by default exactly in training. The marks of the state go before."""
    evaluates, marks = check_flag(use_running_average, "use_running_average"), marks_of(state)
    updates = not evaluates if update_running is None else check_flag(update_running, "update_running")
    return evaluates or STATISTICS in marks, updates and UPDATES not in marks


def check_epsilon(epsilon: float) -> float:
    if isinstance(epsilon, Tracer):
        raise TypeError("epsilon is static and must be a Python number; mark it so in jax.jit, with static_argnames.")
    if not isinstance(epsilon, int | float | np.number):
        raise TypeError(f"epsilon must be a number, got {epsilon!r}.")
    if not float(epsilon) >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}.")
    return float(epsilon)


def check_residual(residual: Any, x: jax.Array) -> jax.Array | None:
    if residual is None:
        return None
    residual = as_array(residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {x.shape}, got {residual.shape}.")
    if jnp.iscomplexobj(residual) != jnp.iscomplexobj(x) or not jnp.issubdtype(residual.dtype, jnp.inexact):
        raise TypeError(f"residual must be of x's kind, floating or complex; x is {x.dtype}, residual {residual.dtype}.")
    return residual


def check_affine(value: Any, name: str, layout: Layout, x: jax.Array, of: str = "x") -> jax.Array | None:
    """Scale or bias, in the statistics' dtype."""
    if value is None:
        return None
    value = as_array(value, name)
    if value.shape != layout.feature_shape:
        raise ValueError(
            f"{name} must have the shape of {of}'s feature axes {layout.feature_shape}, got {value.shape}; {of} has shape {layout.shape}."
        )
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real, got {value.dtype}.")
    # Fully sharded training has it in parts that are not those of x.
    return lying_along(value.astype(jnp.finfo(stats_dtype(x.dtype)).dtype), x, layout.features)


def check_statistics(statistics: Any) -> Stats:
    """Real arrays of one shape, of a dtype of statistics."""
    if not isinstance(statistics, Stats):
        raise TypeError(
            f"statistics must be jnorm.Stats, which jnorm.moments, combine and accumulated_moments return, got {type(statistics).__name__}."
        )
    stats = Stats(*map(jnp.asarray, statistics))
    if len({a.shape for a in stats}) != 1:
        raise ValueError(f"the arrays of statistics must be of one shape, got {[a.shape for a in stats]}.")
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in stats):
        raise TypeError(f"statistics must be floating, got {[str(a.dtype) for a in stats]}.")
    return jax.tree.map(lambda a: a.astype(stats_dtype(stats.center.dtype)), stats)


def check_given(statistics: Any, layout: Layout, x: jax.Array, evaluates: bool) -> Stats | None:
    """Statistics to normalize x with in place of its own, in their dtype."""
    if statistics is None:
        return None
    if evaluates:
        raise ValueError(
            "statistics are to normalize with, but use_running_average=True says that the running ones do; give one of the two. "
            "jnorm.update_running moves running statistics by given ones."
        )
    if jnp.iscomplexobj(x):
        raise TypeError("statistics are for real x.")
    stats = check_statistics(statistics)
    if stats.mean.shape != layout.feature_shape:
        raise ValueError(
            f"statistics must have the shape of x's feature axes {layout.feature_shape}, got {stats.mean.shape}; x has shape "
            f"{layout.shape}. They are taken over all other axes, and over the micro-batches."
        )
    return jax.tree.map(lambda a: a.astype(stats_dtype(x.dtype)), stats)


def check_dtype(dtype: Any, x: jax.Array) -> jnp.dtype:
    """y's dtype."""
    result = x.dtype if dtype is None else as_dtype(dtype)
    if not jnp.issubdtype(result, jnp.complexfloating if jnp.iscomplexobj(x) else jnp.floating):
        raise TypeError(f"dtype must be {'complex' if jnp.iscomplexobj(x) else 'floating'}, as x ({x.dtype}) is, got {result}.")
    return result


def broadcast_mask(mask: Mask | None, x: jax.Array) -> jax.Array | None:
    """The mask as bool, of x's rank."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    try:
        fits = jnp.broadcast_shapes(mask.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast against x of shape {x.shape}; "
            "it must have at most x's axes, aligned at the last, each of x's size or 1."
        )
    return mask.astype(bool).reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
