"""From a norm to the linear layer before or after it, in the graph of a traced model."""

import dataclasses
import math
from typing import Any

from .graph import Graph, Step, Value
from .steps import PRODUCTS, Axes, KeptError, backward, describe, forward, product, to_leaf

_ZEROS = "pads its input with zeros, which the norm would have made {}: at the border the shift would be missing"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer that a norm folds into. Axes are those of its parameters.

    Args:
      kernel: which leaf it is.
      axes: the kernel's, along which the norm's features lie, in their order.
      kept: the kernel's that the output has, in the output's order.
      bias: which leaf it is, or None where there is none.
      bias_axes: before the norm the bias's of the features; after it the bias's for `kept`.
      groups: of a convolution after the norm.
      ends: whether a bias that the layer would add comes after all else that it does.
    """

    kernel: Any
    axes: Axes
    kept: Axes
    bias: Any = None
    bias_axes: Axes = ()
    groups: int = 1
    ends: bool = True


def layer_before(start: Step, features: Axes) -> Layer:
    """The layer whose output, with the features along these axes, goes to this norm and nowhere else."""
    value, axes, bias, bias_axes, linear = start.inputs[0], features, None, (), False
    while True:
        step = value.producer
        if step is None:
            raise KeptError("its input is no output of a layer")
        if value.uses > 1:
            raise KeptError("its input is used elsewhere too")
        if step.name in PRODUCTS:
            break
        if step.name in ("add", "add_any") and (found := _bias_of(step, [axes])) is not None:
            if linear or bias is not None:
                raise KeptError("a bias is added before the last step of the layer before it")
            bias, (bias_axes,), value = found
            continue
        before = backward(step, axes)
        if before is None:
            raise KeptError(f"its input comes from {describe(step)}, not from a linear layer")
        linear |= step.name in ("pad", "reduce_sum")
        value, axes = step.inputs[0], before
    weight = _weight_of(step)
    from_output, _ = product(step, weight)
    if step.name == "conv_general_dilated" and step.params["batch_group_count"] != 1:
        raise KeptError("the convolution before it groups the batch")
    if not set(axes) <= set(from_output):
        raise KeptError("its features are not those that the layer before it makes")
    kernel, (places, *kept), _ = _kernel(step, weight, [tuple(from_output[a] for a in axes), *((a,) for a in from_output.values())])
    kept = tuple(a for k in kept for a in k)
    return Layer(kernel, places, kept, bias, bias_axes, ends=not linear)


def layer_after(graph: Graph, end: Step, features: Axes) -> Layer:
    """The layer that this norm's output, with the features along these axes, goes to and nowhere else."""
    region: dict[int, Axes] = {id(end.outputs[0]): features}
    consumers: list[Step] = []
    for step in graph.steps:
        inside = [region[id(v)] for v in step.inputs if id(v) in region]
        if inside:
            after = _joined(step, inside) if step.name == "concatenate" else forward(step, inside[0])
            if after is None:
                consumers.append(step)
            else:
                region[id(step.outputs[0])] = after
    if any(v.is_output and id(v) in region for v in (end.outputs[0], *(o for s in graph.steps for o in s.outputs))):
        raise KeptError("its output is given out or kept")
    if len(consumers) != 1:
        raise KeptError(f"its output goes to several: {', '.join(map(describe, consumers))}" if consumers else "its output is not used")
    (step,) = consumers
    if step.name == "pad":
        raise KeptError("what follows it " + _ZEROS.format("its shift"))
    if step.name not in PRODUCTS:
        raise KeptError(f"its output goes to {describe(step)}, not to a linear layer")
    data = [i for i, v in enumerate(step.inputs) if id(v) in region]
    if len(data) != 1 or (step.name == "conv_general_dilated" and data != [0]):
        raise KeptError("its output is a weight of what follows")
    _check_no_zeros(step)
    from_output, from_data = product(step, weight := 1 - data[0])
    axes = region[id(step.inputs[data[0]])]
    if not set(axes) <= set(from_data):
        raise KeptError("its features are not those that the layer after it sums over")
    queries = [tuple(from_data[a] for a in axes), *((a,) for a in from_output.values())]
    kernel, (places, *kept), masked = _kernel(step, weight, queries)
    if masked:
        raise KeptError("the layer after it masks its kernel")
    if math.prod(graph.leaves[kernel].shape) != math.prod(step.inputs[weight].shape):
        raise KeptError("in the layer after it the parameter is repeated along other axes of the kernel")
    groups, kept_axes = step.params.get("feature_group_count", 1), tuple(a for k in kept for a in k)
    if groups != 1 and (len(places), len(kept_axes)) != (1, 1):
        raise KeptError("the layer after it is a convolution in groups, whose inputs or outputs are several axes of the parameter")
    bias, bias_axes = _bias_after(step.outputs[0], [(a,) for a in from_output])
    return Layer(kernel, places, kept_axes, bias, bias_axes, groups)


def _joined(step: Step, inside: list[Axes]) -> Axes | None:
    """Of pieces that all are the norm's, as circular padding puts them together."""
    alike = len(inside) == len(step.inputs) and len(set(inside)) == 1 and step.params["dimension"] not in inside[0]
    return inside[0] if alike else None


def _check_no_zeros(step: Step) -> None:
    if step.name == "conv_general_dilated":
        if step.params["batch_group_count"] != 1:
            raise KeptError("the convolution after it groups the batch")
        if any(d != 1 for d in step.params["lhs_dilation"]):
            raise KeptError("the layer after it spreads its input with zeros between, as a transposed convolution does")
        if any(p > 0 for pair in step.params["padding"] for p in pair):
            raise KeptError("the convolution after it " + _ZEROS.format("its shift"))


def _weight_of(step: Step) -> int:
    """Which operand of a product is made of a parameter."""
    if step.name == "conv_general_dilated":
        return 1
    found = [i for i in (0, 1) if to_leaf(step.inputs[i], []) is not None]
    if len(found) != 1:
        raise KeptError(f"its input comes from {describe(step)}, of which {'both operands are' if found else 'no operand is'} a parameter")
    return found[0]


def _kernel(step: Step, weight: int, queries: list[Axes]) -> tuple[Any, list[Axes], bool]:
    found = to_leaf(step.inputs[weight], queries)
    if found is None:
        raise KeptError(f"the weight of {describe(step)} is no parameter of the model as it is, but computed")
    return found


def _bias_of(step: Step, queries: list[Axes]) -> tuple[Any, list[Axes], Value] | None:
    """The parameter that is added, its axes for those of the sum, and the other operand."""
    for operand, other in (step.inputs, step.inputs[::-1]):
        if _is_spread(operand, queries, step.outputs[0]):
            continue
        found = to_leaf(operand, queries)
        if found is not None and found[2]:
            raise KeptError("the layer beside it masks its bias")
        if found is not None:
            return found[0], found[1], other
    return None


def _is_spread(operand: Value, queries: list[Axes], total: Value) -> bool:
    """Whether one number is added to several of the features."""
    return len(operand.shape) != len(total.shape) or any(operand.shape[a] != total.shape[a] for q in queries for a in q)


def _bias_after(value: Value, places: list[Axes]) -> tuple[Any, Axes]:
    """The bias that is added to a layer's output, and its axes for these of the output."""
    while value.uses == 1 and value.users:
        step = value.users[0]
        if step.name in ("add", "add_any"):
            found = _bias_of(step, places)
            return (None, ()) if found is None else (found[0], tuple(a for axes in found[1] for a in axes))
        moved = [forward(step, p) for p in [(), *places]]
        if any(m is None for m in moved):
            break
        value, places = step.outputs[0], [m for m in moved[1:] if m is not None]
    return None, ()
