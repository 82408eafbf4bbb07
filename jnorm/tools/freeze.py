"""Norms that are frozen: their running statistics normalize in training too, and stay, by path."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import nnx
from flax.core import FrozenDict

from .._pipeline.marks import KEYS, marked, unmarked
from ._layers import RUNNING_NNX, Layers, check_tree, chosen, map_states, nnx_norms

Tree = TypeVar("Tree")
_COLLECTION = "batch_stats"


def freeze(tree: Tree, layers: Layers | None = None, *, statistics: bool = True, updates: bool = True) -> Tree:
    """Freeze norms: in training too they normalize with their running statistics, which stay as they are.

    A norm has three switches: which statistics normalize, whether the running ones move, and whether scale and bias train. This sets the
    first two, for the norms that `layers` asks for; the third is the optimizer's, see :func:`frozen_param_mask`.

    What is frozen is marked in the state, so that it holds wherever the state goes: no call of the model, no `use_running_average` or
    `update_running`, no `train()`, `eval()` or `nnx.view` undoes it; :func:`thaw` does. The code of the model stays as it is.

    Args:
      tree: states of running statistics: the state of one norm, any tree of them, the collection "batch_stats" of Linen or all variables of
        a Linen model. Or an NNX model. Either may be abstract (`jax.eval_shape`, `nnx.eval_shape`), to load a checkpoint into.
      layers: which norms, by their paths, such as "encoder/block_0/norm": a pattern ("*" stands for anything) or the path of something
        that they lie in, several of these, or a function from path to bool. None: all.
      statistics: the running statistics normalize, whatever `use_running_average` says. The norm is then an affine map, as in evaluation,
        in its gradients too; no statistics of x enter y.
      updates: the running statistics do not move, whatever `update_running` says.

    Returns:
      The tree, whose chosen states have an entry more for each of the two, "frozen_statistics" and "frozen_updates": zeros of the mean's
      shape, which go through every step unchanged. Of an NNX model a copy, which has these as variables. What was frozen stays frozen.

    Raises:
      ValueError: no running statistics; `layers` matches nothing, which lists what there is; neither of the two is to be frozen; a norm of
        Flax in an NNX model, which knows no marks.
      TypeError: the state of an NNX model without the model, which fixes what entries the state has; a Linen module without its variables;
        NNX modules in a list or dict.

    Numerics:
      y of a norm with frozen statistics is bitwise that of evaluation. With `updates=False` running statistics move as in training, by the
      batch, and the ones from before normalize.

    Distributed:
      A norm that is frozen in both takes no statistics of x, so that it has no collective, and its `axis_name` need not be bound.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> state = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
      >>> frozen = jnorm.tools.freeze(state)
      >>> y, new = jnorm.batch_norm(jnp.array([[3.0], [7.0]]), frozen, epsilon=0.0)
      >>> y.tolist(), new["mean"].tolist()
      ([[1.0], [3.0]], [1.0])
      >>> sorted(jnorm.tools.thaw(new))
      ['mean', 'var']

    References:
      PyTorch has the first two as one, `module.eval()` of the norm, which `model.train()` undoes. Keras has all three as one: a
      `BatchNormalization` with `trainable = False` runs in inference mode.
    """
    _check(statistics, updates)
    return _changed(tree, layers, lambda state: marked(state, statistics, updates))


def thaw(tree: Tree, layers: Layers | None = None, *, statistics: bool = True, updates: bool = True) -> Tree:
    """Undo :func:`freeze`: norms take the statistics, and move them, as their call and constructor say.

    Args:
      tree: as in :func:`freeze`; norms that are not frozen are left as they are.
      layers: which norms, as in :func:`freeze`. None: all.
      statistics: of these norms, let `use_running_average` say again which statistics normalize.
      updates: let `update_running` say again whether the running statistics move.

    Returns:
      The tree without the marks: of all that :func:`freeze` was given, in structure and bits, what it was given. Of an NNX model a copy.

    Raises:
      ValueError, TypeError: as :func:`freeze`.

    Example:
      >>> import jnorm, jnorm.tools
      >>> state = jnorm.tools.freeze({"first": jnorm.batch_norm_state(1), "second": jnorm.batch_norm_state(1)})
      >>> {path: sorted(entries) for path, entries in jnorm.tools.thaw(state, "first").items()}
      {'first': ['mean', 'var'], 'second': ['frozen_statistics', 'frozen_updates', 'mean', 'var']}
    """
    _check(statistics, updates)
    return _changed(tree, layers, lambda state: unmarked(state, statistics, updates))


def _check(statistics: bool, updates: bool) -> None:
    if not (statistics or updates):
        raise ValueError("one of statistics and updates must be True, else there is nothing to do; scale and bias are the optimizer's.")


def _changed(tree: Any, layers: Layers | None, change: Callable[[Any], Any]) -> Any:
    """With the chosen states changed, of which only the marks are."""
    if isinstance(tree, nnx.Module):
        return _changed_module(tree, layers, change)
    check_tree(tree)
    if isinstance(tree, Mapping) and {_COLLECTION, "params"} & set(tree):
        variables = {**tree, _COLLECTION: _changed(tree.get(_COLLECTION, {}), layers, change)}
        return FrozenDict(variables) if isinstance(tree, FrozenDict) else variables

    def one(state: Any) -> Any:
        return FrozenDict(change(state)) if isinstance(state, FrozenDict) else change(state)

    return map_states(one, tree, layers=layers)


def _changed_module(model: nnx.Module, layers: Layers | None, change: Callable[[Any], Any]) -> Any:
    model = nnx.clone(model)
    norms = nnx_norms(model, (*RUNNING_NNX, nnx.BatchNorm))
    some = {path: norms[path] for path in chosen(norms, layers)}
    if foreign := [path for path, norm in some.items() if isinstance(norm, nnx.BatchNorm)]:
        raise ValueError(
            f"{', '.join(map(repr, foreign))} {'is' if len(foreign) == 1 else 'are'} of flax.nnx.BatchNorm, which knows no marks: make the "
            "model with jnorm.nnx.BatchNorm, which has its arguments and variables, or leave these out by layers."
        )
    for norm in some.values():
        before = {key: v.get_value() for key, v in vars(norm).items() if isinstance(v, nnx.BatchStat)}
        after = change(before)
        for key in KEYS:
            if key in after and key not in before:
                setattr(norm, key, norm.mean.replace(after[key]))
            elif key in before and key not in after:
                delattr(norm, key)
    return model
