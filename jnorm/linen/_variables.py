"""All that knows how Linen stores variables: affine parameters, a state dict, the parameters of a wrapped layer."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

import flax.linen as nn
import jax
from flax.core import DenyList, meta
from flax.traverse_util import flatten_dict, unflatten_dict

from .._modules import check_selected, errors_in, told_layer

Initializer = Callable[..., Any]
Path = tuple[str, ...]


def errors_of(module: nn.Module) -> AbstractContextManager[None]:
    """Refusals say where in the model they happened."""

    def where() -> str:
        path, name = "/".join(module.path), type(module).__name__
        return f"{name} at {path}" if path else name

    return errors_in(where)


def is_box(value: Any) -> bool:
    return isinstance(value, meta.AxisMetadata)


def scale_param(module: Any, shape: tuple[int, ...]) -> jax.Array | None:
    return module.param("scale", module.scale_init, shape, module.param_dtype) if module.use_scale else None


def bias_param(module: Any, shape: tuple[int, ...]) -> jax.Array | None:
    return module.param("bias", module.bias_init, shape, module.param_dtype) if module.use_bias else None


def param_of(layer: nn.Module, name: str) -> jax.Array:
    """A parameter of a layer that was called, out of its box of metadata."""
    value = layer.variables["params"][name]
    return value.unbox() if is_box(value) else value


class StateVariables:
    """A state dict as the variables of a collection, one a key. `make` runs only where there are none yet: it may draw a random key."""

    def __init__(self, module: nn.Module, make: Callable[[], Any], keys: Iterable[str], collection: str = "batch_stats", prefix: str = ""):
        made: dict[str, Any] = {}

        def initial(key: str) -> Any:
            if not made:
                made.update(make())
            return made[key]

        self._variables = {key: module.variable(collection, prefix + key, initial, key) for key in keys}

    def read(self) -> Any:
        return {key: variable.value for key, variable in self._variables.items()}

    def write(self, old: Any, new: Any) -> None:
        """Nothing where nothing moved, so that evaluation needs no mutable collection."""
        if new is not old:
            for key, variable in self._variables.items():
                variable.value = new[key]


def check_layer(layer: Any) -> None:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer_instance must be an nn.Module, got {told_layer(layer)}.")


def params_of(layer: nn.Module) -> dict[Path, jax.Array]:
    """The parameters of a bound layer by path, out of their boxes."""
    check_layer(layer)
    params: Any = meta.unbox(layer.variables.get("params", {}))
    return cast(dict[Path, jax.Array], flatten_dict(params))


def pure_call(module: nn.Module, layer: nn.Module, args: tuple, kwargs: dict) -> Callable[[dict[Path, jax.Array]], Any]:
    """The layer's output as a function of its parameters, which are made already."""
    bare, variables = layer.unbind()
    rngs = {name: module.make_rng(name) for name in module.scope.rngs} if module.scope is not None else {}

    def call(params: dict[Path, jax.Array]) -> Any:
        given = {**variables, "params": unflatten_dict(params)}
        return bare.apply(given, *args, rngs=rngs, mutable=DenyList("params"), **kwargs)[0]

    return call


def write_param(layer: nn.Module, path: Path, value: jax.Array) -> None:
    """Over a parameter of the layer or of one in it, in its dtype and its box of metadata."""
    scope: Any = layer.scope
    for name in path[:-1]:
        scope = scope.push(name, reuse=True)
    old = scope.get_variable("params", path[-1])
    scope.put_variable("params", path[-1], meta.replace_boxed(old, value.astype(meta.unbox(old).dtype)))


def boxed_as(init: Initializer, start: Callable[[], jax.Array]) -> Initializer:
    """An initializer of what `start` gives, in the box of metadata that `init` makes."""
    return lambda key, shape, dtype: meta.replace_boxed(init(key, shape, dtype), start().astype(dtype))


def call_with_params(module: nn.Module, layer: Any, change: Callable[[str, jax.Array], jax.Array | None], args: tuple, kwargs: dict) -> Any:
    """The layer's output with its parameters changed, by path, for this call only. None leaves one; not all may be left."""
    with errors_of(module):
        check_layer(layer)
    if module.is_initializing():
        layer(*args, **kwargs)  # makes the parameters, as the layer's own initializers give them

    def changed(collections: Any) -> Any:
        left: list[str] = []

        def one(path: Any, value: Any) -> Any:
            name = f"{layer.name}/{jax.tree_util.keystr(path[1:], simple=True, separator='/')}"
            # A box of metadata, such as nn.Partitioned, stays around the parameter and is no part of its name.
            new = change(name, value.unbox() if is_box(value) else value)
            if new is None:
                left.append(name)
                return value
            return value.replace_boxed(new) if is_box(value) else new

        changed = jax.tree_util.tree_map_with_path(one, collections, is_leaf=is_box)
        with errors_of(module):
            check_selected(left, len(jax.tree.leaves(collections, is_leaf=is_box)))
        return changed

    return nn.map_variables(lambda inner: inner(*args, **kwargs), "params", changed)(layer)
