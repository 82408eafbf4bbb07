"""Models of PyTorch: what they hold for a model that is built alike, and such a model as a state dict."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from .._layers import Layers
from ._checks import compare, set_norms
from ._match import Asked, Flattenings, Pair, Rename, check_names, names_by_order, pairs_of, read, renamer, selected
from ._torch import tensor_of
from ._trees import Model, of_linen_model, of_nnx_model


def values_of_torch(found: Model, source: Any, asked: Asked, set_too: bool) -> dict[str, np.ndarray]:
    """The values of the model's variables, by path; hyperparameters of a module are set, or compared."""
    paths = selected(found, asked.layers)
    state = source.state_dict() if is_module(source) else source
    if inner := [key for key, value in state.items() if isinstance(value, Mapping)]:
        raise ValueError(f"source is a state dict by itself, not what holds one: pass source[{inner[0]!r}], if it is that one.")
    name = _names(found, state, asked, paths)
    if is_module(source):
        (set_norms if set_too else compare)(found, source, name, paths)
    pairs = pairs_of(found, name, asked.flattened)
    check_names(pairs, paths)
    return read(found, pairs, state, paths, asked.ignore)


def is_module(source: Any) -> bool:
    return not isinstance(source, Mapping) and hasattr(source, "state_dict")


def _names(found: Model, state: Mapping[str, Any], asked: Asked, paths: set[str]) -> Callable[[str], str]:
    if asked.match == "name":
        return renamer(asked.rename)
    names = names_by_order(found, state, pairs_of(found, renamer(None), asked.flattened), paths, asked.ignore)
    return lambda path: names.get(path, path.replace("/", "."))


def to_torch(
    model: nnx.Module, *, rename: Rename = None, layers: Layers | None = None, flattened: Flattenings | None = None
) -> dict[str, Any]:
    """The state dict of a PyTorch model that is built as an NNX model is: the way back from :func:`load`.

    A state dict has no hyperparameters: give PyTorch's norms their epsilon, and 1 − momentum, yourself, or build them with
    :func:`as_torch`.

    Args:
      model: the NNX model.
      rename: as of :func:`load`: what the layers are called there.
      layers: only these, by path.
      flattened: as of :func:`load`.

    Returns:
      Tensors in the dtypes of the model, for `load_state_dict`. Tied weights are there once.

    Raises:
      ValueError: layers that there is no rule for.

    Example:
      >>> import torch
      >>> from flax import nnx
      >>> from jnorm.tools import convert
      >>> {k: tuple(t.shape) for k, t in convert.to_torch(nnx.Linear(3, 4, rngs=nnx.Rngs(0))).items()}
      {'weight': (4, 3), 'bias': (4,)}
    """
    return _written(of_nnx_model(model), rename, layers, flattened)


def to_torch_linen(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    rename: Rename = None,
    layers: Layers | None = None,
    flattened: Flattenings | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The state dict of a PyTorch model that is built as a Linen model is: the way back from :func:`load_linen`.

    Args:
      model: the Linen model.
      variables: its variables.
      *args: of a call of the model, which is traced to find its layers.
      rename: as of :func:`load_linen`.
      layers: only these, by path.
      flattened: as of :func:`load`.
      **kwargs: of the call of the model.

    Returns:
      As :func:`to_torch`.

    Raises:
      ValueError: layers that there is no rule for.

    Example:
      >>> import torch
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm.tools import convert
      >>> model, x = nn.Dense(4), jnp.ones((1, 3))
      >>> sorted(convert.to_torch_linen(model, model.init(jax.random.key(0), x), x))
      ['bias', 'weight']
    """
    return _written(of_linen_model(model, variables, args, kwargs), rename, layers, flattened)


def _written(found: Model, rename: Rename, layers: Layers | None, flattened: Flattenings | None) -> dict[str, Any]:
    paths, state = selected(found, layers), {}
    pairs = pairs_of(found, renamer(rename), flattened)
    check_names(pairs, paths)
    for pair in pairs:
        if pair.path in paths:
            state |= _tensors_of(found, pair)
    return state


def _tensors_of(found: Model, pair: Pair) -> dict[str, Any]:
    values = [np.asarray(v.get_value() if isinstance(v, nnx.Variable) else v) for v in (found.variables[path] for path in pair.entry.ours)]
    return {key: tensor_of(np.array(a, order="C")) for key, a in zip(pair.keys, pair.entry.to_theirs(*values), strict=True)}


def _is_module(source: Any) -> bool:
    return not isinstance(source, Mapping) and hasattr(source, "state_dict")
