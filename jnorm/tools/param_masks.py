"""Which parameters are those of norms: masks for optax, of weight decay and of what does not train."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .. import linen as jnn
from .. import nnx as jnx
from ._layers import NORMS_LINEN, NORMS_NNX, Layers, called_norms, chosen, none_of, path_text

Call = Callable[[Any], Any]
# TLU is the activation that goes with filter response normalization.
_CLASSES_LINEN = (*NORMS_LINEN, jnn.ThresholdedLinearUnit)
_CLASSES_NNX = (*NORMS_NNX, jnx.ThresholdedLinearUnit)
_TOLD_BY = {"scale", "threshold"}
_OF_NORMS = {*_TOLD_BY, "bias", "sigma", "learned_epsilon"}


def norm_param_mask(params: Any, *, call: Call | None = None) -> Any:
    """True at the parameters of norms: scale and bias, and what some have beside them.

    Args:
      params: an NNX model, whose norms are known by their classes, jnorm's and Flax's. Or a tree of parameters, as optax gives it to a
        mask: the collection "params" of Linen, or the parameters of an NNX model. There a norm is told by what it holds: a dict of "scale",
        alone or with "bias" ("sigma", "learned_epsilon"), and the "threshold" of TLU. A bias alone might be any layer's, so that one of a
        norm without a scale is found by class only.
      call: for Linen, to know norms by their classes too: a function of the parameters that calls the model, such as
        `lambda p: model.apply({"params": p, **rest}, x, train=False)`. It is traced, and computes nothing.

    Returns:
      The tree with True and False in place of parameters; for an NNX model that of `nnx.state(model, nnx.Param)`.

    Raises:
      ValueError: no norm is found.
      TypeError: `call` for an NNX model.

    Example:
      >>> import jax.numpy as jnp, jnorm.tools
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
      >>> jnorm.tools.norm_param_mask(params)
      {'dense': {'bias': False, 'kernel': False}, 'norm': {'bias': True, 'scale': True}}
    """
    return frozen_param_mask(params, call=call)


def frozen_param_mask(params: Any, layers: Layers | None = None, *, call: Call | None = None) -> Any:
    """True at the parameters of the chosen norms, which are not to train; :func:`freeze` is for their statistics.

    Args:
      params: as in :func:`norm_param_mask`.
      layers: which norms, by their paths, as in :func:`freeze`. None: all.
      call: as in :func:`norm_param_mask`.

    Returns:
      As :func:`norm_param_mask`. `optax.multi_transform({False: optimizer, True: optax.set_to_zero()}, mask)` leaves these parameters as
      they are, weight decay included, and keeps no moments of them.

    Raises:
      ValueError: no norm is found; `layers` matches nothing, which lists what there is.
      TypeError: `call` for an NNX model.

    Example:
      >>> import jax.numpy as jnp, optax, jnorm.tools
      >>> params = {"kernel": jnp.ones(2), "norm1": {"scale": jnp.ones(2)}, "norm2": {"scale": jnp.ones(2)}}
      >>> mask = jnorm.tools.frozen_param_mask(params, "norm1")
      >>> mask
      {'kernel': False, 'norm1': {'scale': True}, 'norm2': {'scale': False}}
      >>> optimizer = optax.multi_transform({False: optax.sgd(1.0), True: optax.set_to_zero()}, mask)
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> updates["norm1"]["scale"].tolist(), updates["norm2"]["scale"].tolist()
      ([0.0, 0.0], [-1.0, -1.0])
    """
    tree, norms = _norms_in(params, call)
    if not norms:
        raise ValueError(_no_norm(params, call))
    return _mask(tree, {_joined(path, name) for path in chosen(norms, layers) for name in norms[path]})


def weight_decay_mask(params: Any, *, biases: bool = True, call: Call | None = None) -> Any:
    """True where weight decay belongs: at all parameters but those of norms, and biases.

    It is itself a mask that optax takes: `optax.adamw(1e-3, mask=jnorm.tools.weight_decay_mask)`.

    Args:
      params: as in :func:`norm_param_mask`; there may be no norms.
      biases: leave out what is called "bias", of whatever layer.
      call: as in :func:`norm_param_mask`.

    Returns:
      As :func:`norm_param_mask`.

    Raises:
      TypeError: `call` for an NNX model.

    Example:
      >>> import jax.numpy as jnp, jnorm.tools
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
      >>> jnorm.tools.weight_decay_mask(params)
      {'dense': {'bias': False, 'kernel': True}, 'norm': {'bias': False, 'scale': False}}

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization", 2017, https://arxiv.org/abs/1706.05350: what decay does to
      weights before a norm is to change their effective learning rate. That does not hold for scale and bias, nor for biases.
    """
    tree, norms = _norms_in(params, call)
    exempt = {_joined(path, name) for path, names in norms.items() for name in names}
    exempt |= {path for path in map(path_text, _paths(tree)) if biases and path.rsplit("/", 1)[-1] == "bias"}
    return jax.tree.map(lambda is_exempt: not is_exempt, _mask(tree, exempt))


def _no_norm(params: Any, call: Call | None) -> str:
    if isinstance(params, nnx.Module):
        return none_of(_CLASSES_NNX)
    if call is not None:
        return "there is no norm with parameters among the modules of Linen that call calls, at a path that params have."
    return (
        'there is no norm among the parameters: no dict of "scale", alone or with "bias". For a Linen model whose norms hold other '
        "parameters, give call, a function of the parameters that calls it."
    )


def _norms_in(params: Any, call: Call | None) -> tuple[Any, dict[str, list[str]]]:
    """The tree of parameters, and of each norm the names of its own, by the path that it lies at."""
    if isinstance(params, nnx.Module):
        if call is not None:
            raise TypeError("call is for parameters of Linen; the norms of an NNX model are known by their classes without it.")
        norms = {path: [k for k, v in vars(norm).items() if isinstance(v, nnx.Param)] for path, norm in _modules(params).items()}
        return nnx.as_pure(nnx.state(params, nnx.Param)), norms
    groups: dict[str, list[str]] = {}
    inner = set()  # what has something else below it than parameters, and the layer that a norm may wrap
    for path in _paths(params):
        groups.setdefault(path_text(path[:-1]), []).append(path_text(path[-1:]))
        inner |= {path_text(path[:-depth]) for depth in range(2, len(path) + 1) if path_text(path[-depth : 1 - depth]) != "layer_instance"}
    if call is not None:
        norms = called_norms(call, params, classes=_CLASSES_LINEN)
        own = {path: [name for name in groups.get(path, ()) if _owns(norm, name)] for path, norm in norms.items()}
        return params, {path: names for path, names in own.items() if names}
    return params, {path: g for path, g in groups.items() if path not in inner and _TOLD_BY & set(g) and set(g) <= _OF_NORMS}


def _owns(norm: Any, name: str) -> bool:
    """Of a parameter at a Linen norm's path, which others may share (`nn.share_scope`). What a class of the user's holds nobody knows."""
    return type(norm) not in _CLASSES_LINEN or (name in _OF_NORMS and getattr(norm, f"use_{name}", True))


def _modules(model: nnx.Module) -> dict[str, Any]:
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, _CLASSES_NNX)}


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _paths(tree: Any) -> list[Any]:
    return [_bare(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _bare(path: Any) -> Any:
    """Without the way into a box, such as a Variable of NNX or Linen's metadata."""
    while path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]
    return path


def _mask(tree: Any, true: set[str]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path_text(_bare(path)) in true, tree)
