"""Folding in Linen models."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, FrozenDict, freeze, meta, unfreeze

from ... import linen as jnn
from .._layers import NORMS_LINEN, Layers, chosen, freshly_traced, none_of
from .calls import Calls, finished, has_layer
from .plan import Key, einsum_order, folded_values, key_of, plan, trace, with_bias
from .report import Report
from .walks import Layer

_CLASSES = (*NORMS_LINEN, jnn.FeatureStandardization)
_WRAPPERS = (jnn.SpectralNorm, jnn.WeightNorm, jnn.WeightStandardization)
_LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
_USED = "jnorm_used"  # a collection


@dataclasses.dataclass(frozen=True)
class Left:
    """What a norm that was folded still does."""

    activation: Any
    dtype: Any
    has_layer: bool


@dataclasses.dataclass(frozen=True)
class FoldedLinen:
    """What :func:`fold` returns of a Linen model: variables without the norms, and the call that goes with them.

    It is a pytree, whose arrays are the variables: give it to a function under `jax.jit` as an argument.

    Args:
      model: the model as it was given: its code still calls the norms, which :meth:`apply` passes over.
      variables: without those of the folded norms, and with new kernels and biases.
      report: what became of each norm; its text is a table.
      left: of each folded norm, by path, what it still does.
      biased: paths of the layers that got a bias.
      plain: paths of wrappers whose layers have the weights that are used.
    """

    model: nn.Module
    variables: Any
    report: Report
    left: tuple[tuple[str, Left], ...]
    biased: tuple[str, ...]
    plain: tuple[str, ...]

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """`model.apply` with the folded variables.

        Args:
          *args: those of the model's call.
          **kwargs: those of the model's call, and of `apply`.

        Returns:
          What the model returns.
        """
        left = dict(self.left)

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module, path = context.module, "/".join(context.module.path)
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if path in left:
                return _finished(module, left[path], *args, **kwargs)
            if path in self.plain:
                return _unwrapped(module, args, kwargs)
            biased = path in self.biased and type(module) in _LAYERS  # beside which another may share its scope
            return _with_bias(module, call, args, kwargs) if biased else call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            return self.model.apply(self.variables, *args, **kwargs)


jax.tree_util.register_dataclass(FoldedLinen, data_fields=["variables"], meta_fields=["model", "report", "left", "biased", "plain"])


def _finished(module: Any, left: Left, x: Any, *args: Any, residual: Any = None, **kwargs: Any) -> jax.Array:
    del args, kwargs
    x = module.layer_instance(x) if left.has_layer else x
    bias = module.get_variable("params", "bias") if module.has_variable("params", "bias") else None
    return finished(x, bias, residual, left.activation, left.dtype)


def _unwrapped(module: Any, args: Any, kwargs: Any) -> Any:
    """The call of the layer in a wrapper, without the wrapper."""
    return module.layer_instance(*args, **{key: v for key, v in kwargs.items() if key != "update_stats"})


def _with_bias(module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call of a layer as if it had been made with a bias."""
    object.__setattr__(module, "use_bias", True)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(module, "use_bias", False)


def fold_linen(model: nn.Module, variables: Any, args: tuple, kwargs: dict, layers: Layers | None) -> FoldedLinen:
    """:func:`jnorm.tools.fold` of a Linen model."""
    if wrong := {"mutable", "capture_intermediates"} & set(kwargs):
        raise TypeError(f"fold takes no {' and '.join(sorted(wrong))}: give it to the `apply` of what fold returns.")
    if not {"params", "batch_stats"} & set(variables):
        raise ValueError(f"fold takes all variables of a Linen model, {{'params': ..., 'batch_stats': ...}}, got {sorted(variables)}.")
    calls, owners, wrappers = Calls("pass train=False, or whatever the model calls it"), {}, {}
    kinds: dict[str, set[type]] = {}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, path = context.module, "/".join(context.module.path)
        kinds.setdefault(path, set()).add(type(module))
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        # In a scan or under vmap, which lift no other collections than they are told to, a wrapper stays.
        if isinstance(module, _WRAPPERS) and module.is_mutable_collection(_USED):
            wrappers[path] = module.layer_instance.path
            return _unwrapped(module, args, kwargs)
        if isinstance(module, _LAYERS):
            owners[path] = module.clone(parent=None)
        if isinstance(module, _CLASSES) and calls.note(path, module.clone(parent=None)):
            return calls.run(path, module, call, args, kwargs)
        return call(*args, **kwargs)

    def run(variables: Any, args: tuple, kwargs: dict) -> Any:
        with nn.intercept_methods(intercept):
            return model.apply(variables, *args, mutable=DenyList(("params", "batch_stats")), **kwargs)

    graph = trace(run, variables, args, kwargs, lambda key: key[1:] if key[0] == "params" else None)
    if not calls.norms:
        raise ValueError(none_of(_CLASSES))
    for path, norm in calls.norms.items():
        if others := [kind.__name__ for kind in kinds[path] if not isinstance(norm, kind) and not issubclass(kind, type(norm))]:
            calls.reasons.setdefault(path, f"a module of {others[0]} shares its scope, and so its path")
    given, variables = variables, plain_variables(model, variables, args, kwargs, wrappers) if wrappers else variables
    pairs, report = plan(graph, calls, chosen(calls.norms, layers), lambda layer, way: _new_bias(owners, layer, way))
    values = {key_of(path): a for path, a in jax.tree_util.tree_leaves_with_path(variables.get("params", {}))}
    new, shifts = folded_values(values, pairs, calls, {p.norm: _variables_of(variables, p.norm) for p in pairs})
    made = {p.layer.bias for p in pairs if p.new_bias}
    folded = _replaced(variables, {key: a for key, a in new.items() if key not in made})
    for pair in pairs:
        folded = {kind: _without(tree, _split(pair.norm)) for kind, tree in folded.items()}
    added = {key: new[key] for key in made} | {(*_split(path), "bias"): shift for path, shift in shifts.items()}
    for key, value in added.items():
        node: Any = folded["params"]
        for name in key[:-1]:
            node = node.setdefault(name, {})
        node[key[-1]] = value
    folded = {kind: tree for kind, tree in folded.items() if tree or not given[kind]}
    left = tuple((p.norm, _left(calls, p.norm)) for p in pairs)
    biased = tuple(sorted("/".join(key[:-1]) for key in made))
    folded = freeze(folded) if isinstance(given, FrozenDict) else folded
    return FoldedLinen(model, folded, report, left, biased, tuple(sorted(wrappers)))


def _left(calls: Calls, path: str) -> Left:
    norm = calls.norms[path]
    return Left(getattr(norm, "activation", None), calls.seen[path].dtype, has_layer(norm))


def plain_variables(model: nn.Module, variables: Any, args: tuple, kwargs: dict, wrappers: Mapping[str, Key]) -> dict[str, Any]:
    """With the weights that wrapped layers are called with in place of what the wrappers make them of.

    Args:
      model: with wrappers of weights in it.
      variables: its.
      args: of its call.
      kwargs: likewise.
      wrappers: from the path of each to that of its layer.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    zeros = [jnp.zeros(a.shape, a.dtype) if hasattr(a, "shape") and not jnp.issubdtype(a.dtype, jax.dtypes.extended) else a for a in leaves]
    some_args, some_kwargs = jax.tree.unflatten(structure, zeros)

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__" and module.path in wrappers.values() and not isinstance(module, _WRAPPERS):
            module.put_variable(_USED, "params", module.variables["params"])  # which brings them out of nn.jit and nn.remat
        return call(*args, **kwargs)

    def used(variables: Any) -> dict[Key, jax.Array]:
        with nn.intercept_methods(intercept):
            _, after = model.apply(variables, *some_args, mutable=True, **some_kwargs)
        found = ((layer, _at(after[_USED], layer)) for layer in wrappers.values())
        trees = ((layer, jax.tree_util.tree_leaves_with_path(tree["params"])) for layer, tree in found if "params" in tree)
        return {(*layer, *key_of(path)): a for layer, tree in trees for path, a in tree}

    with freshly_traced():
        plain = _replaced(variables, jax.jit(used)(variables))
    for path, layer in wrappers.items():
        for kind, tree in plain.items():
            own = [name for name in _at(tree, _split(path)) if name.startswith(f"{layer[-1]}/")]
            for name in own:
                plain[kind] = _without(plain[kind], (*_split(path), name))
    return plain


def _at(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree


def _split(path: str) -> Key:
    return tuple(path.split("/")) if path else ()


def _variables_of(variables: Any, path: str) -> dict[str, Any]:
    """Of one module, of all collections."""
    found: dict[str, Any] = {}
    for tree in meta.unbox(variables).values():
        found |= _at(tree, _split(path))
    return found


def _replaced(variables: Any, new: Mapping[Key, Any]) -> dict[str, Any]:
    """A copy with other parameters, in the boxes of metadata that they are in."""

    def one(path: Any, value: Any) -> Any:
        key = key_of(path)
        return new.get(key[1:], value) if key[0] == "params" else value

    return dict(jax.tree_util.tree_map_with_path(one, unfreeze(variables) if isinstance(variables, FrozenDict) else dict(variables)))


def _without(tree: Any, key: Key) -> Any:
    """The tree without what lies there, and without what is empty then."""
    if not key or not isinstance(tree, Mapping) or key[0] not in tree:
        return tree if key else {}
    inner = _without(tree[key[0]], key[1:])
    rest = {name: entry for name, entry in tree.items() if name != key[0]}
    return rest | {key[0]: inner} if inner else rest


def _new_bias(owners: Mapping[str, Any], layer: Layer, direction: str) -> Layer | None:
    owner: Any = owners.get("/".join(map(str, layer.kernel[:-1])))
    if type(owner) not in _LAYERS or layer.kernel[-1] != "kernel" or owner.use_bias:
        return None
    kept = einsum_order(owner.einsum_str, layer.kept) if type(owner) is nn.Einsum else layer.kept
    return None if kept is None else with_bias(layer, (*layer.kernel[:-1], "bias"), kept, direction)
