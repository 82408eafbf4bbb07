"""Statistics of earlier iterations, brought to the kernel of the present one, and the ring buffer that holds them.

For an output x = W·p of a linear layer, p the patch of the inputs that it sees, the mean moves with W by (mean of p)·ΔW exactly, and the
variance has the derivative 2·c with c = mean of (x - μ)·p. Both are kept for each iteration, and the kernel that they belong to.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from .._jax_internals import align, lying_as, replicated, varying_axes, with_sharding_of
from .._stats import Stats, all_sum, max_over
from ..typing import WindowRule
from .batch import Batch

LinearOp = Callable[[Any, Any], Any]


def slot_shapes(kernel: tuple[int, ...], slots: int, num_groups: int, exact: bool) -> dict[str, tuple[int, ...]]:
    """What is kept of each iteration, slots first. Patches are the same for all outputs of a group."""
    per_output = math.prod(kernel[:-1])
    second = {"covariances": (slots, num_groups, per_output, per_output)} if exact else {"slopes": (slots, *kernel)}
    features = (slots, kernel[-1])
    patches = (slots, *kernel[:-1], num_groups)
    return {"means": features, "vars": features, "patches": patches, **second, "kernels": (slots, *kernel), "counts": (slots,)}


def check_kernel_shape(kernel: tuple[int, ...], num_groups: Any, name: str) -> None:
    if not kernel:
        raise ValueError(f"{name} must have the axis of the outputs, its last, got a scalar.")
    if not isinstance(num_groups, int | np.integer) or num_groups < 1 or kernel[-1] % num_groups:
        raise ValueError(f"num_groups must be a positive divisor of the number of outputs, {kernel[-1]}, got {num_groups!r}.")


def check_window_size(window_size: Any, window: int) -> jax.Array:
    """None is the whole window. What is traced need not be clipped: no age is below 0, or as large as the window."""
    if window_size is None:
        return jnp.int32(window)
    if isinstance(window_size, Tracer | jax.Array | np.ndarray):
        if jnp.shape(window_size) != () or not jnp.issubdtype(window_size.dtype, jnp.integer):
            raise ValueError(f"window_size must be an integer scalar, got {window_size.dtype} of shape {jnp.shape(window_size)}.")
        return jnp.asarray(window_size).astype(jnp.int32)
    if isinstance(window_size, bool) or not isinstance(window_size, int | np.integer) or not 1 <= window_size <= window:
        raise ValueError(
            f"window_size must be an int from 1 to {window}, the window that the state was made with (an iteration counts itself), "
            f"got {window_size!r}."
        )
    return jnp.int32(window_size)


def check_slots(state: Mapping[str, Any], kernel: tuple[int, ...], num_groups: int, made_by: str) -> int:
    """The shapes of the buffers, by the kernel; how many slots they have."""
    of_slots = jnp.shape(state["kernels"])
    if of_slots[1:] != kernel or not of_slots:
        raise ValueError(
            f"kernel has shape {kernel}, but the state was made for kernels of shape {of_slots[1:]}; make it with "
            f"jnorm.{made_by}(kernel.shape)."
        )
    groups = jnp.shape(state["patches"])[-1:]
    if groups != (num_groups,):
        raise ValueError(
            f"num_groups is {num_groups}, but the state was made with num_groups={groups[0] if groups else 0}: give both the groups of "
            "the layer's inputs (feature_group_count)."
        )
    shapes = slot_shapes(kernel, of_slots[0], num_groups, "covariances" in state) | {"index": ()}
    for key, shape in shapes.items():
        if jnp.shape(state[key]) != shape:
            raise ValueError(f"state[{key!r}] must have shape {shape}, got {jnp.shape(state[key])}; make the state with jnorm.{made_by}.")
        kind = jnp.integer if key == "index" else jnp.floating
        if not jnp.issubdtype(jnp.result_type(state[key]), kind):
            raise TypeError(f"state[{key!r}] must be {'an integer' if key == 'index' else 'floating'}, got {jnp.result_type(state[key])}.")
    return of_slots[0]


# --- what earlier iterations would have with this kernel ----------------------------------------------------------------------


def brought_to(state: Mapping[str, Any], kernel: jax.Array, compensation: Any, window_size: jax.Array, rule: WindowRule) -> Stats:
    """The statistics in the slots with what the kernel's change makes of them: (slots, C), counting nothing where not in the window."""
    slots = {k: jnp.asarray(a).astype(kernel.dtype) for k, a in state.items() if k != "index"}
    slots, kernel, compensation = lax.stop_gradient((slots, kernel, compensation))
    change = jnp.asarray(compensation).astype(kernel.dtype) * (kernel[None] - slots["kernels"])
    shift = _over_inputs(_for_outputs(slots["patches"], kernel.shape[-1]) * change)
    if "covariances" in slots:
        var = slots["vars"] + _quadratic(slots["covariances"], change, 2 * slots["kernels"] + change)
    else:
        var = slots["vars"] + 2 * _over_inputs(slots["slopes"] * change) - shift**2
    index, number = jnp.asarray(state["index"]).astype(jnp.int32), len(slots["counts"])
    age = (index - 1 - jnp.arange(number, dtype=jnp.int32)) % number  # of the newest 0
    counts = jnp.where(age < window_size - 1, slots["counts"], 0)[:, None]
    # An exact variance is below 0 by rounding only.
    drops = rule == "drop" and "covariances" not in slots
    counts = jnp.where(var < 0, 0, counts) if drops else jnp.broadcast_to(counts, var.shape)
    return Stats(counts, slots["means"] + shift, jnp.zeros_like(var), counts * jnp.maximum(var, 0))


def _over_inputs(a: jax.Array) -> jax.Array:
    return a.sum(tuple(range(1, a.ndim - 1)))


def _for_outputs(a: jax.Array, outputs: int) -> jax.Array:
    """From one of a group to one of each of its outputs, in the last axis."""
    return jnp.repeat(a, outputs // a.shape[-1], -1)


def _quadratic(covariances: jax.Array, one: jax.Array, two: jax.Array) -> jax.Array:
    """oneᵀ·Cov·two for each slot and output."""
    slots, groups, size, _ = covariances.shape
    one, two = (a.reshape(slots, size, groups, -1) for a in (one, two))
    with_two = jnp.einsum("sgkl,slgm->skgm", covariances, two, precision="highest")
    return (one * with_two).sum(1).reshape(slots, -1)


# --- the slot of this iteration ---------------------------------------------------------------------------------------------


def with_iteration(
    state: Mapping[str, Any], batch: Batch, stats: Stats, inputs: jax.Array, kernel: jax.Array, linear_op: LinearOp, num_groups: int
) -> dict[str, jax.Array]:
    """The buffers with this iteration in the place of the oldest one; as they were where it counted nothing."""
    shapes = slot_shapes(kernel.shape, len(state["counts"]), num_groups, "covariances" in state)
    old = {k: lax.stop_gradient(jnp.asarray(state[k])) for k in (*shapes, "index")}
    if not shapes["counts"][0]:
        return old
    x, stats, inputs, kernel = lax.stop_gradient((batch.x, stats, inputs, kernel))
    # The mask is the same for all features, also for those of other devices where they are split, and types say so.
    count = max_over(stats.count.max(initial=0), varying_axes(old["means"]) - varying_axes(old["counts"]))
    now = {"means": stats.mean, "vars": stats.var, "kernels": kernel, "counts": count}
    now |= _of_patches(batch._replace(x=x), stats, jnp.maximum(count, 1), inputs, kernel, linear_op, num_groups, "covariances" in state)
    index = old.pop("index")

    def put(buffer: jax.Array, a: jax.Array) -> jax.Array:
        before = lax.dynamic_index_in_dim(buffer, index, keepdims=False)
        a = lying_as(a, before)
        return lax.dynamic_update_index_in_dim(buffer, jnp.where(count > 0, a.astype(buffer.dtype), before), index, 0)

    # linear_op may close over what is differentiated.
    new = {key: put(buffer, lax.stop_gradient(now[key])) for key, buffer in old.items()}
    return new | {"index": jnp.where(count > 0, (index + 1) % len(old["counts"]), index)}


def _of_patches(
    batch: Batch, stats: Stats, count: jax.Array, inputs: jax.Array, kernel: jax.Array, linear_op: LinearOp, num_groups: int, exact: bool
) -> dict[str, jax.Array]:
    """The mean patch of each group, and the slopes or covariances: derivatives of the layer by its kernel, along what is counted."""
    # Values that are not finite are under the mask, or x and its statistics have them already.
    inputs = jnp.where(jnp.isfinite(inputs), inputs, 0)
    counted = True if batch.mask is None else batch.mask

    def along(weights: jax.Array, of_outputs: jax.Array) -> jax.Array:
        # Where types track what varies over devices, the derivative by what does not is summed over them already.
        weights, given, of_outputs = align([weights, inputs, of_outputs])
        out, vjp = jax.vjp(lambda w: linear_op(given, w), weights)
        return vjp(with_sharding_of((of_outputs / count).astype(out.dtype), jax.typeof(out)))[0]

    one_of_each = _shape_with(batch, num_groups)
    # Linear in the kernel: any will do, such as one that is the same on all devices.
    any_kernel = jnp.zeros((*kernel.shape[:-1], num_groups), kernel.dtype)
    patches = along(any_kernel, jnp.broadcast_to(jnp.asarray(counted, kernel.dtype), one_of_each))
    if exact:
        (patches,) = all_sum([patches], *batch.across)
        return {"patches": patches, "covariances": _covariances(batch, counted, patches, count, inputs, kernel.shape, linear_op)}
    centered = (batch.x.astype(kernel.dtype) - batch.layout.expand(stats.center)) - batch.layout.expand(stats.offset)
    slopes = along(kernel, jnp.where(counted, centered, 0))
    if varying_axes(patches) - set(batch.across.names) == varying_axes(slopes) - set(batch.across.names):
        patches, slopes = all_sum([patches, slopes], *batch.across)
    else:  # the patches are the same for the features of all devices, and must stay so
        (patches,), (slopes,) = (all_sum([a], *batch.across) for a in (patches, slopes))
    return {"patches": patches, "slopes": slopes}


def _shape_with(batch: Batch, features: int) -> tuple[int, ...]:
    return tuple(features if i in batch.layout.features else n for i, n in enumerate(batch.x.shape))


def _covariances(
    batch: Batch, counted: Any, mean: jax.Array, count: jax.Array, inputs: jax.Array, kernel: tuple[int, ...], linear_op: LinearOp
) -> jax.Array:
    """Patches are what kernels of a single 1 give, one for each place in a kernel and each group."""
    size, groups = math.prod(kernel[:-1]), mean.shape[-1]
    units = jnp.tile(jnp.eye(size, dtype=mean.dtype).reshape(*kernel[:-1], size), groups)
    (axis,) = batch.layout.features
    patches = linear_op(inputs, units).astype(mean.dtype)

    def in_groups(a: jax.Array) -> jax.Array:
        last = jnp.moveaxis(jnp.broadcast_to(a, patches.shape), axis, -1)
        return last.reshape(*last.shape[:-1], groups, size)

    centered = in_groups(patches) - mean.reshape(size, groups).swapaxes(0, 1).reshape((1,) * (patches.ndim - 1) + (groups, size))
    centered = jnp.where(in_groups(jnp.asarray(counted)), centered, 0)
    reduced = "".join(chr(ord("a") + i) for i in range(patches.ndim - 1))  # not merged into one axis, which may not be split over devices
    product = f"{reduced}yv,{reduced}yw->yvw"
    return all_sum([jnp.einsum(product, centered, centered / count, precision="highest", out_sharding=replicated())], *batch.across)[0]


def check_linear_op(linear_op: LinearOp, batch: Batch, inputs: jax.Array, kernel: jax.Array, num_groups: int) -> None:
    """That it gives x of the kernel, and of one output of each group."""
    for outputs in (kernel.shape[-1], num_groups):
        part = jax.ShapeDtypeStruct((*kernel.shape[:-1], outputs), kernel.dtype)
        try:
            got = jax.eval_shape(linear_op, jax.ShapeDtypeStruct(inputs.shape, inputs.dtype), part).shape
        except Exception as error:
            raise ValueError(
                f"linear_op fails for inputs of shape {inputs.shape} and a kernel of shape {part.shape}. It must take kernels of "
                f"{kernel.shape[-1]} outputs, and of num_groups={num_groups}: num_groups must be its number of groups "
                "(feature_group_count), and a layer in it must have as many features as the kernel that it is given."
            ) from error
        if got != _shape_with(batch, outputs):
            raise ValueError(
                f"x must be linear_op(inputs, kernel): x has shape {batch.x.shape}, but linear_op gives {got} of inputs {inputs.shape} "
                f"and a kernel {part.shape}, where {_shape_with(batch, outputs)} is needed."
            )
