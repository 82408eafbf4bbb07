"""What is loaded goes into a copy of a model, or into variables like those that were given."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

from ._trees import Model, at, of_nnx_model


def copied(model: nnx.Module) -> tuple[Any, Model]:
    """A copy of the model, and what is found in it. Its modules are those of the copy, which may be changed."""
    found, new = of_nnx_model(model), nnx.clone(model)
    keys = {id(module): keys for keys, module in nnx.iter_modules(model)}
    layers = {path: layer._replace(module=at(new, keys[id(layer.module)])) for path, layer in found.layers.items()}
    return new, found._replace(layers=layers)


def fill_model(new: nnx.Module, found: Model, values: Mapping[str, np.ndarray]) -> None:
    """Sets variables of the copy, by path."""
    for path, value in values.items():
        variable = at(new, found.keys[path])
        variable.set_value(like(value, variable.get_value()))


def filled_variables(variables: Any, found: Model, values: Mapping[str, np.ndarray]) -> Any:
    """Linen's variables with others by path, in the boxes of metadata of the old ones."""
    by_keys = {found.keys[path]: value for path, value in values.items()}

    def one(path: Any, leaf: Any) -> Any:
        keys = tuple(getattr(entry, "key", None) for entry in path)
        return meta.replace_boxed(leaf, like(by_keys[keys], meta.unbox(leaf))) if keys in by_keys else leaf

    return jax.tree_util.tree_map_with_path(one, variables, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))


def like(value: np.ndarray, old: Any) -> jax.Array:
    """In the dtype of the old value, and over the devices that it is over, where those are several."""
    array = jnp.asarray(np.array(value, old.dtype, order="C"))
    sharding = getattr(old, "sharding", None)
    return jax.device_put(array, sharding) if sharding is not None and len(sharding.device_set) > 1 else array
