"""Where axes go through the operations of a traced model."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .graph import Step, Value, mark_p

Axes = tuple[int, ...]
# What gives out its operand as it is, but for its dtype or where it lies.
_SAME = {"convert_element_type", "copy", "copy_p", "name", "optimization_barrier", "pcast", "pvary", "reshard", "sharding_constraint"}
_SAME |= {"stop_gradient"}
PRODUCTS = ("conv_general_dilated", "dot_general")


class KeptError(Exception):
    """Why a norm cannot be folded."""


def forward(step: Step, axes: Axes) -> Axes | None:
    """Where these axes of the operand are in the result; None where that is another map than one of each position's place."""
    (shape, *_), (out, *_) = ([v.shape for v in vs] for vs in (step.inputs, step.outputs))
    match step.name:
        case "transpose":
            return tuple(step.params["permutation"].index(a) for a in axes)
        case "reshape" | "squeeze" | "expand_dims":
            return reshaped(axes, shape, out) if step.params.get("dimensions") is None or step.name != "reshape" else None
        case "broadcast_in_dim":
            to = step.params["broadcast_dimensions"]
            return tuple(to[a] for a in axes) if all(out[to[a]] == shape[a] for a in axes) else None
        case "pad":
            return axes if all(p == (0, 0, 0) for p in step.params["padding_config"]) else None
    return _in_place(step, axes)


def backward(step: Step, axes: Axes) -> Axes | None:
    """Where these axes of the result are in the operand; None as in `forward`. What is linear in all positions of a feature passes too."""
    (shape, *_), (out, *_) = ([v.shape for v in vs] for vs in (step.inputs, step.outputs))
    match step.name:
        case "transpose":
            return tuple(step.params["permutation"][a] for a in axes)
        case "reshape" | "squeeze" | "expand_dims":
            return reshaped(axes, out, shape) if step.params.get("dimensions") is None or step.name != "reshape" else None
        case "broadcast_in_dim":
            to = step.params["broadcast_dimensions"]
            return tuple(to.index(a) for a in axes) if all(a in to and out[a] == shape[to.index(a)] for a in axes) else None
        case "pad":
            whole = all(step.params["padding_config"][a] == (0, 0, 0) for a in axes)
            return axes if whole and _is_zero(step.inputs[1]) else None
        case "reduce_sum":
            left = [a for a in range(len(shape)) if a not in step.params["axes"]]
            return tuple(left[a] for a in axes)
    return _in_place(step, axes)


def _in_place(step: Step, axes: Axes) -> Axes | None:
    shape, params = step.inputs[0].shape if step.inputs else (), step.params
    if step.name in _SAME and len(step.inputs) == 1:
        return axes if _is_linear(step.inputs[0].dtype, step.outputs[0].dtype) else None
    if step.name == "rev":
        return None if set(axes) & set(params["dimensions"]) else axes
    if step.name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        whole = all((params["start_indices"][a], params["limit_indices"][a], strides[a]) == (0, shape[a], 1) for a in axes)
        return axes if whole else None
    return None


def _is_linear(dtype: Any, to: Any) -> bool:
    """Whether going from one dtype to the other is that but for rounding: not where integers or real parts are taken."""
    return jnp.issubdtype(dtype, jnp.floating if jnp.issubdtype(to, jnp.floating) else jnp.inexact) and jnp.issubdtype(to, jnp.inexact)


def reshaped(axes: Axes, shape: Sequence[int], to: Sequence[int]) -> Axes | None:
    """The axes after a reshape, which may cut them or join neighbors, in the same order of their elements."""
    runs: list[list[int]] = []
    for a in axes:
        if runs and runs[-1][-1] == a - 1:
            runs[-1].append(a)
        else:
            runs.append([a])
    moved: list[int] = []
    for run in runs:
        before, size = math.prod(shape[: run[0]]), math.prod(shape[a] for a in run)
        starts = [i for i in range(len(to)) if math.prod(to[:i]) == before]
        ends = [(i, j) for i in starts for j in range(i + 1, len(to) + 1) if math.prod(to[i:j]) == size]
        if not ends:
            return None
        moved += range(*max(ends, key=lambda e: (e[0], -e[1])))
    return tuple(moved)


def _is_zero(value: Value) -> bool:
    if value.producer is not None and value.producer.name in ("convert_element_type", "broadcast_in_dim"):
        return _is_zero(value.producer.inputs[0])
    return value.constant is not None and not np.any(np.asarray(value.constant, np.float64))


def describe(step: Step) -> str:
    """An operation, for a reason in words."""
    if step.name == mark_p.name:
        return f"the norm {step.params['path']!r}"
    return f"{step.called} ({step.name})" if step.called and step.called != step.name else step.name


def leaf_text(leaf: Any) -> str:
    return "/".join(map(str, leaf))


def to_leaf(value: Value, queries: Sequence[Axes]) -> tuple[Any, list[Axes], bool] | None:
    """The parameter that an operand is made of by moving its axes, where each of these axes lie in it, and whether it is masked.

    None where it is not made of one parameter.
    """
    masked, places = False, [(), *queries]  # with () no other operation passes, even if no axis is asked for
    while value.producer is not None:
        step = value.producer
        if step.name == "mul" and (operand := _masked(step)) is not None:
            masked, before = True, places
            following = operand
        else:
            before = [backward(step, p) if step.name not in ("pad", "reduce_sum", "slice") else None for p in places]
            following = step.inputs[0] if step.inputs else value
        if any(p is None for p in before):
            return None
        _check_used_once(value)
        places, value = [p for p in before if p is not None], following
    if value.leaf is None or not jnp.issubdtype(value.dtype, jnp.inexact):
        return None
    _check_used_once(value)
    return value.leaf, places[1:], masked


def _masked(step: Step) -> Value | None:
    """The operand of a product with what is no parameter, of the same shape and the same in each call."""
    for one, other in (step.inputs, step.inputs[::-1]):
        if other.fixed and other.leaf is None and other.shape == one.shape == step.outputs[0].shape:
            return one
    return None


def _check_used_once(value: Value) -> None:
    if value.uses > 1:
        origin = value
        while origin.producer is not None and origin.leaf is None and origin.producer.inputs:
            origin = origin.producer.inputs[0]
        if origin.leaf is not None:
            raise KeptError(f"the parameter {leaf_text(origin.leaf)} is used more than once")


def product(step: Step, weight: int) -> tuple[dict[int, int], dict[int, int]]:
    """From an axis of the output, and from one of the other operand that is summed over or kept in both, to the weight's."""
    if step.name == "conv_general_dilated":
        lhs, rhs, out = step.params["dimension_numbers"]
        return {out[1]: rhs[0]}, {lhs[1]: rhs[1]}
    contracted, batch = step.params["dimension_numbers"]
    free = [[a for a in range(len(v.shape)) if a not in (*contracted[i], *batch[i])] for i, v in enumerate(step.inputs)]
    first = len(batch[0]) + (len(free[0]) if weight else 0)
    from_output = dict(enumerate(batch[weight])) | {first + i: a for i, a in enumerate(free[weight])}
    pairs = [*zip(contracted[1 - weight], contracted[weight], strict=True), *zip(batch[1 - weight], batch[weight], strict=True)]
    return from_output, dict(pairs)
