"""Keras's norms, of Keras 3, with any of its backends."""

import importlib
import math
from typing import Any

import numpy as np

from ._convolutions import convolution
from ._norm import Norm
from ._source import Weights, dotted, no_weights, note, note_norm

_NAMES = {
    "BatchNormalization": {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
    "LayerNormalization": {"scale": "gamma", "bias": "beta"},
    "GroupNormalization": {"scale": "gamma", "bias": "beta"},
    "RMSNormalization": {"scale": "scale"},
}


def import_keras() -> Any:
    try:
        return importlib.import_module("keras")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Keras is not installed: pip install keras.", name="keras") from error


def array_of(variable: Any) -> np.ndarray:
    """A variable of Keras as an array of NumPy; bfloat16 stays bfloat16."""
    value = variable.value if hasattr(variable, "value") else variable
    if hasattr(value, "detach"):  # PyTorch is the backend
        value = value.detach().cpu()
        value = value.float().numpy().astype(str(variable.dtype)) if "bfloat16" in str(value.dtype) else value.numpy()
    return np.array(value)


def of_keras(layer: Any) -> Norm:
    """The norm that a layer of Keras is, with its values and with what its weights do not tell.

    Momentum is the fraction of the OLD value, as here, epsilon is 1e-3 unless told otherwise, and the moving variance is biased. The
    values are copied.

    Args:
      layer: BatchNormalization, LayerNormalization, GroupNormalization or RMSNormalization, built.

    Returns:
      The norm. GroupNormalization with one channel in a group (`groups=-1`) is the "GroupNorm" that it is in Keras too. That a layer is
      frozen with `trainable=False` is not carried over: :func:`jnorm.tools.freeze`.

    Raises:
      ValueError: another layer, or one that was not built; `renorm=True`, whose layer keeps two averages of each statistic; the
        deprecated `rms_scaling=True`; RMSNormalization over axes that are not the last, whose scale Keras lays along the last ones.

    Example:
      >>> import pytest
      >>> keras = pytest.importorskip("keras")
      >>> from jnorm.tools import convert
      >>> layer = keras.layers.BatchNormalization(momentum=0.9)
      >>> layer.build((None, 8, 8, 4))
      >>> norm = convert.of_keras(layer)
      >>> norm.momentum, norm.epsilon, norm.var.tolist()
      (0.9, 0.001, [1.0, 1.0, 1.0, 1.0])
    """
    name = type(layer).__name__
    if name not in _NAMES:
        raise ValueError(f"{name} is no norm of Keras that has a counterpart in convert.Norm; those are {list(_NAMES)}.")
    if not layer.built:
        raise ValueError(f"{layer.name!r} ({name}) is not built: call it once, or build it with the shape of its input.")
    for option, why in (("renorm", "keeps two averages of each statistic"), ("rms_scaling", "divides by the variance's root")):
        if getattr(layer, option, False):
            raise ValueError(f"{layer.name!r} ({name}) has {option}=True, which {why}: there is no such norm here.")
    arrays: dict[str, Any] = {
        ours: None if (v := getattr(layer, theirs, None)) is None else array_of(v) for ours, theirs in _NAMES[name].items()
    }
    if name == "BatchNormalization":
        shape = arrays["mean"].shape
        return Norm(kind="BatchNorm", shape=shape, epsilon=layer.epsilon, momentum=layer.momentum, feature_axes=(layer.axis,), **arrays)
    input_shape = tuple(layer.get_build_config()["input_shape"])
    if name == "GroupNormalization":
        shape, axis = (input_shape[layer.axis],), (layer.axis,)
        return Norm(kind="GroupNorm", shape=shape, epsilon=layer.epsilon, num_groups=layer.groups, feature_axes=axis, **arrays)
    axes = tuple(layer.axis) if isinstance(layer.axis, list | tuple) else (layer.axis,)
    from_last = tuple(sorted(a % len(input_shape) - len(input_shape) for a in axes))
    if name == "RMSNormalization" and from_last != tuple(range(-len(axes), 0)):
        raise ValueError(f"{layer.name!r} (RMSNormalization) has axis={axes}, but Keras lays the scale along the last axes.")
    shape = tuple(input_shape[a] for a in from_last)
    arrays = {key: None if a is None else a.reshape(shape) for key, a in arrays.items()}
    kind = "LayerNorm" if name == "LayerNormalization" else "RMSNorm"
    return Norm(kind=kind, shape=shape, epsilon=layer.epsilon, feature_axes=from_last, reduction_axes=from_last, **arrays)


def as_keras(norm: Norm, *, ndim: int = 4, name: str | None = None) -> Any:
    """The layer of Keras that a norm is, built and with its values.

    Args:
      norm: of :func:`of_keras`, :func:`of_nnx` or :func:`of_linen`, or made by hand.
      ndim: the number of axes of x.
      name: of the layer.

    Returns:
      The layer.

    Raises:
      ValueError: what Keras's class cannot do: an unbiased running variance, a debiased or cumulative average, a fused activation, other
        axes. The error says with which `dataclasses.replace` that is given up, which keeps evaluation as it is.

    Example:
      >>> import pytest
      >>> keras = pytest.importorskip("keras")
      >>> from jnorm.tools import convert
      >>> layer = convert.as_keras(convert.Norm(kind="InstanceNorm", shape=(4,)))
      >>> type(layer).__name__, layer.groups, layer.gamma
      ('GroupNormalization', 4, None)
    """
    keras = import_keras()
    if norm.activation is not None:
        raise ValueError("Keras's norms have no activation: put it after, and pass dataclasses.replace(norm, activation=None).")
    options: dict[str, Any] = {"epsilon": norm.epsilon, "name": name}
    if norm.kind != "RMSNorm":
        options |= {"scale": norm.scale is not None, "center": norm.bias is not None}
    if norm.kind in ("BatchNorm", "GroupNorm", "InstanceNorm"):
        if len(norm.shape) != 1:
            raise ValueError(f"Keras's {norm.kind} has one axis of features, got feature_axes={norm.feature_axes}.")
        options["axis"] = norm.feature_axes[0]
    if norm.kind == "BatchNorm":
        layer = keras.layers.BatchNormalization(momentum=_momentum(norm), **options)
    elif norm.kind in ("GroupNorm", "InstanceNorm"):
        if norm.reduction_axes is not None:
            raise ValueError(f"Keras's GroupNormalization reduces all but the batch, got reduction_axes={norm.reduction_axes}.")
        layer = keras.layers.GroupNormalization(groups=norm.num_groups or math.prod(norm.shape), **options)
    elif norm.kind in ("LayerNorm", "RMSNorm"):
        layer = getattr(keras.layers, f"{norm.kind}alization")(axis=_row_axes(norm, ndim), **options)
    else:
        raise ValueError(f"Keras has no {norm.kind}.")
    input_shape: list[int | None] = [None] * ndim
    for axis, size in zip(norm.feature_axes, norm.shape, strict=True):
        input_shape[axis] = size
    layer.build(tuple(input_shape))
    for ours, theirs in _NAMES[type(layer).__name__].items():
        variable, value = getattr(layer, theirs, None), getattr(norm, ours)
        if variable is not None and value is not None:
            variable.assign(value.reshape(variable.shape))
    return layer


def _row_axes(norm: Norm, ndim: int) -> list[int]:
    features, reduced = (sorted(a % ndim for a in axes) for axes in (norm.feature_axes, norm.reduction_axes or norm.feature_axes))
    if features != reduced:
        raise ValueError(
            f"Keras's {norm.kind} has its scale along the axes that it reduces, got {norm.reduction_axes}, {norm.feature_axes}."
        )
    if norm.kind == "RMSNorm" and (norm.scale is None or features != list(range(ndim - len(features), ndim))):
        raise ValueError("Keras's RMSNormalization has a scale, along the last axes: give this norm one of ones, or other axes.")
    return features


def _momentum(norm: Norm) -> float:
    if norm.running_var_correction:
        raise ValueError(
            f"Keras's moving variance is biased, that of this norm has running_var_correction={norm.running_var_correction}: pass "
            "dataclasses.replace(norm, running_var_correction=0), which changes further training only."
        )
    limit = math.inf if norm.momentum in (None, 1) else 1 / (1 - norm.momentum)
    if norm.momentum is None or (norm.count is not None and not np.isclose(norm.count, limit, rtol=1e-3)):
        raise ValueError(
            "Keras's average is neither cumulative nor debiased, and the count of this norm has not come to its limit: pass "
            "dataclasses.replace(norm, count=None, momentum=…), which changes further training only."
        )
    return norm.momentum


# --- Models ---------------------------------------------------------------------------------------------------------------------------

_ATTENTION = {"query": "_query_dense", "key": "_key_dense", "value": "_value_dense", "out": "_output_dense"}
_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D")
_DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D")
_TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")


def weights_of_keras(model: Any) -> Weights:
    """The weights of a Keras model, by the names of its layers, for :func:`load` and :func:`load_linen`.

    Dense, Conv1D, 2D and 3D, DepthwiseConv, Embedding, MultiHeadAttention, the norms of :func:`of_keras`, SpectralNormalization around one
    of the former, and models and layers of these. What else has weights is there under its own names, which :func:`load` lists as
    left; the kernel of a transposed convolution as transposed_kernel.

    Args:
      model: a `keras.Model`, sequential, functional or of your own, or one layer; built.

    Returns:
      Arrays by "layer.variable", where a layer in a layer is "outer.inner", the norms with their hyperparameters, and how convolutions go
      over x.

    Raises:
      ValueError: as :func:`of_keras`, with the layer's name.

    Numerics:
      Keras's SpectralNormalization overwrites the kernel with the normalized one in each training call, and evaluation uses it as it is:
      a plain layer here gives the same output. Around jnorm's `SpectralNorm` training goes on alike: until an optimizer moves it, the
      kernel here is the one there but for a factor that the division takes away.

    Example:
      >>> import pytest
      >>> keras = pytest.importorskip("keras")
      >>> from jnorm.tools import convert
      >>> layers = [keras.layers.Dense(4, name="up"), keras.layers.LayerNormalization(name="norm")]
      >>> model = keras.Sequential([keras.Input((3,)), *layers])
      >>> sorted(convert.weights_of_keras(model).values)
      ['norm.bias', 'norm.scale', 'up.bias', 'up.kernel']
    """
    if not isinstance(model, import_keras().layers.Layer):
        raise TypeError(f"model must be a model or layer of Keras, got {type(model).__name__}.")
    weights = no_weights()
    single = type(model).__name__ in (*_NAMES, "SpectralNormalization", "MultiHeadAttention") or not _inner(model)
    for layer in [model] if single else _inner(model):
        _note_layer(weights, layer, "")
    if not single:
        _note_own(weights, model, "")
    if not weights.values:
        raise ValueError(f"{type(model).__name__} has no weights: build it, or call it once.")
    return weights


def _inner(layer: Any) -> list[Any]:
    return list({id(one): one for one in layer._flatten_layers(include_self=False, recursive=False)}.values())  # each once


def _note_layer(weights: Weights, layer: Any, prefix: str) -> None:
    name, kind = dotted(prefix, layer.name), type(layer).__name__
    if kind in _NAMES:
        note_norm(weights, name, of_keras(layer))
    elif kind == "SpectralNormalization":
        _note_plain(weights, layer.layer, name)
        u = array_of(layer.vector_u)
        note(weights, name, {"kernel_u": u.ravel(), "kernel_sigma": np.ones(1, u.dtype)})
        weights.plain[dotted(name, "kernel")] = weights.values[dotted(name, "kernel")]
    elif kind == "MultiHeadAttention":
        weights.heads[name] = layer._query_dense.kernel.shape[1]
        for ours, theirs in _ATTENTION.items():
            part = getattr(layer, theirs)
            kernel, bias = array_of(part.kernel), None if part.bias is None else array_of(part.bias).ravel()
            matrix = kernel.reshape(-1, kernel.shape[-1]) if ours == "out" else kernel.reshape(len(kernel), -1)
            note(weights, dotted(name, ours), {"kernel": matrix, "bias": bias})
    elif _inner(layer):
        for inner in _inner(layer):
            _note_layer(weights, inner, name)
        _note_own(weights, layer, name)
    else:
        _note_plain(weights, layer, name)


def _note_own(weights: Weights, layer: Any, name: str) -> None:
    """What a layer has beside those that are in it; seeds of dropout are left out."""
    inner = {id(v) for one in _inner(layer) for v in one.variables}
    own = [v for v in layer.weights if id(v) not in inner]
    note(weights, name, {v.name: array_of(v) for v in own})


def _note_plain(weights: Weights, layer: Any, name: str) -> None:
    depthwise, transposed = _is(layer, _DEPTHWISE), _is(layer, _TRANSPOSED)
    for variable in layer.weights:
        key, value = variable.name, array_of(variable)
        if key == "kernel" and depthwise:
            value = value.reshape(*value.shape[:-2], 1, -1)  # of as many groups as there are channels
        elif key == "kernel" and transposed:
            key = "transposed_kernel"  # of a layout that must not pass for that of a convolution
        note(weights, name, {"embedding" if key == "embeddings" else key: value})
    if depthwise or _is(layer, _CONVOLUTIONS):
        groups = layer.kernel.shape[-2] if depthwise else layer.groups
        weights.convolutions[name] = convolution(layer.kernel_size, layer.strides, layer.dilation_rate, groups, layer.padding)


def _is(layer: Any, names: tuple[str, ...]) -> bool:
    """Of one of these classes of Keras, or of one that is derived from it."""
    return isinstance(layer, tuple(getattr(import_keras().layers, name) for name in names))
