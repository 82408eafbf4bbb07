"""Which array of a model of another library, in Flax's layouts and by name, is which variable of a model here."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..._pipeline import marks
from .._layers import chosen
from ._layouts import Arrays, Entry, bare_entry
from ._match import Pair
from ._source import Weights, dotted, squeezed
from ._trees import ATTENTION, DENSE, NORMS, Layer, Model, join


def pairs_with(found: Model, weights: Weights, name: Callable[[str], str], flattened: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """As `_match.pairs_of`, of what the source calls its layers."""
    pairs = []
    for path, layer in found.layers.items():
        theirs = name(layer.name)
        for variable, shape in _owned(found, layer):
            entry = _entry(layer, variable, shape, flattened.get(path), weights.values, theirs)
            pairs.append(Pair(path, entry, tuple(dotted(theirs, key) for key in entry.theirs)))
    for path, theirs in found.bare.items():
        pairs.append(Pair(path, bare_entry(path), (name(theirs),)))
    return pairs


def shapes_of(found: Model, flattened: Mapping[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]]:
    """By path of a layer, which are patterns in what was given."""
    shapes = {
        path: tuple(shape) for pattern, shape in (flattened or {}).items() for path in chosen(found.layers, pattern, "layers", "flattened")
    }
    for path in shapes:
        if (kind := type(found.layers[path].module).__name__) not in (*DENSE, *NORMS):
            raise ValueError(f"flattened has {path!r} ({kind}): it is for the features of dense layers and norms.")
    return shapes


def _owned(found: Model, layer: Layer) -> list[tuple[str, tuple[int, ...]]]:
    """A layer's variables, and those that its wrapper has beside. The count follows from others, and marks are of jnorm alone."""
    prefixes = [join(layer.prefix, "")] if not layer.prefix else [f"{layer.prefix}/"]
    prefixes += [f"{layer.beside}/"] if layer.wrapper is not None else []
    left = {join(layer.prefix, name) for name in ("count", *marks.KEYS)} if type(layer.module).__name__ in NORMS else set()
    owned = [path for path in found.variables if any(path.startswith(prefix) for prefix in prefixes) and path not in left]
    return [(path, tuple(found.variables[path].shape)) for path in owned]


def _entry(
    layer: Layer, path: str, shape: tuple[int, ...], flattened: tuple[int, ...] | None, source: Mapping[str, np.ndarray], theirs: str
) -> Entry:
    kind, beside = type(layer.module).__name__, layer.wrapper is not None and not _inside(path, layer.prefix, layer.beside)
    inner = path.removeprefix(f"{layer.beside if beside else layer.prefix}/")
    key = _beside_key(inner) if beside else inner.replace("/", ".")
    if kind in NORMS and not beside:
        there = np.shape(source.get(dotted(theirs, key), ()))
        return _norm_entry(path, key, shape, flattened, there)
    if kind in DENSE and inner == "kernel" and flattened is not None:
        return _entry_of(path, key, lambda a: _rows(a, flattened, True), lambda a: _rows(a, flattened, False))
    flat: tuple[int, ...] = shape
    if beside or (kind in ATTENTION and len(shape) < 3):
        flat = (math.prod(shape),)
    elif kind in ATTENTION:
        flat = (math.prod(shape[:-1]), shape[-1]) if inner.startswith("out/") else (shape[0], math.prod(shape[1:]))
    return _entry_of(path, key, lambda a: a.reshape(shape), lambda a: a.reshape(flat))


def _norm_entry(path: str, key: str, shape: tuple[int, ...], flattened: tuple[int, ...] | None, there: tuple[int, ...]) -> Entry:
    """Of several axes as of one: those of (C, *positions) there lie as (*positions, C) here."""
    if flattened is None:
        wanted = squeezed(shape)
        return _entry_of(path, key, lambda a: a.reshape(shape), lambda a: a.reshape(wanted))
    if math.prod(flattened) != math.prod(shape):
        raise ValueError(f"flattened has {flattened} for {path!r}, which has {math.prod(shape)} features.")
    # What follows a flattening has one axis there, and what does not is told in the order that it has.
    alike = len(there) < 2 or len(flattened) == 1
    wanted = there if alike and math.prod(there) == math.prod(shape) else squeezed(flattened)
    return _entry_of(path, key, lambda a: _rows(a, flattened, True).reshape(shape), lambda a: _rows(a, flattened, False).reshape(wanted))


def _inside(path: str, prefix: str, beside: str) -> bool:
    """Whether a variable is the layer's own: where the wrapper's are under the same prefix they are deeper, or elsewhere."""
    return path.startswith(f"{prefix}/") and not (beside.startswith(f"{prefix}/") and path.startswith(f"{beside}/"))


def _beside_key(inner: str) -> str:
    last = inner.rpartition("/")[2]
    return f"kernel_{last}" if last in ("u", "sigma") else "kernel_scale"


def _entry_of(path: str, key: str, there: Callable[..., np.ndarray], back: Callable[..., np.ndarray]) -> Entry:
    def to_ours(a: np.ndarray) -> Arrays:
        return (there(a),)

    return Entry((path,), (key,), to_ours, lambda a: (back(a),))


def _rows(kernel: np.ndarray, shape: tuple[int, ...], last: bool) -> np.ndarray:
    """Of a kernel whose inputs were flattened from (C, H, W), or from (H, W, C)."""
    there = shape if last else (*shape[1:], shape[0])
    return np.moveaxis(kernel.reshape(*there, -1), 0 if last else -2, -2 if last else 0).reshape(kernel.shape)
