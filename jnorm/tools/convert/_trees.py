"""What a model is made of, by path: its layers and its variables, for NNX and Linen alike."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from flax.core import meta

from .._layers import trace
from ._norm import KINDS

NORMS = (*KINDS, "AddLayerNorm", "AddRMSNorm")
DENSE = ("Linear", "Dense")
ATTENTION = ("MultiHeadAttention", "MultiHeadDotProductAttention")
KNOWN = (*NORMS, *DENSE, *ATTENTION, "Conv", "ConvTranspose", "Embed", "PReLU")
WRAPPERS = ("WeightNorm", "SpectralNorm")
_CONTAINERS = ("List", "Dict", "Sequential")
Keys = tuple[Any, ...]


class Layer(NamedTuple):
    """A layer that there are rules for, and the wrapper around it, if there is one."""

    module: Any
    prefix: str  # of its variables
    name: str  # what it is called in other libraries, if nothing is renamed
    wrapper: Any = None
    beside: str = ""  # prefix of the wrapper's variables


class Model(NamedTuple):
    """Layers and variables by path, in the order in which they were made (NNX) or called (Linen)."""

    layers: dict[str, Layer]
    bare: dict[str, str]  # parameters of the user's own modules, and what they are called in other libraries
    variables: dict[str, Any]
    keys: dict[str, Keys]  # where a variable is
    unknown: dict[str, str]  # the classes of layers that there is no rule for


def text(keys: Keys) -> str:
    return "/".join(str(part) for key in keys for part in (key if isinstance(key, tuple) else (key,)))


def join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def axes_of(module: Any, name: str) -> tuple[int, ...] | None:
    """Of a norm: its `feature_axes` or `reduction_axes`, whatever its class calls the first; None where there are none."""
    axes = getattr(module, name, None)
    if axes is None and name == "feature_axes":  # Flax's GroupNorm of NNX says feature_axis; its Linen one has the last axis
        axes = getattr(module, "axis", getattr(module, "feature_axis", -1))
    return tuple(axes) if isinstance(axes, list | tuple) else None if axes is None else (axes,)


def _set_aside(found: Model) -> None:
    """Layers that are not as other libraries have them, though their class is."""
    for path, layer in list(found.layers.items()):
        if reason := _reason(layer, found):
            del found.layers[path]
            found.unknown[path] = reason


def _reason(layer: Layer, found: Model) -> str:
    kind = type(layer.module).__name__
    if kind in ATTENTION and getattr(layer.module, "normalize_qk", False):
        return f"{kind} with normalize_qk=True"
    for name, ndim in _ndims(layer.module, kind).items():
        variable = found.variables.get(join(layer.prefix, name))
        if variable is not None and len(variable.shape) != ndim:
            return f"several {kind} stacked: {name} has the shape {tuple(variable.shape)}"
    return ""


def _ndims(module: Any, kind: str) -> dict[str, int]:
    """How many axes a layer's variable has, unless there are several of it, as of `nnx.vmap` and `nn.scan`."""
    if kind in NORMS:
        axes = axes_of(module, "feature_axes") or ()
        return dict.fromkeys(("scale", "bias", "mean", "var"), len(axes) if isinstance(module, nn.Module) else 1)
    if kind in ATTENTION:
        return {"query/kernel": 3, "out/kernel": 3}
    if kind in ("Conv", "ConvTranspose"):
        size = module.kernel_size
        return {"kernel": len(size) + 2 if isinstance(size, list | tuple) else 3}
    return {"kernel": 2, "embedding": 2, "negative_slope": 0}


# --- NNX ------------------------------------------------------------------------------------------------------------------------------


def of_nnx_model(model: nnx.Module) -> Model:
    found = Model({}, {}, {}, {}, {})
    _walk(model, (), (), found, set())
    _set_aside(found)
    return found


def at(model: Any, keys: Keys) -> Any:
    for key in keys:
        model = model[key] if isinstance(model, dict | list | tuple | nnx.List) else getattr(model, key)
    return model


def _children(node: Any) -> list[tuple[Any, Any]]:
    """In the order in which they were set; of a module that was copied by Flax, in the order of their names."""
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    items = node.items() if isinstance(node, dict) else vars(node).items()
    return [(key, child) for key, child in items if not str(key).startswith("_pytree__")]


def _walk(node: Any, keys: Keys, names: Keys, found: Model, seen: set[int]) -> None:
    """What is at several places, such as tied weights, is found at the first."""
    if isinstance(node, nnx.Variable):
        if isinstance(node, nnx.Param | nnx.BatchStat) and id(node) not in seen:
            _note_variables(node, keys, found, seen)
            found.bare[text(keys)] = text(names)
        return
    if not _has_children(node) or id(node) in seen:
        return
    seen.add(id(node))
    kind, own = type(node).__name__, type(node).__module__.startswith(("flax.nnx", "jnorm.nnx"))
    if own and (kind in KNOWN or kind in WRAPPERS):
        found.layers.update({text(keys): _layer(node, keys, names)} if _is_plain(node) else {})
        found.unknown.update({} if _is_plain(node) else {text(keys): f"{kind} around {type(node.layer_instance).__name__}"})
        _note_variables(node, keys, found, seen)
    elif own and kind not in _CONTAINERS and any(isinstance(v, nnx.Param) for v in jax.tree.leaves(node, is_leaf=_is_variable)):
        found.unknown[text(keys)] = kind
    else:
        for key, child in _children(node):
            inside = kind == "Sequential" and own and key == "layers"
            _walk(child, (*keys, key), names if inside else (*names, key), found, seen)


def _has_children(node: Any) -> bool:
    return isinstance(node, nnx.Module | nnx.List | list | tuple | dict)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_plain(node: Any) -> bool:
    return type(node).__name__ not in WRAPPERS or type(node.layer_instance).__name__ in KNOWN


def _layer(node: Any, keys: Keys, names: Keys) -> Layer:
    path, name = text(keys), text(names)
    if type(node).__name__ not in WRAPPERS:
        return Layer(node, path, name)
    beside = join(path, "scales" if type(node).__name__ == "WeightNorm" else "batch_stats")
    return Layer(node.layer_instance, join(path, "layer_instance"), name, node, beside)


def _note_variables(node: Any, keys: Keys, found: Model, seen: set[int]) -> None:
    if isinstance(node, nnx.Variable):
        if isinstance(node, nnx.Param | nnx.BatchStat) and id(node) not in seen:
            seen.add(id(node))
            found.variables[text(keys)] = node
            found.keys[text(keys)] = keys
    elif _has_children(node):
        for key, child in _children(node):
            _note_variables(child, (*keys, key), found, seen)


# --- Linen ----------------------------------------------------------------------------------------------------------------------------


def of_linen_model(model: nn.Module, variables: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any]) -> Model:
    """The call is traced, and computes nothing."""
    found = Model({}, {}, {}, {}, {})
    calls: dict[tuple[str, ...], Any] = {}
    wrappers: list[tuple[tuple[str, ...], Any]] = []
    entered: set[str] = set()

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, kind = context.module, type(context.module).__name__
        entered.add(text(module.path))
        if context.method_name == "__call__" and type(module).__module__.startswith(("flax.linen", "jnorm.linen")):
            if kind in WRAPPERS:
                wrappers.append((module.path, module.clone(parent=None)))
            else:
                calls.setdefault(module.path, module.clone(parent=None))
        return call(*args, **kwargs)

    def run(variables: Any, args: Any) -> Any:
        with nn.intercept_methods(note):
            return model.apply(variables, *args, mutable=True, **kwargs)

    trace(run, variables, args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        {k: meta.unbox(variables[k]) for k in ("params", "batch_stats") if k in variables}
    ):
        keys = tuple(entry.key for entry in path)
        found.variables[text(keys[1:])] = leaf
        found.keys[text(keys[1:])] = keys
    _sort_calls(calls, wrappers, found)
    for path in [p for p in found.bare if p.rpartition("/")[2] == "kernel" and p.rpartition("/")[0] not in entered]:
        del found.bare[path]  # in which layout other libraries have it only its layer says
        found.unknown[path] = "of a layer that the call does not use"
    return found


def _sort_calls(calls: dict, wrappers: list, found: Model) -> None:
    def under(path: str) -> list[str]:
        return [p for p in found.variables if not path or p.startswith(f"{path}/")]

    inside: set[str] = set()
    for keys, module in sorted(calls.items(), key=lambda call: len(call[0]) > 0):
        path, kind = text(keys), type(module).__name__
        if any(not outer or path.startswith(f"{outer}/") for outer in (*found.layers, *found.unknown)):
            continue  # the parts of attention, of a recurrent cell
        if kind in KNOWN:
            # A wrapper holds what it adds under its own path and the layer's name.
            beside = ((join(text(outer), text(keys[-1:])), wrapper) for outer, wrapper in wrappers)
            at, wrapper = next(((at, wrapper) for at, wrapper in beside if under(at)), ("", None))
            found.layers[path] = Layer(module, path, path, wrapper, at)
            inside.update(under(path), under(at) if at else ())
        elif kind not in _CONTAINERS and under(path):
            found.unknown[path] = kind
            inside.update(under(path))
    found.bare.update({path: path for path in found.variables if path not in inside})
    _set_aside(found)
