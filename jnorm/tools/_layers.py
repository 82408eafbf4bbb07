"""Where the norms of a model are: states in a tree of variables, modules of Linen or NNX; and the choice of some of them by path."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from .. import linen as jnn
from .. import nnx as jnx

# Made once, since a context more makes JAX compile anew all that it had compiled before.
_TRACE = jax.make_user_context(None)
Layers = str | Iterable[str] | Callable[[str], bool]
# The classes with running statistics.
RUNNING = (
    "BatchNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "CrossMiniBatchNorm",
    "DivisiveBatchNorm",
    "EvalNorm",
    "GhostBatchNorm",
    "MeanOnlyBatchNorm",
    "TrackedInstanceNorm",
)
STATELESS = ("AddLayerNorm", "AddRMSNorm", "DivisiveNorm", "FilterResponseNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
_FLAX = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
RUNNING_NNX = tuple(getattr(jnx, name) for name in RUNNING)
NORMS_NNX = (*RUNNING_NNX, *(getattr(jnx, name) for name in STATELESS), *(getattr(nnx, name) for name in _FLAX))
NORMS_LINEN = (*(getattr(jnn, name) for name in (*RUNNING, *STATELESS)), *(getattr(nn, name) for name in _FLAX))


def chosen(paths: Iterable[str], layers: Layers | None, what: str = "norms", argument: str = "layers") -> list[str]:
    """Of the paths, written as "encoder/block_0/norm", those that `layers` asks for, in their order.

    Args:
      paths: of all that there is.
      layers: a pattern, in which "*" stands for anything, of them or of what they lie under; several of them; a function from path to
        bool; or None, for all.
      what: what they are paths of, for the error.
      argument: what `layers` is called there.

    Raises:
      ValueError: a pattern, or the function, matches nothing; the error lists what there is. Nothing is asked for.
      TypeError: `layers` is none of these.
    """
    paths = list(paths)
    if layers is None:
        return paths
    asks = _asks(layers, argument)
    found = [{path for path in paths if (ask(path) if callable(ask) else _matches(path, ask))} for ask in asks]
    for ask, some in zip(asks, found, strict=True):
        if not some:
            raise ValueError(f"{argument}={ask!r} matches none of the {what}: {', '.join(map(repr, paths)) or 'there are none'}.")
    return [path for path in paths if any(path in some for some in found)]


def _asks(layers: Layers, argument: str) -> list[str | Callable[[str], bool]]:
    asks: list[Any] = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not all(isinstance(ask, str) or callable(ask) for ask in asks):
        raise TypeError(f"{argument} must be a pattern of paths, several of them, a function from path to bool, or None, got {layers!r}.")
    if not asks:
        raise ValueError(f"{argument}={layers!r} asks for nothing; leave it out, or give None, for all.")
    return asks


def _matches(path: str, pattern: str) -> bool:
    above = pattern.rstrip("/") + "/"
    return fnmatchcase(path, pattern) or fnmatchcase(path, above + "*") or path.startswith(above)


# --- States in a tree of variables ----------------------------------------------------------------------------------------------


def is_state(node: Any) -> bool:
    """Of running statistics; a count of the mean's own shape is that of `feature_statistics`, which are of all data already.

    Where both are scalars nothing tells them apart, and they are taken for running ones.
    """
    if not isinstance(node, Mapping) or "mean" not in node or any(isinstance(v, Mapping) for v in node.values()):
        return False
    if "count" not in node:
        return True
    shape = jnp.shape(node["count"])
    return not shape or shape != jnp.shape(node["mean"])


def path_text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def entries(tree: Any) -> list[str]:
    """By path, which is the same for a dict and for Flax's frozen one."""
    return [path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def check_tree(tree: Any) -> None:
    """That there are arrays in it, and no modules and variables of Flax."""
    flax = (nn.Module, nnx.Module, nnx.Variable)
    if isinstance(tree, nnx.Module):
        raise TypeError("states are needed here, not an NNX model, for which there are recalibrate and commit_once.")
    for one in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, flax)):
        if isinstance(one, nnx.Variable):
            raise TypeError("an NNX model's state belongs to its graph: give the model (nnx.merge), and split it after.")
        if isinstance(one, nn.Module):
            raise TypeError("a Linen module holds no variables: give those that its init returned, or their collection 'batch_stats'.")
        if isinstance(one, nnx.Module):
            raise TypeError("give one NNX model: several can be put into an nnx.List.")


def states_of(tree: Any) -> dict[str, Any]:
    """The states of running statistics in a tree, by path; a state that is the whole tree has the path "".

    Where the tree has a collection "batch_stats" they are in it: parameters may have the names of statistics too.
    """
    check_tree(tree)
    nodes = {path_text(path): node for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state)}
    collection = {path: node for path, node in nodes.items() if "batch_stats" in path.split("/")}
    states = {path: node for path, node in (collection or nodes).items() if is_state(node)}
    if not states:
        raise ValueError("there are no running statistics, such as a dict of 'mean' and 'var', in the tree that was given.")
    return states


def map_states(change: Callable[..., Any], *trees: Any, layers: Layers | None = None) -> Any:
    """The first tree with each of its states changed that `layers` asks for; all else in it stays."""
    some = set(chosen(states_of(trees[0]), layers, "states"))

    def one(path: Any, node: Any, *others: Any) -> Any:
        return change(node, *others) if is_state(node) and path_text(path) in some else node

    return jax.tree_util.tree_map_with_path(one, *trees, is_leaf=is_state)


def with_states(tree: Any, states: Mapping[str, Any]) -> Any:
    """The tree with these states at their paths; all else in it stays."""

    def one(path: Any, node: Any) -> Any:
        return states.get(path_text(path), node) if is_state(node) else node

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_state)


# --- Modules in a model -----------------------------------------------------------------------------------------------------------


def nnx_norms(model: nnx.Module, classes: tuple[type, ...] = NORMS_NNX) -> dict[str, Any]:
    """The norms of an NNX model, by path, jnorm's and Flax's. A model that is a norm has the path ""."""
    norms = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, classes)}
    if not norms:
        raise ValueError(none_of(classes))
    return norms


def linen_norms(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, classes: tuple[type, ...] = NORMS_LINEN, **kwargs: Any
) -> dict[str, Any]:
    """The norms of a Linen model, by path, in the order in which a call of it calls them. The call is traced, and computes nothing."""
    norms = called_norms(lambda variables, args: model.apply(variables, *args, mutable=True, **kwargs), variables, args, classes=classes)
    if not norms:
        raise ValueError(none_of(classes))
    return norms


def called_norms(call: Callable[..., Any], *args: Any, classes: tuple[type, ...] = NORMS_LINEN) -> dict[str, Any]:
    """The same of a function that calls a Linen model; there may be none."""
    norms: dict[str, Any] = {}

    def note(inner: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, classes) and context.method_name == "__call__":
            norms.setdefault("/".join(context.module.path), context.module.clone(parent=None))
        return inner(*args, **kwargs)

    def run(*args: Any) -> Any:
        with nn.intercept_methods(note):
            return call(*args)

    trace(run, *args)
    return norms


def trace(call: Callable[..., Any], *args: Any) -> None:
    """Calls it and computes nothing: arrays are traced, and all else, such as a flag, is what it is."""
    leaves, tree = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def run(arrays: Mapping[int, Any]) -> Any:
        return call(*tree.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)]))

    with freshly_traced():
        jax.eval_shape(run, arrays)


def freshly_traced() -> AbstractContextManager:
    """What is compiled inside of a function (`jax.jit`, `nn.jit`) is traced again in it, so that no cache hides the calls of modules."""
    return _TRACE(object())


def put_modules(node: Any, replaced: Mapping[int, Any], seen: set[int] | None = None) -> None:
    """Sets what replaces modules in an NNX model, by the id of each, wherever they are; containers that are no modules are made anew."""
    seen = set() if seen is None else seen
    seen.add(id(node))
    for name, child in list(vars(node).items()):
        if name.startswith("_pytree__"):
            continue
        inner = jax.tree.leaves(child, is_leaf=_is_node)
        if any(id(one) in replaced for one in inner):
            new = jax.tree.map(lambda one: replaced.get(id(one), one), child, is_leaf=_is_node)
            setattr(node, name, new if _is_node(child) else nnx.data(new))
        for one in inner:
            if _is_node(one) and id(one) not in replaced and id(one) not in seen:
                put_modules(one, replaced, seen)


def _is_node(node: Any) -> bool:
    return isinstance(node, nnx.Pytree)


def none_of(classes: tuple[type, ...]) -> str:
    names = list(dict.fromkeys(norm.__name__ for norm in classes))
    what = "norm with running statistics" if set(names) == set(RUNNING) else "norm"
    return f"there is no {what} in the model: none of {names}."
