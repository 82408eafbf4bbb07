"""How PyTorch lays out what a layer holds: which of its tensors is which variable here, there and back."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._norm import RUNNING
from ._trees import ATTENTION, DENSE, NORMS, Layer, Model, join

Arrays = tuple[np.ndarray, ...]
Flattened = tuple[int, ...] | None
_NORM_NAMES = (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var"))


class Entry(NamedTuple):
    """Some of PyTorch's tensors, and the variables that they are here. Without any, the tensors are needed by PyTorch only."""

    ours: tuple[str, ...]  # paths of variables
    theirs: tuple[str, ...]  # names in the layer
    to_ours: Callable[..., Arrays]
    to_theirs: Callable[..., Arrays]
    dim: int = 0  # the rows that spectral normalization sees
    optional: bool = False  # old files have no such tensor, and nothing here follows from it


def entries_of(layer: Layer, model: Model, flattened: Flattened = None) -> list[Entry]:
    """Of all of a layer's tensors, in PyTorch's order.

    `flattened` is the shape (C, *positions) of what a flattening made the layer's features of: here it has its channels last.
    """
    kind = type(layer.module).__name__
    if kind in DENSE:
        entries = _dense(layer, flattened)
    elif kind in NORMS:
        entries = _norm(layer, model, flattened)
    elif kind in ATTENTION:
        entries = _attention(layer, model)
    else:
        entries = _MAKERS[kind](layer)
    entries = [e for e in entries if all(path in model.variables for path in e.ours)]
    return entries if layer.wrapper is None else _wrapped(layer, model, entries)


def bare_entry(path: str) -> Entry:
    """A parameter of a module of the user's own: as it is."""
    return _same(path, "")


def _one(ours: str, theirs: str, there: Callable[..., np.ndarray], back: Callable[..., np.ndarray], dim: int = 0) -> Entry:
    return Entry((ours,), (theirs,), lambda a: (there(a),), lambda a: (back(a),), dim)


def _same(ours: str, theirs: str) -> Entry:
    return _one(ours, theirs, lambda a: a, lambda a: a)


def _permuted(ours: str, theirs: str, axes: tuple[int, ...], flip: int = 0, dim: int = 0) -> Entry:
    """A transposition, with the last `flip` axes of PyTorch's tensor backwards."""
    back = tuple(int(i) for i in np.argsort(axes))

    def flipped(a: np.ndarray) -> np.ndarray:
        return np.flip(a, tuple(range(a.ndim - flip, a.ndim)))

    return _one(ours, theirs, lambda a: flipped(a).transpose(axes), lambda a: flipped(a.transpose(back)), dim)


def _channels_last(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The last axis, the features of (C, *positions), as those of (*positions, C)."""
    return np.moveaxis(a.reshape(*a.shape[:-1], *shape), a.ndim - 1, -1).reshape(a.shape)


def _channels_second(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(a.reshape(*a.shape[:-1], *shape[1:], shape[0]), -1, a.ndim - 1).reshape(a.shape)


# --- Layers ---------------------------------------------------------------------------------------------------------------------------


def _dense(layer: Layer, flattened: Flattened) -> list[Entry]:
    kernel = join(layer.prefix, "kernel")
    if flattened is None:
        entry = _permuted(kernel, "weight", (1, 0))
    else:
        entry = _one(kernel, "weight", lambda a: _channels_last(a, flattened).T, lambda a: _channels_second(a.T, flattened))
    return [entry, _same(join(layer.prefix, "bias"), "bias")]


def _conv(layer: Layer) -> list[Entry]:
    n = len(layer.module.kernel_size)
    return [_permuted(join(layer.prefix, "kernel"), "weight", (*range(2, n + 2), 1, 0)), _same(join(layer.prefix, "bias"), "bias")]


def _conv_transpose(layer: Layer) -> list[Entry]:
    """PyTorch's is the transpose of a convolution; Flax's is so with `transpose_kernel`, and else a convolution of a dilated x."""
    n = len(layer.module.kernel_size)
    axes, flip = ((*range(2, n + 2), 1, 0), 0) if layer.module.transpose_kernel else ((*range(2, n + 2), 0, 1), n)
    return [_permuted(join(layer.prefix, "kernel"), "weight", axes, flip, dim=1), _same(join(layer.prefix, "bias"), "bias")]


def _embed(layer: Layer) -> list[Entry]:
    return [_same(join(layer.prefix, "embedding"), "weight")]


def _prelu(layer: Layer) -> list[Entry]:
    return [_one(join(layer.prefix, "negative_slope"), "weight", lambda a: a.reshape(()), lambda a: a.reshape(1))]


def _norm(layer: Layer, model: Model, flattened: Flattened) -> list[Entry]:
    entries = []
    for name, theirs in _NORM_NAMES:
        if (path := join(layer.prefix, name)) in model.variables:
            entries.append(_same(path, theirs) if flattened is None else _flattened_feature(layer, path, theirs, model, flattened))
    if type(layer.module).__name__ in RUNNING:
        count, momentum = join(layer.prefix, "count"), layer.module.momentum
        if count in model.variables:
            entry = _one(count, "num_batches_tracked", lambda n: _count(n, momentum), lambda n: _batches(n, momentum))
            entries.append(entry._replace(optional=momentum not in (None, 1)))
        else:
            entries.append(Entry((), ("num_batches_tracked",), lambda n: (), lambda: (np.zeros((), np.int64),)))
    return entries


def _flattened_feature(layer: Layer, path: str, theirs: str, model: Model, flattened: tuple[int, ...]) -> Entry:
    shape = tuple(model.variables[path].shape)
    # PyTorch's LayerNorm has the axes of what it normalizes; what follows a flattening has one.
    axes = flattened if type(layer.module).__name__ == "LayerNorm" else (math.prod(flattened),)
    return _one(
        path,
        theirs,
        lambda a: _channels_last(a.ravel(), flattened).reshape(shape),
        lambda a: _channels_second(a.ravel(), flattened).reshape(axes),
    )


def _count(batches: np.ndarray, momentum: float | None) -> np.ndarray:
    """PyTorch's exponential average is not debiased: it is a debiased one whose count has come to its limit."""
    return np.asarray(batches if momentum is None or momentum == 1 else 1 / (1 - momentum), np.float32)


def _batches(count: np.ndarray, momentum: float | None) -> np.ndarray:
    return np.asarray(np.round(count) if momentum is None or momentum == 1 else 0, np.int64)


def _attention(layer: Layer, model: Model) -> list[Entry]:
    heads, names = layer.module.num_heads, ("query", "key", "value")

    def head(a: np.ndarray) -> np.ndarray:
        return a.T.reshape(*a.shape[1:], heads, a.shape[0] // heads)

    def flat(a: np.ndarray) -> np.ndarray:
        return a.reshape(*a.shape[:-2], -1).T

    def split(a: np.ndarray) -> Arrays:
        return tuple(map(head, np.split(a, 3)))

    def together(*parts: np.ndarray) -> Arrays:
        return (np.concatenate([flat(p) for p in parts]),)

    weights, biases = (tuple(join(layer.prefix, name, variable) for name in names) for variable in ("kernel", "bias"))
    if len({model.variables[path].shape[0] for path in weights if path in model.variables}) < 2:
        kernels = [Entry(weights, ("in_proj_weight",), split, together)]
    else:
        kernels = [_one(path, f"{name[0]}_proj_weight", head, flat) for path, name in zip(weights, names, strict=True)]
    out = join(layer.prefix, "out")
    return [
        *kernels,
        Entry(biases, ("in_proj_bias",), split, together),
        _one(join(out, "kernel"), "out_proj.weight", lambda a: a.T.reshape(heads, -1, a.shape[0]), lambda a: a.reshape(-1, a.shape[-1]).T),
        _same(join(out, "bias"), "out_proj.bias"),
    ]


_MAKERS: dict[str, Callable[[Layer], list[Entry]]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Embed": _embed,
    "PReLU": _prelu,
}


# --- Parametrizations -----------------------------------------------------------------------------------------------------------------


def _wrapped(layer: Layer, model: Model, entries: list[Entry]) -> list[Entry]:
    """With what stands for the weight in place of it, where the wrapper has something of it: a scale, or u and sigma."""
    make = _weight_norm if type(layer.wrapper).__name__ == "WeightNorm" else _spectral_norm
    out: list[Entry] = []
    for entry in entries:
        at = join(layer.beside, *[path.removeprefix(f"{layer.prefix}/") for path in entry.ours])
        beside = sorted(path for path in model.variables if path == at or path.startswith(f"{at}/"))
        out.append(make(layer.wrapper, model, entry, beside) if beside else entry)
    return out


def _weight_norm(wrapper: Any, model: Model, entry: Entry, beside: list[str]) -> Entry:
    """PyTorch's length has all axes of its tensor, of size 1 where it does not vary; ours has those along which it varies."""
    kernel, ours = tuple(model.variables[entry.ours[0]].shape), tuple(model.variables[beside[0]].shape)
    axes = wrapper.feature_axes
    features = {a % len(kernel) for a in (axes if isinstance(axes, tuple | list) else () if axes is None else (axes,))}
    told = np.empty(range(2, len(kernel) + 2), np.bool_)  # each axis of another size, to see where it goes
    varies = [told.shape.index(size) in features for size in entry.to_theirs(told)[0].shape]
    tensor = entry.to_theirs(np.broadcast_to(np.bool_(False), kernel))[0].shape
    theirs = tuple(size if v else 1 for size, v in zip(tensor, varies, strict=True)) if features else ()
    name = f"parametrizations.{entry.theirs[0]}."
    return Entry(
        (beside[0], *entry.ours),
        (f"{name}original0", f"{name}original1"),
        lambda g, v: (g.reshape(ours), *entry.to_ours(v)),
        lambda g, v: (g.reshape(theirs), *entry.to_theirs(v)),
    )


def _spectral_norm(wrapper: Any, model: Model, entry: Entry, beside: list[str]) -> Entry:
    """Both keep u, over the outputs. PyTorch's v follows from it and the weight, and so does our sigma."""
    sigma, u = beside

    def product(u: np.ndarray, tensor: np.ndarray) -> np.ndarray:
        rows = np.moveaxis(tensor, entry.dim, 0)
        return u.ravel().astype(np.float64) @ rows.reshape(len(rows), -1).astype(np.float64)

    def to_ours(w: np.ndarray, u: np.ndarray, v: np.ndarray) -> Arrays:
        return (*entry.to_ours(w), u[None], np.asarray(product(u, w) @ v))

    def to_theirs(kernel: np.ndarray, u: np.ndarray, sigma: np.ndarray) -> Arrays:
        (w,) = entry.to_theirs(kernel)
        v = product(u, w)
        return w, u[0], (v / max(np.linalg.norm(v), 1e-12)).astype(u.dtype)

    name = f"parametrizations.{entry.theirs[0]}."
    return Entry((*entry.ours, u, sigma), (f"{name}original", f"{name}0._u", f"{name}0._v"), to_ours, to_theirs)
