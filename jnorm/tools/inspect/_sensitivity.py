"""The loss in evaluation, with other statistics in the place of the running ones. One compiled function: the state is its argument."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._layers import path_text, states_of, with_states
from ..population import AVERAGES
from ._collect import Found
from ._report import Losses
from ._subject import Subject, is_frozen

Values = Mapping[str, np.ndarray]  # the averages of a state


def measure_losses(
    subject: Subject, found: Mapping[str, Found], paths: list[str], batches: list[Any], done: Callable[[int], None]
) -> tuple[Losses, dict[str, float], dict[str, float]]:
    """The losses; by path the change that the layer's batch statistics make alone, and the one that its running ones make alone."""
    assert subject.loss is not None
    # As in training, where frozen statistics normalize too.
    moving = [path for path in paths if found[path].counts.any() and not is_frozen(subject.running[path])]
    pooled = {path: found[path].pooled for path in moving}

    def evaluate(statistics: Sequence[Mapping[str, Values]]) -> np.ndarray:
        results = []
        for batch, values in zip(batches, statistics, strict=True):
            results.append(subject.loss(_with(subject.state, values), batch))  # type: ignore[misc]
            done(1)
        return np.array([float(r) for r in results])

    def always(values: Mapping[str, Values]) -> np.ndarray:
        return evaluate([values] * len(batches))

    own = [{path: {k: a[i] for k, a in found[path].each.items()} for path in moving} for i in range(len(batches))]
    running, together, training = always({}), always(pooled), _in_training(subject, moving, batches)
    exact = training is not None
    if exact:
        done(len(batches))
    else:
        training = evaluate(own)
    losses = Losses(tuple(running.tolist()), tuple(together.tolist()), tuple(training.tolist()), exact)
    alone = {path: float(np.mean(always({path: pooled[path]}) - running)) for path in moving}
    without = {path: float(np.mean(always({p: v for p, v in pooled.items() if p != path}) - together)) for path in moving}
    return losses, alone, without


def _in_training(subject: Subject, paths: list[str], batches: list[Any]) -> np.ndarray | None:
    """The losses with these norms in training mode. None where that is not known, or where a loss sets their mode itself: nothing moves."""
    if subject.training_loss is None or not paths:
        return None
    run, results, moved = subject.training_loss(paths), [], False
    before = jax.device_get(subject.state)
    for batch in batches:
        result, after = jax.device_get(run(subject.state, batch))
        results.append(float(result))
        moved = moved or any(not np.array_equal(after[path][key], a) for path in paths for key, a in before[path].items())
    return np.array(results) if moved else None


def check_loss(subject: Subject, batch: Any) -> None:
    """Before anything is computed; what is traced here is what runs."""
    result = jax.eval_shape(subject.loss, subject.state, batch)  # type: ignore[arg-type]
    if not isinstance(result, jax.ShapeDtypeStruct):
        got = f"a {type(result).__name__} of {len(jax.tree.leaves(result))} arrays"
        raise ValueError(f"the loss must be a scalar, got {got}; if it has auxiliary outputs, return its first alone.")
    if result.shape != () or jnp.issubdtype(result.dtype, jnp.complexfloating):
        raise ValueError(
            f"the loss must be a real scalar, got {result.dtype} of shape {result.shape}; a mean over the batch, for instance."
        )


def _with(state: Any, values: Mapping[str, Values]) -> Any:
    """The tree with other averages in the states at these paths."""
    if not values:
        return state
    given = states_of(state)
    if missing := [path for path in values if path not in given]:
        raise ValueError(f"no states at {missing}; the tree has them at {list(given)}.")
    return with_states(state, {path: _put(given[path], averages) for path, averages in values.items()})


def _put(old: Any, averages: Values) -> Any:
    """A state with other averages, as the old ones lie, so that nothing is compiled anew."""

    def one(path: Any, entry: Any) -> Any:
        new = averages.get(path_text(path)) if path_text(path) in AVERAGES else None
        if new is None:
            return entry
        new = (new if jnp.iscomplexobj(entry) else np.real(new)).reshape(entry.shape).astype(entry.dtype)
        return jax.device_put(new, entry.sharding if entry.committed else None)

    return jax.tree_util.tree_map_with_path(one, old)
