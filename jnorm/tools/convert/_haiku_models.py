"""Trees of Haiku as weights by name."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._haiku import Tree
from ._source import Weights, dotted, no_weights, note, squeezed

_NAMES = {"w": "kernel", "b": "bias", "scale": "scale", "offset": "bias", "embeddings": "embedding"}
_HEADS = {"query", "key", "value", "linear"}
_ENTRIES = ("hidden", "average", "counter")


def weights_of_haiku(params: Tree, state: Tree | None = None) -> Weights:
    """The weights in Haiku's trees, by the names of its modules without "~", for :func:`load` and :func:`load_linen`.

    Linear, Conv1D, 2D and 3D (grouped ones too), DepthwiseConv2D, Embed, MultiHeadAttention (whose last layer is "out" here), all norms.
    Other parameters are there under their own names.

    Args:
      params: {"resnet/~/linear": {"w": …, "b": …}, …}.
      state: {"resnet/~/batch_norm/~/mean_ema": {"hidden", "average", "counter"}, …}.

    Returns:
      Arrays by "resnet.linear.kernel". The trees have no hyperparameters: epsilon and decay rate must be what the model here has, and the
      decay rate is its momentum when the debiased averages are taken over.

    Raises:
      ValueError: trees that are empty; weights of two modules that have one name.
      TypeError: trees that are not Haiku's.

    Example:
      >>> import numpy as np
      >>> from jnorm.tools import convert
      >>> weights = convert.weights_of_haiku({"net/~/linear": {"w": np.ones((3, 4)), "b": np.zeros(4)}})
      >>> {key: a.shape for key, a in weights.values.items()}
      {'net.linear.kernel': (3, 4), 'net.linear.bias': (4,)}
    """
    weights = no_weights()
    for module, entries in [*params.items(), *(state or {}).items()]:
        if not isinstance(entries, Mapping) or any(isinstance(a, Mapping) for a in entries.values()):
            raise TypeError(f"{module!r} is not as in Haiku's trees, which are {{module: {{name: array}}}}; those of Flax are none.")
    modules = set(params)
    for module, entries in params.items():
        name = _name(module, modules)
        norm = set(entries) <= {"scale", "offset"}
        arrays = {_NAMES.get(key, key): np.array(a) for key, a in entries.items()}
        note(weights, name, {key: a.reshape(squeezed(a.shape)) if norm else a for key, a in arrays.items()})
    for module, entries in (state or {}).items():
        _note_state(weights, module, entries, modules)
    if not weights.values:
        raise ValueError("there are no arrays in the trees.")
    return weights


def _name(module: str, modules: set[str]) -> str:
    parent, _, last = module.rpartition("/")
    if last == "linear" and {f"{parent}/{head}" for head in _HEADS} <= modules:
        module = f"{parent}/out"
    # "~" stands for a constructor, and "~method" for a method.
    return ".".join(part.removeprefix("~") for part in module.split("/") if part != "~")


def _note_state(weights: Weights, module: str, entries: Any, modules: set[str]) -> None:
    ema = re.fullmatch(r"(.*)/~/(mean|var)_ema", module)
    if ema is None or set(entries) != set(_ENTRIES):
        note(weights, _name(module, modules), {key: np.array(a) for key, a in entries.items()})
        return
    name = _name(ema[1], modules)
    note(weights, name, {ema[2]: (average := np.array(entries["average"])).reshape(squeezed(average.shape))})
    weights.steps[name] = int(entries["counter"])
    weights.debiased[dotted(name, ema[2])] = {key: np.array(a) for key, a in entries.items()}
