"""All that knows how NNX stores variables: affine parameters, a state dict, the parameters of a wrapped layer."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from .._modules import errors_in, feature_shape, result_dtype, told_layer
from .._pipeline.values import check_size
from ..typing import Axes

Initializer = Callable[..., Any]
Metadata = Mapping[str, Any]
Path = tuple[Any, ...]
PromoteDtype = Callable[..., tuple]

NO_METADATA: Metadata = MappingProxyType({})
promote_dtype: PromoteDtype = dtypes.promote_dtype


def text_of(path: Path) -> str:
    return "/".join(map(str, path))


def errors_of(module: Any, path: Path = ()) -> AbstractContextManager[None]:
    """Refusals say which class, of how many features (an NNX module does not know where in the model it is), and which weight of it."""

    def where() -> str:
        name, features = type(module).__name__, getattr(module, "num_features", None)
        return ": ".join([name if features is None else f"{name}(num_features={features})", *([text_of(path)] if path else [])])

    return errors_in(where)


def static(axes: Any) -> Any:
    """Axes and groups as tuples: what is static about a module must be hashable."""
    return tuple(static(a) for a in axes) if isinstance(axes, list | tuple) else axes


def affine_param(use: bool, init: Initializer, features: int, dtype: Any, rngs: nnx.Rngs, metadata: Metadata) -> Any:
    """A parameter, or None as data, so that one may be put there later."""
    check_size(features, "num_features")
    return nnx.Param(init(checked(rngs).params(), (features,), dtype), **metadata) if use else nnx.data(None)


def checked(rngs: Any) -> nnx.Rngs:
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0) or nnx.Rngs(key), got {type(rngs).__name__}.")
    return rngs


def value(variable: nnx.Variable[jax.Array] | None, shape: tuple[int, ...]) -> jax.Array | None:
    """All features lie in one axis of a variable; the functions take them in x's feature axes."""
    return None if variable is None else variable[...].reshape(shape)


def shape_of_features(module: Any, x: jax.Array, axes: Axes, name: str) -> tuple[int, ...]:
    shape = feature_shape(x, axes, name)
    if math.prod(shape) != module.num_features:
        raise ValueError(
            f"x of shape {x.shape} has {math.prod(shape)} features on {name}={axes!r}, but num_features={module.num_features}."
        )
    return shape


def y_dtype(module: Any, x: jax.Array, between: tuple = (), affine: tuple = ()) -> Any:
    """y's dtype: that of what `promote_dtype` makes of x, scale and bias. Nothing is cast to it before it is reduced."""
    if module.dtype is not None:
        return module.dtype
    with jax.numpy_dtype_promotion("standard"):
        promoted = jax.eval_shape(lambda arrays: tuple(module.promote_dtype(arrays, dtype=None)), (x, *between, *affine))
    return result_dtype(promoted[0], *promoted[1 + len(between) :], dtype=None)


def set_state(module: nnx.Module, state: Mapping[str, Any]) -> None:
    """Each entry of a state dict as a BatchStat of its name."""
    for key, entry in state.items():
        setattr(module, key, nnx.BatchStat(entry))


def read_state(module: nnx.Module, keys: tuple[str, ...], shape: tuple[int, ...]) -> Any:
    entries = {key: getattr(module, key)[...] for key in keys}
    return {key: entry.reshape(shape) if entry.ndim else entry for key, entry in entries.items()}


def write_state(module: nnx.Module, old: Any, new: Any) -> None:
    """Nothing where nothing moved: in evaluation the variables may be such as must not be written."""
    if new is not old:
        for key, entry in new.items():
            getattr(module, key).set_value(entry.ravel() if entry.ndim else entry)


def params_of(layer: nnx.Module) -> dict[Path, nnx.Param[jax.Array]]:
    if not isinstance(layer, nnx.Module):
        raise TypeError(f"layer_instance must be an nnx.Module, got {told_layer(layer)}.")
    return dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))


def key_of(rngs: nnx.Rngs, path: Path) -> jax.Array:
    """A key for one more parameter that leaves the stream where it is: the layers that are made next start as they do with Flax's class."""
    return jax.random.fold_in(checked(rngs)["params"].key[...], int.from_bytes(text_of(path).encode(), "big") % (2**31 - 1))


def with_params(layer: nnx.Module, values: Mapping[Path, jax.Array], copy: bool = False) -> nnx.Module:
    """The layer with other values of these parameters. All its other variables are the layer's own, if they are not copied: what it writes
    to them, it writes."""
    graphdef, state = nnx.split(layer)
    flat = dict(nnx.to_flat_state(state))
    changed = nnx.from_flat_state({path: v.replace(values[path]) if path in values else v for path, v in flat.items()})
    return nnx.merge(graphdef, changed, copy=copy)


def write_params(layer: nnx.Module, values: Mapping[Path, jax.Array]) -> None:
    """Over parameters of the layer, in their dtypes."""
    params = params_of(layer)
    nnx.update(layer, nnx.from_flat_state({path: params[path].replace(v.astype(params[path].dtype)) for path, v in values.items()}))


def call_with_params(layer: nnx.Module, values: Mapping[Path, jax.Array], *args: Any, **kwargs: Any) -> Any:
    """The layer's output with these values of its parameters, for this call only."""
    changed: Any = with_params(layer, values)
    before = dict(nnx.to_flat_state(nnx.state(changed)))
    out = changed(*args, **kwargs)
    # Such as intermediates that were sown, or a variable in place of another.
    made = {path: v for path, v in nnx.to_flat_state(nnx.state(changed)) if path not in values and v is not before.get(path)}
    if made:
        nnx.update(layer, nnx.from_flat_state(made))
    return out
