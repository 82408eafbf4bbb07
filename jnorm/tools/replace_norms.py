"""Other norms in place of those of an NNX model."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from .. import nnx as jnx
from .._modules import errors_in
from .._pipeline import marks
from ._layers import NORMS_NNX, RUNNING_NNX, Layers, chosen, nnx_norms, put_modules

Model = TypeVar("Model", bound=nnx.Module)
Rule = str | type[nnx.Module] | Callable[[str, Any], Any]

_OF_JNORM = {getattr(nnx, name): getattr(jnx, name) for name in ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")}
# Their running statistics are of the same quantities, though some keep the standard deviation, and one the mean alone.
_BATCH = ("BatchNorm", "BatchRenorm", "CrossMiniBatchNorm", "EvalNorm", "GhostBatchNorm", "MeanOnlyBatchNorm")
_ROWS = ("LayerNorm", "RMSNorm")
_MAPS = ("FilterResponseNorm", "InstanceNorm", "TrackedInstanceNorm")
_OF_VARIANCE = (*_BATCH, "GroupNorm", "InstanceNorm", "LayerNorm", "TrackedInstanceNorm")
_OF_MEAN_SQUARE = ("FilterResponseNorm", "RMSNorm")
# Called with other arguments than x, or no norm alone.
_OTHER_CALLS = ("AddLayerNorm", "AddRMSNorm", "CrossIterationBatchNorm")
# What means the same in all classes, and what does in these sets of classes only.
_EVERYWHERE = (
    "dtype",
    "param_dtype",
    "promote_dtype",
    "use_fast_variance",
    "activation",
    "save",
    "use_running_average",
    "update_running",
    "momentum",
    "track_count",
    "running_var_correction",
)
_AMONG = {
    "epsilon": (_OF_VARIANCE, _OF_MEAN_SQUARE),
    "reduction_axes": (_ROWS, _MAPS),
    "axis_name": (_BATCH, (*_ROWS, "FilterResponseNorm", "GroupNorm", "InstanceNorm", "TrackedInstanceNorm")),
}
_AMONG["axis_index_groups"] = _AMONG["axis_name"]


def replace_norms(model: Model, rule: Rule, *, layers: Layers | None = None, rngs: nnx.Rngs | None = None, **options: Any) -> Model:
    """A copy of an NNX model with other norms: of another class, or jnorm's in place of Flax's.

    A model that is written in jnorm's classes takes the variables of one in Flax's by :func:`jnorm.tools.convert.load_flax`, and one norm
    alone becomes jnorm's, with copies of its values, by `convert.of_nnx(norm).to_nnx()`.

    Args:
      model: an NNX model, which may be abstract (`nnx.eval_shape`). It stays as it is.
      rule: a class, such as `jnorm.nnx.GroupNorm`: :func:`norm_like` makes its instances. Or "jnorm": Flax's BatchNorm, GroupNorm,
        InstanceNorm, LayerNorm and RMSNorm become jnorm's of the same name, with all of their variables; jnorm's own, and classes that
        derive from Flax's, stay. Or a function of path and norm, which is one of the copy's: it returns the module (or function) to put
        there, or None to keep the norm.
      layers: which norms: a path as "encoder/block_0/norm", with "*" for anything, or one that norms lie under; several; a function from
        path to bool; None: all, jnorm's and Flax's, of any class.
      rngs: for what has to be initialized anew; None: `nnx.Rngs(0)`.
      **options: of the class's constructor, in place of what is carried over.

    Returns:
      The copy. A norm that is at several places in the model is replaced by one, and so are variables that are shared.

    Raises:
      ValueError: no norms in the model; `layers` that matches none; options that the class refuses, such as a number of groups that does
        not divide the features, or a norm that cannot be told as one of the class: the error has its path.
      TypeError: options with a rule that is a function; a rule that returns no module; unknown options.

    Linen's modules are made by code at each call, and cannot be replaced from outside: give the model's class its norm as a field, as in
    `norm: Any = jnn.BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx, tools
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
      >>> grouped = tools.replace_norms(model, jnx.GroupNorm, num_groups=4)
      >>> type(grouped.layers[1]).__name__, type(model.layers[1]).__module__.split(".")[0]
      ('GroupNorm', 'flax')
      >>> grouped(jnp.ones((1, 4, 4, 3))).shape
      (1, 4, 4, 8)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an NNX module, got {_told(type(model))}.")
    replacement = _as_function(rule, nnx.Rngs(0) if rngs is None else rngs, options)
    copy = nnx.clone(model)
    norms = nnx_norms(copy)
    replaced: dict[int, Any] = {}
    for path in chosen(norms, layers):
        with errors_in(lambda path=path: f"the norm at {path!r}"):
            new = replacement(path, norms[path])
            if not (new is None or callable(new)) or isinstance(new, nn.Module):
                raise TypeError(f"the rule must return a module, or None to keep the norm; it returned {_told(type(new))}.")
        if new is not None and new is not norms[path]:
            replaced[id(norms[path])] = new
    if options and not replaced:
        raise ValueError(f"the options {sorted(options)} are not used: none of the norms is of Flax's class, and jnorm's own stay.")
    if id(copy) in replaced:
        return replaced[id(copy)]
    put_modules(copy, replaced)
    return copy


def norm_like(norm: nnx.Module, like: Callable[..., Any], *, rngs: nnx.Rngs | None = None, **options: Any) -> Any:
    """A norm of another class with all that means the same in it: what a rule of :func:`replace_norms` is written with.

    Carried over are the number of features, their axes, which of scale and bias there are, dtypes, how the module runs (train or eval);
    the epsilon among norms that add it to a variance, and among those that add it to a mean square; axis names among norms over a batch,
    and among those of a sample; momentum and all else of running statistics. Scale and bias keep their values and metadata. Variables that
    an instance of the class does not have, such as the bias in place of which there is an RMSNorm, are dropped. Running
    statistics are kept among BatchNorm, BatchRenorm (whose are standard deviations, with epsilon), GhostBatchNorm, CrossMiniBatchNorm,
    EvalNorm and MeanOnlyBatchNorm, and where the class has the same name. In place of another norm, LayerNorm and RMSNorm reduce the
    feature axes.

    Args:
      norm: of a class of `jnorm.nnx` or `flax.nnx`. It stays as it is, but the new one has its variables, not copies of them.
      like: the class, whose constructor takes `num_features`, one of your own too.
      rngs: for what has to be initialized anew; None: `nnx.Rngs(0)`.
      **options: of the constructor, in place of what is carried over.

    Returns:
      The instance; an abstract one of a norm that is abstract (`nnx.eval_shape`).

    Raises:
      TypeError: what is no norm, or Linen's.
      ValueError: a norm of several inputs in place of one of one, or the reverse; one that has an activation where the class takes none;
        a class that takes no `num_features`; what the constructor refuses.

    Example:
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx, tools
      >>> norm = nnx.BatchNorm(8, epsilon=1e-3, use_bias=False, rngs=nnx.Rngs(0))
      >>> new = tools.norm_like(norm, jnx.GroupNorm, num_groups=norm.num_features // 4)
      >>> new.epsilon, new.num_groups, new.bias, new.scale is norm.scale
      (0.001, 2, None, True)
    """
    if isinstance(like, type) and issubclass(like, nn.Module):
        raise TypeError(f"the norm must become one of NNX, got {_told(like)}.")
    taken = inspect.signature(like.__init__ if isinstance(like, type) else like).parameters  # the metaclass takes anything
    features, given = _features(norm), _options(norm, like, taken) | options
    if "group_size" in options and "num_groups" in taken:  # one of the two
        given["num_groups"] = None
    if "rngs" in taken:
        given["rngs"] = nnx.Rngs(0) if rngs is None else rngs
    new = like(features, **given)
    if any(isinstance(v.get_value(), jax.ShapeDtypeStruct) for v in _variables(norm).values()):
        nnx.update(new, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), nnx.state(new)))
    _take_variables(new, norm, given)
    return new


def _as_function(rule: Any, rngs: nnx.Rngs, options: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    if rule == "jnorm":
        return lambda _, norm: norm_like(norm, _OF_JNORM[type(norm)], rngs=rngs, **options) if type(norm) in _OF_JNORM else None
    if isinstance(rule, type):
        return lambda _, norm: norm_like(norm, rule, rngs=rngs, **options)
    if not callable(rule):
        raise TypeError(f"rule must be a class, 'jnorm', or a function of path and norm, got {rule!r}.")
    if options:
        raise TypeError(
            f"the options {sorted(options)} are of a class; a rule that is a function makes the norms itself, as with norm_like."
        )
    return rule


def _told(cls: type) -> str:
    return f"{cls.__name__}, which is Linen's: those are replaced in the model's code" if issubclass(cls, nn.Module) else cls.__name__


def _kind(cls: Any) -> str:
    """The class of jnorm or Flax that this is, or derives from."""
    of_norms = (base for base in getattr(cls, "__mro__", ()) if base in NORMS_NNX)
    return next(of_norms, cls).__name__


def _features(norm: Any) -> int:
    if hasattr(norm, "num_features") and not isinstance(norm, nn.Module):
        return norm.num_features
    if isinstance(norm, nnx.GroupNorm):  # which does not keep the number
        return norm.num_groups * norm.group_size
    raise TypeError(f"norm must be a norm of jnorm.nnx or flax.nnx, got {_told(type(norm))}.")


def _feature_axes(norm: Any) -> Any:
    return norm.axis if _kind(type(norm)) == "BatchNorm" else getattr(norm, "feature_axes", -1)


def _options(norm: Any, like: Any, taken: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor of the class `like` takes of that which the norm was made with."""
    old, new = _kind(type(norm)), _kind(like)
    if old != new and (old in _OTHER_CALLS or new in _OTHER_CALLS):
        raise ValueError(f"{old} is called otherwise than {new}, which cannot take its place; keep it with `layers`, or write a rule.")
    if "num_features" not in taken:
        raise ValueError(f"{new} does not take num_features, and cannot be made from a norm; write a rule that makes it.")
    if getattr(norm, "activation", None) is not None and "activation" not in taken:
        raise ValueError(f"{old} has activation={norm.activation!r} fused, which {new} does not take; write a rule that puts both there.")

    def same(name: str) -> bool:
        return old == new or name in _EVERYWHERE or any({old, new} <= set(group) for group in _AMONG.get(name, ()))

    skipped = ("num_features", "group_size", "axis", "feature_axes", "rngs")
    options = {name: getattr(norm, name) for name in taken if name not in skipped and hasattr(norm, name) and same(name)}
    for name in ("scale", "bias"):
        if f"use_{name}" in taken and hasattr(norm, name):
            options[f"use_{name}"] = getattr(norm, name) is not None
    axes = _feature_axes(norm)
    if new == "GroupNorm" and isinstance(axes, Iterable):
        (axes,) = axes if len(tuple(axes)) == 1 else _refuse_axes(axes)
    options |= {name: axes for name in ("axis", "feature_axes") if name in taken}
    if new in _ROWS and old not in _ROWS and "reduction_axes" in taken:
        options["reduction_axes"] = axes
    return options


def _refuse_axes(axes: Any) -> Any:
    raise ValueError(f"GroupNorm has one channel axis, but the norm has the feature axes {tuple(axes)}.")


def _take_variables(new: Any, old: Any, given: Mapping[str, Any]) -> None:
    """The old norm's variables in place of those of the new one that mean the same."""
    names = set(_variables(old))
    was, alike = _kind(type(old)), {_kind(type(old)), _kind(type(new))} <= set(_BATCH)
    if _kind(type(new)) != was:
        names &= {"scale", "bias", *(("mean", "var", "count", *marks.KEYS) if alike else ())}
    features, taken = _features(old), set()
    if _keeps(new, "std") and {"mean", "var"} <= set(vars(old)) and was in _BATCH:
        new.std = _changed(old.var, lambda var: jnp.sqrt(var + new.epsilon))
        taken.add("std")
    if _keeps(new, "var") and {"mean", "std"} <= set(vars(old)) and was in _BATCH:
        new.var = _changed(old.std, lambda std: jnp.maximum(std**2 - old.epsilon, 0))
        taken.add("var")
    for name in sorted(names):
        if not _keeps(new, name) and not (name in marks.ADDED and isinstance(new, RUNNING_NNX)):
            continue
        variable = getattr(old, name)
        cast = name in ("scale", "bias") and "param_dtype" in given and variable.dtype != given["param_dtype"]
        setattr(new, name, _changed(variable, lambda a: a.astype(given["param_dtype"])) if cast else variable)
        taken.add(name)
    _start_count(new, taken)
    # Of layers that are stacked, what is new is too.
    stacked = {v.shape[:-1] for v in _variables(old).values() if v.shape[-1:] == (features,)}
    for name, v in _variables(new).items():
        if name not in taken and stacked - {()}:
            setattr(new, name, _changed(v, lambda a: jnp.broadcast_to(a, (*max(stacked), *a.shape))))


def _variables(norm: Any) -> dict[str, Any]:
    return {name: v for name, v in vars(norm).items() if isinstance(v, nnx.Variable)}


def _changed(variable: Any, change: Callable[[Any], Any]) -> Any:
    """The variable with its value changed; of an abstract norm with the shape and dtype of that."""
    value = variable.get_value()
    if not isinstance(value, jax.ShapeDtypeStruct):
        return variable.replace(change(value))
    new = jax.eval_shape(change, value)
    return variable.replace(value.update(shape=new.shape, dtype=new.dtype))


def _keeps(new: Any, name: str) -> bool:
    return isinstance(getattr(new, name, None), nnx.Variable)


def _start_count(new: Any, taken: set[str]) -> None:
    """Where a count is new beside statistics that are not, it is that of many batches: with 0 the next batch alone would count."""
    if "mean" in taken and "count" not in taken and _keeps(new, "count") and new.momentum is not None and new.momentum < 1:
        new.count = _changed(new.count, lambda count: jnp.full_like(count, 1 / (1 - new.momentum)))
