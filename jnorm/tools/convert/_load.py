"""Models of NNX and Linen that are given what a model of another library holds."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from .._layers import Layers, path_text
from ._filled import copied, fill_model, filled_variables
from ._match import Asked, Flattenings, MatchBy, Rename, asked_for, some
from ._source import Weights
from ._torch_models import is_module, values_of_torch
from ._trees import Model, of_linen_model
from ._weights import values_of_weights


def load(
    model: nnx.Module,
    source: Any,
    *,
    rename: Rename = None,
    match: MatchBy = "name",
    layers: Layers | None = None,
    ignore: Iterable[str] = (),
    flattened: Flattenings | None = None,
) -> Any:
    """An NNX model with the weights and statistics of a model of PyTorch, Keras, Haiku or Equinox that is built alike.

    Layouts are changed: kernels of dense layers, convolutions and attention, the axes of what follows a flattening. Layers that there are
    rules for: `Linear`, `Conv`, `ConvTranspose` (of PyTorch alone), `Embed`, `PReLU`, `MultiHeadAttention` of Flax, norms of Flax and
    jnorm, and jnorm's `WeightNorm` and `SpectralNorm` around one of them. Parameters of your own modules are taken as they are. A model
    of Flax's classes is for :func:`load_flax`.

    Args:
      model: gives the structure, the dtypes and the shardings. It stays as it is, and may be abstract (`nnx.eval_shape`).
      source: a PyTorch module; a state dict of it, of tensors or NumPy arrays; or what :func:`weights_of_keras`,
        :func:`weights_of_haiku` or :func:`weights_of_equinox` give. Hyperparameters, which state dicts and Haiku's trees do not have, are
        taken too: epsilon, momentum and the kind of running variance are set; strides, dilation, groups and padding of convolutions,
        heads of attention and groups of norms are compared.
      rename: what the layers are called there: a dict of regular expressions and what to put in their place, one after the other; or a
        function. Of paths such as "layer1/0/conv1", in which the "layers" of an `nnx.Sequential` is left out, as in PyTorch.
      match: "name", or "order": the layers of both in the order of their definition. A copy of an NNX model (`nnx.clone`, `nnx.merge`)
        has forgotten that order: two of its layers that have the same shapes may be exchanged. An abstract one is refused.
      layers: only these, by path; see :func:`jnorm.tools.recalibrate`.
      ignore: patterns of keys of the source that are left.
      flattened: paths of dense layers and norms whose features were flattened from (C, H, W) there, and are flattened from (H, W, C) here,
        with that shape. Of norms over several axes likewise. Such a norm in NNX, whose variables are flat, needs it always where the
        source is not PyTorch's: with (C*H*W,) the order stays.

    Returns:
      A new model.

    Raises:
      ValueError: keys that are missing or left over, shapes that do not fit, all told at once; layers that there is no rule for; two
        layers of one name; what the source does that the model cannot do, such as a debiased average without `track_count=True` (to leave
        that, pass the module's `state_dict()`, or `weights.without_options()`); variables of an abstract model that the source has no
        values for.
      TypeError: another source, or a Linen model.

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
      >>> model = convert.load(model, source)
      >>> model.layers[1].momentum, model.layers[1].running_var_correction
      (0.9, 1)
    """
    if isinstance(model, nn.Module):
        raise TypeError(f"{type(model).__name__} is a module of Linen: its variables are loaded by load_linen.")
    new, found = copied(model)
    fill_model(new, found, _values(found, source, asked_for(rename, match, layers, ignore, flattened), set_too=True))
    _check_whole(nnx.to_pure_dict(nnx.state(new)))
    return new


def load_linen(
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
    """The variables of a Linen model with the weights and statistics of a model of PyTorch, Keras, Haiku or Equinox that is built alike.

    As :func:`load`. A Linen model is code: nothing in it can be set, so that what the source does otherwise is refused.

    Args:
      model: the Linen model.
      variables: of the model, such as `model.init` gives, or `jax.eval_shape` of it: they give the structure and the dtypes.
      source: see :func:`load`.
      *args: of a call of the model, which is traced to find its layers.
      rename: see :func:`load`; the paths are those of the variables, such as "Dense_0".
      match: "name", or "order": layers in the order in which they are called here and defined there.
      layers: only these, by path.
      ignore: patterns of keys of the source that are left.
      flattened: see :func:`load`.
      **kwargs: of the call of the model.

    Returns:
      New variables: the tree that was given, its collections "params" and "batch_stats" with other values.

    Raises:
      ValueError: as :func:`load`; hyperparameters of the source's norms and convolutions that the model does not have.
      TypeError: another source.

    Example:
      >>> import torch
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm.tools import convert
      >>> model, x = nn.Dense(4), jnp.ones((1, 3))
      >>> variables = convert.load_linen(model, model.init(jax.random.key(0), x), torch.nn.Linear(3, 4), x)
      >>> variables["params"]["kernel"].shape
      (3, 4)
    """
    found = of_linen_model(model, variables, args, kwargs)
    new = filled_variables(variables, found, _values(found, source, asked_for(rename, match, layers, ignore, flattened), set_too=False))
    _check_whole(new)
    return new


def _values(found: Model, source: Any, asked: Asked, set_too: bool) -> dict[str, np.ndarray]:
    if isinstance(source, Weights):
        return values_of_weights(found, source, asked, set_too)
    if is_module(source) or isinstance(source, Mapping):
        return values_of_torch(found, source, asked, set_too)
    raise TypeError(
        "source must be a PyTorch module, its state dict, or what weights_of_keras, weights_of_haiku or weights_of_equinox give, got "
        f"{type(source).__name__}."
    )


def _check_whole(tree: Any) -> None:
    """That what was abstract has all of its values now."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if left := [path_text(path) for path, leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise ValueError(
            f"the model is abstract, and the source has no values for {some(left)}. Give a model that is initialized, or set these before, "
            "such as a dropout's rngs = nnx.Rngs(0)."
        )
