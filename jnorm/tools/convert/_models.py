"""Models of PyTorch, to those of NNX and Linen that are built alike, and back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from .._layers import Layers, path_text
from ._checks import compare, set_norms
from ._filled import copied, fill_model, filled_variables
from ._match import MatchBy, Pair, Rename, check_names, names_by_order, pairs_of, read, renamer, selected, some
from ._torch import tensor_of
from ._trees import Model, of_linen_model, of_nnx_model

Flattenings = Mapping[str, tuple[int, ...]]


def load_torch(
    model: nnx.Module,
    source: Any,
    *,
    rename: Rename = None,
    match: MatchBy = "name",
    layers: Layers | None = None,
    ignore: Iterable[str] = (),
    flattened: Flattenings | None = None,
) -> Any:
    """An NNX model with the weights and statistics of a PyTorch model that is built alike.

    Layouts are changed: kernels of dense layers, convolutions (transposed ones too) and attention, the axes of what follows a flattening.
    Layers that there are rules for: `Linear`, `Conv`, `ConvTranspose`, `Embed`, `PReLU`, `MultiHeadAttention` of Flax, norms of Flax and
    jnorm, and jnorm's `WeightNorm` and `SpectralNorm` around one of them. Parameters of your own modules are taken as they are.

    Args:
      model: gives the structure, the dtypes and the shardings. It stays as it is, and may be abstract (`nnx.eval_shape`).
      source: a PyTorch module, or a state dict of tensors or NumPy arrays. Of a module the hyperparameters, which no state dict has, are
        taken too: epsilon, momentum and the kind of running variance are set, and strides, paddings and groups compared.
      rename: what the layers are called there: a dict of regular expressions and what to put in their place, one after the other; or a
        function. Of paths such as "layer1/0/conv1", in which the "layers" of an `nnx.Sequential` is left out, as in PyTorch.
      match: "name", or "order": the layers of both in the order of their definition. A copy of an NNX model (`nnx.clone`, `nnx.merge`)
        has forgotten that order: two of its layers that have the same shapes may be exchanged. An abstract one is refused.
      layers: only these, by path; see :func:`jnorm.tools.recalibrate`.
      ignore: patterns of keys of the source that are left.
      flattened: paths of dense layers and norms whose features were flattened from (C, H, W) there, and are flattened from
        (H, W, C) here, with that shape. Of layer normalization over several axes likewise.

    Returns:
      A new model.

    Raises:
      ValueError: keys that are missing or left over, shapes that do not fit, all told at once; layers that there is no rule for; two
        layers of one name; what a module does that the model cannot do (to leave that, pass the module's `state_dict()`); variables of an
        abstract model that the source has no values for.

    Numerics:
      Values are cast to the dtypes that the model has. Weight normalization of the source becomes a plain weight where the model has no
      wrapper, and so does spectral normalization, as it is in evaluation. Around one, the running estimates of spectral normalization are
      taken too; PyTorch's estimate and this one differ by half a step of the power iteration.

    Example:
      >>> import torch
      >>> from flax import nnx
      >>> import jnorm.nnx as jnx
      >>> from jnorm.tools import convert
      >>> source = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jnx.BatchNorm(4, rngs=rngs))
      >>> model = convert.load_torch(model, source)
      >>> model.layers[1].momentum, model.layers[1].running_var_correction
      (0.9, 1)
    """
    if isinstance(model, nn.Module):
        raise TypeError(f"{type(model).__name__} is a module of Linen: its variables are loaded by load_torch_linen.")
    new, found = copied(model)
    paths = selected(found, layers)
    state, name = _state_and_names(found, source, rename, match, paths, flattened, ignore)
    if _is_module(source):
        set_norms(found, source, name, paths)
    pairs = pairs_of(found, name, flattened)
    check_names(pairs, paths)
    fill_model(new, found, read(found, pairs, state, paths, ignore))
    check_whole(nnx.to_pure_dict(nnx.state(new)))
    return new


def load_torch_linen(
    model: nn.Module,
    variables: Mapping[str, Any],
    source: Any,
    *args: Any,
    rename: Rename = None,
    match: MatchBy = "name",
    layers: Layers | None = None,
    ignore: Iterable[str] = (),
    flattened: Flattenings | None = None,
    **kwargs: Any,
) -> Any:
    """The variables of a Linen model with the weights and statistics of a PyTorch model that is built alike.

    As :func:`load_torch`. A Linen model is code: nothing in it can be set, so that what a PyTorch module does otherwise is refused.

    Args:
      model: the Linen model.
      variables: of the model, such as `model.init` gives, or `jax.eval_shape` of it: they give the structure and the dtypes.
      source: a PyTorch module, or a state dict; see :func:`load_torch`.
      *args: of a call of the model, which is traced to find its layers.
      rename: see :func:`load_torch`; the paths are those of the variables, such as "Dense_0".
      match: "name", or "order": layers in the order in which they are called here and defined there.
      layers: only these, by path.
      ignore: patterns of keys of the source that are left.
      flattened: see :func:`load_torch`.
      **kwargs: of the call of the model.

    Returns:
      New variables: the tree that was given, its collections "params" and "batch_stats" with other values.

    Raises:
      ValueError: as :func:`load_torch`; hyperparameters of the source's norms and convolutions that the model does not have.

    Example:
      >>> import torch
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm.tools import convert
      >>> model, x = nn.Dense(4), jnp.ones((1, 3))
      >>> variables = convert.load_torch_linen(model, model.init(jax.random.key(0), x), torch.nn.Linear(3, 4), x)
      >>> variables["params"]["kernel"].shape
      (3, 4)
    """
    found = of_linen_model(model, variables, args, kwargs)
    paths = selected(found, layers)
    state, name = _state_and_names(found, source, rename, match, paths, flattened, ignore)
    if _is_module(source):
        compare(found, source, name, paths)
    pairs = pairs_of(found, name, flattened)
    check_names(pairs, paths)
    new = filled_variables(variables, found, read(found, pairs, state, paths, ignore))
    check_whole(new)
    return new


def to_torch(
    model: nnx.Module, *, rename: Rename = None, layers: Layers | None = None, flattened: Flattenings | None = None
) -> dict[str, Any]:
    """The state dict of a PyTorch model that is built as an NNX model is: the way back from :func:`load_torch`.

    A state dict has no hyperparameters: give PyTorch's norms their epsilon, and 1 − momentum, yourself, or build them with
    :func:`as_torch`.

    Args:
      model: the NNX model.
      rename: as of :func:`load_torch`: what the layers are called there.
      layers: only these, by path.
      flattened: as of :func:`load_torch`.

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
    """The state dict of a PyTorch model that is built as a Linen model is: the way back from :func:`load_torch_linen`.

    Args:
      model: the Linen model.
      variables: its variables.
      *args: of a call of the model, which is traced to find its layers.
      rename: as of :func:`load_torch_linen`.
      layers: only these, by path.
      flattened: as of :func:`load_torch`.
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


def _state_and_names(
    found: Model, source: Any, rename: Rename, match: MatchBy, paths: set[str], flattened: Flattenings | None, ignore: Iterable[str]
) -> tuple[Mapping[str, Any], Callable[[str], str]]:
    state = source.state_dict() if _is_module(source) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"source must be a PyTorch module or a state dict, got {type(source).__name__}.")
    if inner := [key for key, value in state.items() if isinstance(value, Mapping)]:
        raise ValueError(f"source is a state dict by itself, not what holds one: pass source[{inner[0]!r}], if it is that one.")
    if match not in ("name", "order"):
        raise ValueError(f'match must be "name" or "order", got {match!r}.')
    if match == "name":
        return state, renamer(rename)
    if rename is not None:
        raise ValueError('match="order" asks for no names: leave rename out.')
    names = names_by_order(found, state, pairs_of(found, renamer(None), flattened), paths, ignore)
    return state, lambda path: names.get(path, path.replace("/", "."))


def check_whole(tree: Any) -> None:
    """That what was abstract has all of its values now."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if left := [path_text(path) for path, leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise ValueError(
            f"the model is abstract, and the source has no values for {some(left)}. Give a model that is initialized, or set these before, "
            "such as a dropout's rngs = nnx.Rngs(0)."
        )
