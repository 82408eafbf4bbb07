"""Which tensor of a state dict is which variable of a model, and what is said where they do not fit."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._layers import Layers, chosen
from ._layouts import Entry, bare_entry, entries_of
from ._torch import array_of, canonical_state, folded_weight, parametrized_keys
from ._trees import DENSE, NORMS, Model, join

Rename = Mapping[str, str] | Callable[[str], str] | None
MatchBy = Literal["name", "order"]
Flattenings = Mapping[str, tuple[int, ...]]
_LISTED = 12
_PARAMETRIZED = re.compile(r"((?:.*\.)?parametrizations\.\w+\.)(?!original[01]$)")
_NAME = re.compile(r"(?:(?P<layer>.*?)\.)?(?P<name>parametrizations\.\w+\.(?:original[01]?|0\._[uv])|\w+)")


class Asked(NamedTuple):
    """What the caller says of names and layers; see :func:`load`."""

    rename: Rename
    match: MatchBy
    layers: Layers | None
    ignore: tuple[str, ...]
    flattened: Flattenings | None


def asked_for(rename: Rename, match: MatchBy, layers: Layers | None, ignore: Iterable[str], flattened: Flattenings | None) -> Asked:
    if match not in ("name", "order"):
        raise ValueError(f'match must be "name" or "order", got {match!r}.')
    if match == "order" and rename is not None:
        raise ValueError('match="order" asks for no names: leave rename out.')
    return Asked(rename, match, layers, (ignore,) if isinstance(ignore, str) else tuple(ignore), flattened)


class Pair(NamedTuple):
    """An entry of a layer (or of a parameter of the user's own), and the keys of its tensors."""

    path: str
    entry: Entry
    keys: tuple[str, ...]


def renamer(rename: Rename) -> Callable[[str], str]:
    """From a path to PyTorch's name."""
    if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
        raise TypeError(f"rename must be a dict of regular expressions and what to put in their place, or a function, got {rename!r}.")

    def name(path: str) -> str:
        if isinstance(rename, Mapping):
            for pattern, replacement in rename.items():
                path = re.sub(pattern, replacement, path)
        elif rename is not None:
            path = rename(path)
        return path.replace("/", ".")

    return name


def pairs_of(model: Model, name: Callable[[str], str], flattened: Flattenings | None) -> list[Pair]:
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, shape in (flattened or {}).items():
        paths = chosen(model.layers, pattern, "layers", "flattened")
        for path in paths:
            _check_flattened(model, path, tuple(shape))
        shapes |= dict.fromkeys(paths, tuple(shape))
    found = []
    for path, layer in model.layers.items():
        found += [Pair(path, entry, _keys(name(layer.name), entry)) for entry in entries_of(layer, model, shapes.get(path))]
    for path, theirs in model.bare.items():
        entry = bare_entry(path)
        found.append(Pair(path, entry, _keys(name(theirs), entry)))
    return found


def _check_flattened(model: Model, path: str, shape: tuple[int, ...]) -> None:
    layer = model.layers[path]
    kind = type(layer.module).__name__
    if kind not in (*DENSE, *NORMS):
        raise ValueError(f"flattened is of dense layers and norms, {told(path)} is no such layer but {kind}.")
    kernel = model.variables.get(join(layer.prefix, "kernel"))
    if kernel is not None and kernel.shape[0] != math.prod(shape):
        raise ValueError(f"flattened says {shape} of {told(path)}, which has {kernel.shape[0]} features, not {math.prod(shape)}.")


def check_names(pairs: list[Pair], paths: set[str]) -> None:
    """A tensor of PyTorch's is that of one layer."""
    owners: dict[str, str] = {}
    for pair in pairs:
        for key in pair.keys if pair.path in paths else ():
            if (other := owners.setdefault(key, pair.path)) != pair.path:
                raise ValueError(f"{told(other)} and {told(pair.path)} are both called {key!r} there; rename= has to tell them apart.")


def _keys(prefix: str, entry: Entry) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" if prefix and name else prefix or name for name in entry.theirs)


def selected(model: Model, layers: Layers | None) -> set[str]:
    """The paths of layers, and parameters outside of layers, that are asked for; there must be a rule for each."""
    paths = set(chosen([*model.layers, *model.bare, *model.unknown], layers, "layers"))
    if unknown := [f"{told(path)} ({kind})" for path, kind in model.unknown.items() if path in paths]:
        raise ValueError(
            f"there is no rule for these layers: {some(unknown)}; leave them out with layers=, a function that is False for their paths, "
            "and set them yourself."
        )
    if not model.variables:
        raise ValueError("the model has no parameters.")
    return paths


# --- By order -------------------------------------------------------------------------------------------------------------------------


def names_by_order(
    model: Model, state: Mapping[str, Any], pairs: list[Pair], paths: set[str], ignore: Iterable[str] = ()
) -> dict[str, str]:
    """PyTorch's name for each of the layers, by the order of both. Parameters outside of layers go by their names.

    Where only some layers are asked for, the source has these alone, or all of them.
    """
    if any(isinstance(v, nnx.Variable) and isinstance(v.get_value(), jax.ShapeDtypeStruct) for v in model.variables.values()):
        raise ValueError(
            'match="order" needs a model that is initialized: an abstract one has forgotten the order in which its layers were set; '
            "name them with rename=."
        )
    state = canonical_state(state)
    out = {key for pair in pairs if pair.path in model.bare for key in pair.keys} | ignored(state, ignore)
    theirs = _groups(key for key in state if key not in out)
    everything: dict[str, set[str]] = {}
    for pair in pairs:
        if pair.path in model.layers and pair.entry.ours:
            everything.setdefault(pair.path, set()).update(pair.entry.theirs)
    ours = {path: names for path, names in everything.items() if path in paths}
    if len(ours) != len(theirs) == len(everything):
        ours = everything
    here, there = list(ours), list(theirs)
    wrong = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if not _alike(ours[a], theirs[b])), None)
    if wrong is not None or len(here) != len(there):
        i = min(len(here), len(there)) if wrong is None else wrong
        a = f"{here[i]!r} with {sorted(ours[here[i]])}" if i < len(here) else "none"
        b = f"{there[i]!r} with {sorted(theirs[there[i]])}" if i < len(there) else "none"
        raise ValueError(
            f'match="order": the model has {len(here)} layers with parameters, the source {len(there)}, and number {i + 1} is {a} here '
            f"and {b} there; name them with rename=."
        )
    return {model.layers[a].name: b for a, b in zip(here, there, strict=True)}


def _groups(keys: Iterable[str]) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for key in keys:
        match = _NAME.fullmatch(key)
        layer, name = (match["layer"] or "", match["name"]) if match else ("", key)
        parent, _, last = layer.rpartition(".")
        if last == "out_proj" and any(n.startswith(("in_proj", "q_proj")) for n in groups.get(parent, ())):
            layer, name = parent, f"out_proj.{name}"
        groups.setdefault(layer, set()).add(name)
    return {layer: names for layer, names in groups.items() if names != {"num_batches_tracked"}}


def _alike(ours: set[str], theirs: set[str]) -> bool:
    def plain(names: set[str]) -> set[str]:
        return {name.split(".")[1] if name.startswith("parametrizations.") else name for name in names} - {"num_batches_tracked"}

    return plain(ours) == plain(theirs)


# --- Reading --------------------------------------------------------------------------------------------------------------------------


def read(model: Model, pairs: list[Pair], state: Mapping[str, Any], paths: set[str], ignore: Iterable[str]) -> dict[str, np.ndarray]:
    """The variables' values, by path, in their shapes.

    Raises:
      ValueError: keys that are missing or left over, shapes that do not fit: all of them at once.
    """
    state = canonical_state(state)
    skipped = ignored(state, ignore)
    values: dict[str, np.ndarray] = {}
    used: set[str] = set()
    missing: list[tuple[str, str]] = []
    wrong: list[str] = []
    for pair in pairs:
        arrays, taken, absent = _tensors(pair, state)
        used |= taken
        if pair.path not in paths:
            continue
        if absent:
            missing += [(key, pair.path) for key in absent if pair.entry.ours]
            continue
        if problem := _shapes_differ(model, pair, arrays):
            wrong.append(problem)
            continue
        values |= dict(zip(pair.entry.ours, pair.entry.to_ours(*arrays), strict=True))
    extra = [key for key in state if key not in used | skipped and not _tied(state, key, used)]
    if missing or extra or wrong:
        raise ValueError(_misfits(missing, extra, wrong, state, pairs))
    return values


def ignored(state: Mapping[str, Any], ignore: Iterable[str]) -> set[str]:
    """The keys that the patterns stand for, or what they lie under."""
    skipped: set[str] = set()
    for pattern in ignore:
        above = f"{pattern.rstrip('.')}.*"
        if not (found := {key for key in state if fnmatchcase(key, pattern) or fnmatchcase(key, above)}):
            raise ValueError(f"ignore={pattern!r} matches none of the keys of the source: {some(list(map(repr, state)))}.")
        skipped |= found
    return skipped


def _tensors(pair: Pair, state: Mapping[str, Any]) -> tuple[list[np.ndarray], set[str], list[str]]:
    """The entry's tensors, the keys that they are of, and the keys that are not there."""
    arrays: list[np.ndarray] = []
    used: set[str] = set()
    absent = [key for key in pair.keys if key not in state]
    if len(pair.keys) == 1 and absent:
        for keys in parametrized_keys(pair.keys[0]):
            if all(key in state for key in keys):
                weight = folded_weight(pair.keys[0], [array_of(state[key]) for key in keys], pair.entry.dim)
                return [weight], set(keys), []
    for key in pair.keys:
        if key in state:
            arrays.append(array_of(state[key]))
            used.add(key)
    if absent and pair.entry.optional:
        return [np.zeros(())], used, []
    return arrays, used, absent


def zeros(model: Model, pair: Pair) -> list[np.ndarray]:
    return [np.broadcast_to(np.zeros((), np.float32), model.variables[path].shape) for path in pair.entry.ours]


def _shapes_differ(model: Model, pair: Pair, arrays: list[np.ndarray]) -> str | None:
    want = [a.shape for a in pair.entry.to_theirs(*zeros(model, pair))]
    for key, shape, array in zip(pair.keys, want, arrays, strict=True):
        if shape != array.shape:
            return f"{told(pair.path)}: {key!r} has the shape {array.shape}, the model needs {shape}"
    return None


def _tied(state: Mapping[str, Any], key: str, used: set[str]) -> bool:
    """Whether it is another name of a tensor that was taken, such as an embedding's that is the last layer's weight too."""
    tensor = state[key]
    pointer = getattr(tensor, "data_ptr", None)
    for other in used:
        there = state[other]
        if there is tensor or (pointer is not None and hasattr(there, "data_ptr") and pointer() == there.data_ptr() != 0):
            return jnp.shape(array_of(there)) == jnp.shape(array_of(tensor))
    return False


def _misfits(missing: list, extra: list[str], wrong: list[str], state: Mapping[str, Any], pairs: list[Pair]) -> str:
    wanted = [key for pair in pairs for key in pair.keys]
    lines = ["the source does not fit the model."]
    if missing:
        lines.append(f"Missing: {some(missing, lambda pair: f'{pair[0]!r} (of {told(pair[1])}{near(pair[0], extra)})')}.")
    if extra:
        left = [key for key in wanted if key not in state]
        lines.append(f"Not in the model: {some(extra, lambda key: f'{key!r}{near(key, left, brackets=True)}')}.")
    if wrong:
        lines.append(f"Of other shapes: {some(wrong)}.")
    if others := [key for key in extra if (match := _PARAMETRIZED.match(key)) and f"{match[1]}0._u" not in state]:
        lines.append(
            f"There is no rule for the parametrizations of {some(others, repr)}: make them plain weights with "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )
    if missing or extra:
        lines.append("Say with rename= what the layers are called there, with ignore= what to leave, and with layers= what to set.")
    return "\n".join(lines)


def near(key: str, among: list[str], brackets: bool = False) -> str:
    found = difflib.get_close_matches(key, among, n=1, cutoff=0.5)
    return "" if not found else f" (like {found[0]!r})" if brackets else f"; like {found[0]!r}, which is there"


def told(path: str) -> str:
    return path or "the model itself"


def some(things: list[Any], told: Callable[[Any], str] = str) -> str:
    """The first few, and how many more there are."""
    more = len(things) - _LISTED
    return ", ".join(map(told, things[:_LISTED])) + (f", and {more} more" if more > 0 else "")
