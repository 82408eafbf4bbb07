"""NNX models of Flax's classes, and their checkpoints, to the same models of jnorm's: where the variables are other ones."""

import ast
import os
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from ..._pipeline import marks
from ._checks import problems_of
from ._filled import like
from ._match import near, some, told
from ._norm import KINDS, of_nnx
from ._trees import NORMS, of_nnx_model

Keys = tuple[Any, ...]


def load_flax(model: nnx.Module, source: Any) -> Any:
    """An NNX model of jnorm's classes with the parameters and statistics of the same model of Flax's classes.

    The variables are the same, at the same paths, but for the scales of `WeightNorm`: bare arrays in Flax's class, parameters in jnorm's.
    A checkpoint of these Orbax does not restore into the model: restore it without a target, and give it to this function.
    Where no code of jnorm's classes is written, :func:`jnorm.tools.replace_norms` with "jnorm" makes the model of Flax's one; for one norm
    there is `of_nnx(norm).to_nnx()`.

    Args:
      model: of jnorm's classes; it stays as it is, and may be abstract (`nnx.eval_shape`).
      source: the model of Flax's classes, its state (`nnx.state`), or what Orbax restores of it without a target: a dict in which a path
        such as ("kernel",) is a text, and a number too.

    Returns:
      A new model. Epsilon and momentum of its norms are those of the source, where that is a model. Variables other than `nnx.Param`
      and `nnx.BatchStat`, such as those of random keys, are the model's.

    Raises:
      ValueError: variables that are missing or left over, shapes that do not fit: all told at once; a norm that does otherwise there.

    Example:
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> from jnorm.tools import convert
      >>> rngs = nnx.Rngs(0)
      >>> theirs = nnx.WeightNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
      >>> ours = jnx.WeightNorm(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
      >>> ours = convert.load_flax(ours, theirs)
      >>> bool((ours.layer_instance.kernel[...] == theirs.layer_instance.kernel[...]).all())
      True
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an NNX module, got {type(model).__name__}: the variables of Linen's classes are the same here.")
    _check_source(source)
    new = nnx.clone(model)
    mine = {_text(keys): (keys, variable) for keys, variable in nnx.to_flat_state(nnx.state(new))}
    wanted = {path: entry for path, entry in mine.items() if _is_wanted(path, entry[1])}
    theirs = {_text(keys): value for keys, value in _leaves(nnx.state(source) if isinstance(source, nnx.Module) else source, ())}
    _check(wanted, set(mine), theirs)
    changed = {keys: variable.replace(like(theirs[path], variable.get_value())) for path, (keys, variable) in wanted.items()}
    nnx.update(new, nnx.from_flat_state(changed))
    if isinstance(source, nnx.Module):
        _set_norms(new, source)
    return new


def _check_source(source: Any) -> None:
    if isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be what is in a checkpoint, got the path {str(source)!r}: restore it without a target.")
    if not isinstance(source, nnx.Module | Mapping | nnx.State):
        raise TypeError(f"source must be an NNX module, its state, or what Orbax restores of it, got {type(source).__name__}.")
    if isinstance(source, Mapping) and set(source) & {"params", "batch_stats"} and not set(source) - {"params", "batch_stats"}:
        raise TypeError("source has the collections of Linen's variables: load_flax takes NNX models, and Linen's need no conversion.")


def _is_wanted(path: str, variable: Any) -> bool:
    """Marks of what is frozen are of jnorm alone."""
    return isinstance(variable, nnx.Param | nnx.BatchStat) and path.rpartition("/")[2] not in marks.KEYS


def _set_norms(model: nnx.Module, source: nnx.Module) -> None:
    """A model has hyperparameters, which a checkpoint has not."""
    theirs, problems = of_nnx_model(source).layers, []
    for path, layer in of_nnx_model(model).layers.items():
        if path in theirs and (kind := type(theirs[path].module).__name__) in KINDS and type(layer.module).__name__ in NORMS:
            problems += [f"{told(path)}: {problem}" for problem in problems_of(layer, of_nnx(theirs[path].module), kind, set_too=True)]
    if problems:
        raise ValueError(f"the model does not do what the source does: {some(problems)}. Build it so, or pass nnx.state(source).")


def _leaves(node: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    if isinstance(node, nnx.Variable):
        yield keys, node.get_value()
    elif isinstance(node, Mapping | nnx.State):
        # Orbax restores a variable as a dict of its value.
        whole = set(node) == {"value"} and not isinstance(node["value"], Mapping)
        for key, child in node.items():
            yield from _leaves(child, keys if whole else (*keys, key))
    else:
        yield keys, node


def _text(keys: Keys) -> str:
    parts: list[str] = []
    for key in keys:
        key = ast.literal_eval(key) if isinstance(key, str) and key.startswith("(") else key
        parts += map(str, key) if isinstance(key, tuple) else [str(key)]
    return "/".join(parts)


def _check(wanted: Mapping[str, Any], known: set[str], theirs: Mapping[str, Any]) -> None:
    missing = [path for path in wanted if path not in theirs]
    extra = [path for path in theirs if path not in known]
    shapes = {path: (theirs[path].shape, variable.shape) for path, (_, variable) in wanted.items() if path in theirs}
    wrong = [f"{path} has the shape {there}, the model needs {here}" for path, (there, here) in shapes.items() if there != here]
    lines = ["the source does not fit the model."]
    if missing:
        lines.append(f"Missing: {some(missing, lambda path: f'{path!r}{near(path, extra, brackets=True)}')}.")
    if extra:
        lines.append(f"Not in the model: {some(extra, repr)}.")
    if wrong:
        lines.append(f"Of other shapes: {some(wrong)}.")
    if len(lines) > 1:
        raise ValueError("\n".join(lines))
