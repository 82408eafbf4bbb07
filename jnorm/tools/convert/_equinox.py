"""Equinox's norms."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._convolutions import convolution
from ._haiku import count_of, steps_of
from ._norm import Norm
from ._source import Weights, dotted, no_weights, note, note_norm

_PARAMS = (("scale", "weight"), ("bias", "bias"))


def import_equinox() -> Any:
    try:
        return importlib.import_module("equinox")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Equinox is not installed: pip install equinox.", name="equinox") from error


def of_equinox(layer: Any, state: Any = None, *, channels_last: bool = True) -> Norm:
    """The norm that a layer of Equinox is. Its x is one sample, here it is the batch.

    Momentum is the fraction of the OLD value, as here, and the variance is biased, whatever Equinox's docstring says. A BatchNorm of
    mode="batch" is debiased by its number of steps k: here the mean is hidden / (1 - momentum^k), and the count
    (1 - momentum^k) / (1 - momentum). The values are copied.

    Args:
      layer: BatchNorm, GroupNorm, LayerNorm or RMSNorm of `equinox.nn`.
      state: the `equinox.nn.State` of the model, for a BatchNorm.
      channels_last: x here has its channels last, as Flax's layers give it, not first in each sample as in Equinox. LayerNorm and RMSNorm
        normalize all axes of a sample, of the layer's shape, either way.

    Returns:
      The norm. It does what the layer does under `vmap` over the batch.

    Raises:
      ValueError: another layer; a BatchNorm without its state; one of mode="ema", which normalizes with running statistics in training
        too, unless `equinox.nn.inference_mode` made it one for evaluation; an RMSNorm whose bias is not 0.

    Numerics:
      Equinox starts the hidden variance of mode="batch" at 1 and debiases it as if it had been 0, so that after k steps momentum^k / (1 -
      momentum^k) is added to the average of the variances, 99 after the first step with momentum=0.99. It is carried over and fades here
      as there. A layer that has made no step is converted without it.

    Example:
      >>> import pytest
      >>> eqx = pytest.importorskip("equinox")
      >>> from jnorm.tools import convert
      >>> layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="batch", mode="batch")
      >>> norm = convert.of_equinox(layer, state)
      >>> norm.kind, norm.momentum, norm.count
      ('BatchNorm', 0.99, 0.0)
    """
    kind = type(layer).__name__
    if kind not in ("BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"):
        raise ValueError(f"{kind} is no norm of Equinox that has a counterpart in convert.Norm.")
    values: dict[str, Any] = {ours: None if (a := getattr(layer, theirs)) is None else np.array(a) for ours, theirs in _PARAMS}
    channel = (-1,) if channels_last else (1,)
    if kind == "BatchNorm":
        return Norm(kind=kind, shape=(layer.input_size,), feature_axes=channel, **_running(layer, state), **values)
    if kind == "GroupNorm":
        shape = (layer.channels,) if layer.channels is not None else (0,)
        return Norm(kind=kind, shape=shape, epsilon=layer.eps, num_groups=layer.groups, feature_axes=channel, **values)
    if kind == "RMSNorm":
        if values["bias"] is not None and values["bias"].any():
            raise ValueError("this RMSNorm adds a bias that is not 0, and jnorm's has none: set it to None, and add it after.")
        values["bias"] = None
    axes = tuple(range(-len(layer.shape), 0))
    return Norm(kind=kind, shape=tuple(layer.shape), epsilon=layer.eps, feature_axes=axes, reduction_axes=axes, **values)


def _running(layer: Any, state: Any) -> dict[str, Any]:
    if state is None:
        raise ValueError("a BatchNorm of Equinox has its running statistics in an equinox.nn.State: pass the model's as state.")
    shared = {"epsilon": layer.eps, "momentum": layer.momentum}
    if layer.mode == "batch":
        steps = int(state.get(layer.batch_counter))
        mean, var = (np.asarray(a) for a in state.get(layer.batch_state_index))
        rest = 1 - layer.momentum**steps if steps else 1
        averages = [(a.astype(np.float64) / rest).astype(a.dtype) for a in (mean, var)]
        return {"mean": averages[0], "var": averages[1], "count": count_of(steps, layer.momentum), **shared}
    if not layer.inference:
        raise ValueError(
            "a BatchNorm of mode='ema' normalizes with the running statistics in training too, which no norm of jnorm does: convert "
            "equinox.nn.inference_mode(model) for evaluation, or train one of mode='batch'."
        )
    if bool(state.get(layer.ema_first_time_index)):
        raise ValueError("this BatchNorm of mode='ema' has seen no batch: its running statistics are uninitialized memory.")
    mean, var = (np.array(a) for a in state.get(layer.ema_state_index))
    return {"mean": mean, "var": var, **shared}


def as_equinox(norm: Norm, *, axis_name: Any = "batch") -> tuple[Any, Any]:
    """The layer of Equinox that a norm is, for one sample under `vmap`, and its state. Channels come first in a sample.

    Args:
      norm: of :func:`of_equinox`, :func:`of_nnx` or :func:`of_linen`, or made by hand.
      axis_name: of the `vmap` over the batch, of a BatchNorm.

    Returns:
      The layer, and an `equinox.nn.State`, or None for layers that have none. A BatchNorm is of mode="batch"; an average that is not
      debiased gets a counter so large that nothing is left to debias. Where the norm has one of scale and bias, and Equinox's class both
      or none, the other is 1 or 0.

    Raises:
      ValueError: what Equinox's class cannot do: an unbiased running variance, a cumulative average, a fused activation, other axes, a
        count that is of no whole number of steps.

    Example:
      >>> import pytest
      >>> eqx = pytest.importorskip("equinox")
      >>> from jnorm.tools import convert
      >>> layer, state = convert.as_equinox(convert.Norm(kind="GroupNorm", shape=(4,), num_groups=2, epsilon=1e-3))
      >>> layer.groups, layer.eps, layer.weight, state
      (2, 0.001, None, None)
    """
    eqx = import_equinox()
    if norm.activation is not None:
        raise ValueError("Equinox's norms have no activation: put it after, and pass dataclasses.replace(norm, activation=None).")
    has = norm.scale is not None or norm.bias is not None
    if norm.kind == "BatchNorm":
        _check_channel(norm)
        return _batch_norm(eqx, norm, axis_name, has)
    if norm.kind in ("GroupNorm", "InstanceNorm"):
        _check_channel(norm)
        if norm.reduction_axes is not None:
            raise ValueError(f"Equinox's GroupNorm reduces all of a sample, this norm has reduction_axes={norm.reduction_axes}.")
        groups = norm.num_groups if norm.kind == "GroupNorm" else norm.shape[0]
        return _with_values(eqx, eqx.nn.GroupNorm(groups, norm.shape[0], norm.epsilon, has), norm), None
    trailing = tuple(range(-len(norm.shape), 0))
    if norm.kind not in ("LayerNorm", "RMSNorm") or norm.feature_axes != trailing or norm.reduction_axes not in (None, trailing):
        raise ValueError(
            f"Equinox's norms normalize all of a sample, of the shape of their weight; this {norm.kind} has "
            f"reduction_axes={norm.reduction_axes} and feature_axes={norm.feature_axes}."
        )
    layer = getattr(eqx.nn, norm.kind)(norm.shape, norm.epsilon, use_weight=norm.scale is not None, use_bias=norm.bias is not None)
    return _with_values(eqx, layer, norm), None


def _check_channel(norm: Norm) -> None:
    if len(norm.shape) != 1:
        raise ValueError(f"Equinox's norms of channels have one axis of them, got feature_axes={norm.feature_axes}.")


def _with_values(eqx: Any, layer: Any, norm: Norm) -> Any:
    """Arrays in place of those of the layer, in their own dtypes, where the layer has any."""
    dtypes = [a.dtype for a in (norm.scale, norm.bias) if a is not None]
    for ours, theirs in _PARAMS:
        there, value = getattr(layer, theirs), getattr(norm, ours)
        if there is not None:
            new = jnp.asarray(value) if value is not None else there.astype(dtypes[0])
            layer = eqx.tree_at(lambda one, theirs=theirs: getattr(one, theirs), layer, new)
    return layer


def _batch_norm(eqx: Any, norm: Norm, axis_name: Any, has: bool) -> tuple[Any, Any]:
    if norm.running_var_correction:
        raise ValueError(
            f"Equinox's running variance is biased, that of this norm has running_var_correction={norm.running_var_correction}: pass "
            "dataclasses.replace(norm, running_var_correction=0), which changes further training only."
        )
    steps = steps_of(norm.count, norm.momentum, "Equinox's BatchNorm")
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    layer, state = make(norm.shape[0], axis_name, norm.epsilon, has, momentum=norm.momentum, mode="batch")
    rest = 1 - (norm.momentum or 0) ** steps if steps else 1
    hidden = tuple(jnp.asarray(np.asarray(a, np.float64) * rest, jnp.float32) for a in (norm.mean, norm.var))
    counter = state.get(layer.batch_counter) + steps  # of its type, a weak one
    state = state.set(layer.batch_counter, counter).set(layer.batch_state_index, hidden)
    return _with_values(eqx, layer, norm), state


# --- Models ---------------------------------------------------------------------------------------------------------------------------


def weights_of_equinox(model: Any, state: Any = None, *, channels_last: bool = True) -> Weights:
    """The weights of an Equinox model, by the paths of its layers, for :func:`load` and :func:`load_linen`.

    Linear, Conv, Embedding, MultiheadAttention, the norms of :func:`of_equinox`, WeightNorm and SpectralNorm around one of the former, and
    modules, lists, tuples and dicts of these. Other arrays are there as they are, by their paths.

    Args:
      model: any `equinox.Module`.
      state: its `equinox.nn.State`, where it has one.
      channels_last: as of :func:`of_equinox`.

    Returns:
      Arrays by "path.to.layer.variable", the norms with their hyperparameters, and how convolutions go over x.

    Raises:
      ValueError: as :func:`of_equinox`, with the layer's path.

    Numerics:
      Equinox's SpectralNorm takes the half-steps of the power iteration in the other order and none in evaluation, so that the estimates
      of the largest singular value differ until they have converged, and with them the outputs; a plain layer gets the kernel that
      Equinox's evaluation uses.

    Example:
      >>> import pytest
      >>> eqx = pytest.importorskip("equinox")
      >>> import jax
      >>> from jnorm.tools import convert
      >>> model = eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=jax.random.key(0)), eqx.nn.LayerNorm(4)])
      >>> sorted(convert.weights_of_equinox(model).values)
      ['0.bias', '0.kernel', '1.bias', '1.scale']
    """
    weights = no_weights()
    _walk(weights, model, "", state, channels_last)
    if not weights.values:
        raise ValueError(f"{type(model).__name__} has no arrays.")
    return weights


def _walk(weights: Weights, node: Any, name: str, state: Any, channels_last: bool) -> None:
    kind, own = type(node).__name__, type(node).__module__.startswith("equinox.nn")
    if own and kind in ("BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"):
        try:
            note_norm(weights, name, of_equinox(node, state, channels_last=channels_last))
        except ValueError as error:
            raise ValueError(f"{name or 'the model itself'}: {error}") from None
    elif own and kind in ("WeightNorm", "SpectralNorm") and node.weight_name == "weight":
        _wrapped(weights, node, name, state)
    elif own and kind == "MultiheadAttention":
        weights.heads[name] = node.num_heads
        for ours, theirs in {"query": "query_proj", "key": "key_proj", "value": "value_proj", "out": "output_proj"}.items():
            note(weights, dotted(name, ours), _plain(getattr(node, theirs)))
    elif own and (kind == "Linear" or (kind.startswith("Conv") and "Transpose" not in kind) or kind == "Embedding"):
        note(weights, name, _plain(node))
        _note_convolution(weights, node, name)
    elif hasattr(node, "__dataclass_fields__") or isinstance(node, list | tuple | dict):
        items = enumerate(node) if isinstance(node, list | tuple) else node.items() if isinstance(node, dict) else vars(node).items()
        for key, child in items:
            if type(child).__name__ != "StateIndex":
                inside = own and kind == "Sequential" and key == "layers"  # as paths here leave it out
                _walk(weights, child, name if inside else dotted(name, str(key)), state, channels_last)
    elif isinstance(node, jax.Array | np.ndarray):
        note(weights, name, {"": np.array(node)})


def _plain(layer: Any) -> dict[str, Any]:
    """In Flax's layout."""
    weight, bias = np.array(layer.weight), None if (b := getattr(layer, "bias", None)) is None else np.array(b).ravel()
    if type(layer).__name__ == "Embedding":
        return {"embedding": weight}
    return {"kernel": weight.transpose(*range(2, weight.ndim), 1, 0), "bias": bias}


def _note_convolution(weights: Weights, layer: Any, name: str) -> None:
    if type(layer).__name__.startswith("Conv"):
        padding, mode = layer.padding, layer.padding_mode.lower()
        weights.convolutions[name] = convolution(layer.kernel_size, layer.stride, layer.dilation, layer.groups, padding, mode)


def _wrapped(weights: Weights, node: Any, name: str, state: Any) -> None:
    arrays = _plain(node.layer)
    kernel, weight = arrays["kernel"], np.asarray(node.layer.weight, np.float64)
    if type(node).__name__ == "WeightNorm":
        beside = {"kernel_scale": np.array(node.g).ravel()}
        rest = None if node.axis is None else tuple(a for a in range(weight.ndim) if a != node.axis % weight.ndim)
        used = weight * np.asarray(node.g, np.float64) / np.sqrt((weight**2).sum(rest, keepdims=True))
    else:
        if state is None:
            raise ValueError(f"{name}: a SpectralNorm of Equinox has its vectors in an equinox.nn.State: pass the model's as state.")
        u, v = (np.asarray(a) for a in state.get(node.uv_index))
        sigma = u.astype(np.float64) @ weight.reshape(len(weight), -1) @ v
        beside, used = {"kernel_u": u, "kernel_sigma": np.asarray(sigma, u.dtype).reshape(1)}, weight / sigma
    note(weights, name, {**arrays, **beside})
    _note_convolution(weights, node.layer, name)
    weights.plain[dotted(name, "kernel")] = used.transpose(*range(2, weight.ndim), 1, 0).astype(kernel.dtype)
