"""What weights by name, of Keras, Haiku or Equinox, hold for a model that is built alike."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from ._checks import problems_of
from ._convolutions import differences, of_flax
from ._entries import pairs_with, shapes_of
from ._haiku import check_debiased, count_of
from ._match import Asked, check_names, names_by_order, read, renamer, selected, some, told
from ._source import Weights, dotted
from ._trees import ATTENTION, NORMS, Layer, Model, join

_BESIDE = ("kernel_scale", "kernel_u", "kernel_sigma")


def values_of_weights(found: Model, weights: Weights, asked: Asked, set_too: bool) -> dict[str, np.ndarray]:
    """The values of the model's variables, by path; hyperparameters are set, or compared."""
    paths, shapes = selected(found, asked.layers), shapes_of(found, asked.flattened)
    kinds = {path: type(layer.module).__name__ for path, layer in found.layers.items() if path in paths}
    if transposed := [path for path, kind in kinds.items() if kind == "ConvTranspose"]:
        raise ValueError(
            f"there is no rule for transposed convolutions of other libraries: {some(transposed, told)}; leave them out with layers=, a "
            "function that is False for their paths, and set them yourself."
        )
    given = renamer(asked.rename)

    def by_name(path: str) -> str:
        return given(path).strip(".")  # the model itself is a layer of the path ""

    name: Callable[[str], str] = by_name
    if asked.match == "order":
        pairs = pairs_with(found, weights, name, shapes)
        by_order = names_by_order(found, _without_beside(weights, set()), pairs, paths, asked.ignore)
        name = functools.partial(_by_order, by_order)
    wrapped = {name(layer.name) for layer in found.layers.values() if layer.wrapper is not None}
    pairs = pairs_with(found, weights, name, shapes)
    check_names(pairs, paths)
    values = read(found, pairs, _without_beside(weights, wrapped), paths, asked.ignore)
    problems: list[str] = []
    for path, layer in found.layers.items():
        if path not in paths:
            continue
        wrong, count = _compared(layer, weights, name(layer.name), set_too)
        problems += [f"{told(path)}: {problem}" for problem in wrong]
        if count is not None and (at_path := join(layer.prefix, "count")) in found.variables:
            values[at_path] = np.asarray(count, np.float32)
    if problems:
        raise ValueError(
            f"the model does not do what the source does: {some(problems)}. Build it so, or pass weights.without_options() for the values "
            "alone."
        )
    return values


def _by_order(names: Mapping[str, str], path: str) -> str:
    return names.get(path, path.replace("/", "."))


def _without_beside(weights: Weights, wrapped: set[str]) -> dict[str, np.ndarray]:
    """Kernels as they are used, but of layers that normalize theirs here too."""
    state = dict(weights.values)
    for key, plain in weights.plain.items():
        layer = key.rpartition(".")[0]
        if layer not in wrapped:
            state[key] = plain
            for beside in _BESIDE:
                state.pop(dotted(layer, beside), None)
    return state


def _compared(layer: Layer, weights: Weights, name: str, set_too: bool) -> tuple[list[str], float | None]:
    """What the layer here does otherwise, and the count that the average of a norm goes on with."""
    kind = type(layer.module).__name__
    if kind in NORMS:
        return _options_of(layer, weights, name, set_too)
    if kind in ATTENTION and name in weights.heads and (heads := layer.module.num_heads) != weights.heads[name]:
        return [f"{heads} heads here, {weights.heads[name]} there"], None
    if kind == "Conv" and name in weights.convolutions:
        return differences(of_flax(layer.module), weights.convolutions[name]), None
    return [], None


def _options_of(layer: Layer, weights: Weights, name: str, set_too: bool) -> tuple[list[str], float | None]:
    norm, module = weights.norms.get(name), layer.module
    if norm is not None:
        if type(module).__name__ == "InstanceNorm" and norm.kind == "GroupNorm" and norm.num_groups == math.prod(norm.shape):
            norm = dataclasses.replace(norm, kind="InstanceNorm", num_groups=None)
        if problems := problems_of(layer, norm, norm.kind, set_too):
            return problems, None
    momentum = getattr(module, "momentum", None)
    for what in ("mean", "var"):
        if momentum is not None and (ema := weights.debiased.get(dotted(name, what))) is not None:
            check_debiased(name, what, ema, momentum)
    count = count_of(weights.steps[name], momentum) if name in weights.steps and momentum is not None else norm.count if norm else None
    if momentum is None or not 0 <= momentum < 1:
        return [], count
    if count is None:
        return [], 1 / (1 - momentum)  # as an average that is not debiased goes on
    if not getattr(module, "track_count", False) and 1 - count * (1 - momentum) > 2**-20:
        problem = f"the average is debiased, and its count of {count:g} has not come to the limit: the norm needs track_count=True"
        return [problem], None
    return [], count
