"""Folding in NNX models."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from ... import nnx as jnx
from .._layers import NORMS_NNX, Layers, chosen, nnx_norms, put_modules
from .calls import Calls, finished, has_layer
from .plan import Key, einsum_order, folded_values, plan, trace, with_bias
from .report import Report
from .walks import Layer

_CLASSES = (*NORMS_NNX, jnx.FeatureStandardization)
_WRAPPERS = (jnx.SpectralNorm, jnx.WeightNorm, jnx.WeightStandardization)
_LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Einsum, nnx.Linear, nnx.LinearGeneral)


class Folded(NamedTuple):
    """What :func:`fold` returns of an NNX model.

    Args:
      model: a copy of the model whose norms are folded.
      report: what became of each norm; its text is a table.
    """

    model: Any
    report: Report


class Identity(nnx.Module):
    """What is left in place of a norm that was folded: x in the dtype of the norm's output, with its activation, where it has one.

    It takes the arguments of the norm's call, and heeds x and `residual` alone.

    Args:
      dtype: of the output.
      activation: that of the norm.
      bias: what is added, where the layer before has no place for it.
      layer_instance: the layer before, of a norm that calls that itself.
    """

    bias: nnx.Param[jax.Array] | None

    def __init__(self, dtype: Any = None, activation: Any = None, bias: jax.Array | None = None, layer_instance: Any = None) -> None:
        self.dtype = dtype
        self.activation = activation
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.layer_instance = layer_instance

    def __call__(self, x: Any, *args: Any, residual: Any = None, **kwargs: Any) -> jax.Array:
        """x, and what the norm did beside normalizing it."""
        del args, kwargs
        x = x if self.layer_instance is None else self.layer_instance(x)
        return finished(x, None if self.bias is None else self.bias[...], residual, self.activation, self.dtype)

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets: there is nothing to set.

        Args:
          use_running_average: of the norm.
          update_running: of the norm.
        """


class Unwrapped(nnx.Module):
    """What is left of a wrapper of weights, whose layer has them: it takes the arguments of the wrapper's call.

    Args:
      layer_instance: the layer.
    """

    def __init__(self, layer_instance: Any) -> None:
        self.layer_instance = layer_instance

    def __call__(self, *args: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """The layer's output."""
        del update_stats
        return self.layer_instance(*args, **kwargs)


class _Marked(nnx.Module):
    """A norm whose calls are marked in the trace."""

    def __init__(self, norm: Any, path: str, calls: Calls) -> None:
        self.norm, self.path, self.calls = norm, path, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.calls.run(self.path, self.norm, self.norm, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = vars(self).get("path")
        raise AttributeError(f"fold: the model reads {name!r} of the norm {path!r}, beside calling it; leave that norm out with `layers`.")


def fold_nnx(model: Any, args: tuple, kwargs: dict, layers: Layers | None) -> Folded:
    """:func:`jnorm.tools.fold` of an NNX model."""
    copy, calls = _plain(nnx.clone(model)), Calls("call model.eval() first")
    norms = nnx_norms(copy, _CLASSES)
    wanted = chosen(norms, layers)
    marked = {id(norm): _Marked(norm, path, calls) for path, norm in norms.items() if calls.note(path, norm) and path in wanted}
    root: Any = marked.get(id(copy), copy)
    if root is copy:
        put_modules(copy, marked)
    graphdef, state = nnx.split(root)

    def run(state: Any, args: tuple, kwargs: dict) -> Any:
        traced: Any = nnx.merge(graphdef, state)
        return traced(*args, **kwargs), nnx.state(traced)

    at = {tuple(path) for path, m in nnx.iter_modules(root) if isinstance(m, _Marked)}
    params = {path: v for path, v in nnx.to_flat_state(state) if isinstance(v, nnx.Variable) and issubclass(v.type, nnx.Param)}
    names = {path: _without_marks(path, at) for path in params}
    graph = trace(run, state, args, kwargs, names.get)
    pairs, report = plan(graph, calls, wanted, lambda layer, direction: _with_bias(root, layer, direction))
    used = {key for pair in pairs for key in (pair.layer.kernel, pair.layer.bias)}
    values = {names[path]: v[...] for path, v in params.items() if names[path] in used}
    variables = {p.norm: {k: v[...] for k, v in vars(norms[p.norm]).items() if isinstance(v, nnx.Variable)} for p in pairs}
    new, shifts = folded_values(values, pairs, calls, variables)
    for key, value in new.items():
        layer: Any = _at(root, key[:-1])
        if getattr(layer, key[-1]) is None:
            _set_bias(layer, value)
        else:
            getattr(layer, key[-1]).set_value(value)
    left = {p.norm: _identity(norms[p.norm], calls, p.norm, shifts.get(p.norm)) for p in pairs}
    replaced = {id(m): left.get(m.path, m.norm) for m in marked.values()}
    if root is not copy:
        return Folded(replaced[id(root)], report)
    put_modules(copy, replaced)
    return Folded(copy, report)


def _plain(model: Any) -> Any:
    """The model with the weights that its wrappers make, in place of the wrappers. All are computed in one compiled program."""
    if not any(isinstance(m, _WRAPPERS) for _, m in nnx.iter_modules(model)):
        return model
    graphdef, state = nnx.split(model)
    new: list[Any] = []

    def unwrap(state: Any) -> Any:
        root = nnx.merge(graphdef, state)
        while wrappers := [m for _, m in nnx.iter_modules(root) if isinstance(m, _WRAPPERS)]:
            outer: Any = wrappers[-1]  # those that lie in others come before them
            plain = Unwrapped(outer.fold()) if isinstance(outer, jnx.SpectralNorm) else outer.fold()
            if outer is root:
                root = plain
            else:
                put_modules(root, {id(outer): plain})
        graph, changed = nnx.split(root)
        new.append(graph)
        return changed

    changed = jax.jit(unwrap)(state)
    return nnx.merge(new[0], changed)


def _identity(norm: Any, calls: Calls, path: str, shift: Any) -> Identity:
    return Identity(calls.seen[path].dtype, getattr(norm, "activation", None), shift, norm.layer_instance if has_layer(norm) else None)


def _without_marks(key: Key, marked: set[Key]) -> Key:
    """The path of a parameter in the model as it is without the marks."""
    return tuple(name for i, name in enumerate(key) if key[:i] not in marked)


def _at(model: Any, key: Key) -> Any:
    for name in key:
        model = model.norm if isinstance(model, _Marked) else model
        model = model[name] if isinstance(name, int) or isinstance(model, dict) else getattr(model, name)
    return model


def _with_bias(root: Any, layer: Layer, direction: str) -> Layer | None:
    owner: Any = _at(root, layer.kernel[:-1])
    if type(owner) not in _LAYERS or layer.kernel[-1] != "kernel" or owner.bias is not None:
        return None
    kept = layer.kept
    if type(owner) is nnx.Einsum:
        kept = einsum_order(owner.einsum_str, kept)
        if kept is None:
            return None
    return with_bias(layer, (*layer.kernel[:-1], "bias"), kept, direction)


def _set_bias(layer: Any, value: jax.Array) -> None:
    layer.bias = nnx.Param(value)
    if isinstance(layer, nnx.Einsum):
        layer.bias_shape = value.shape
    else:
        layer.use_bias = True
