"""The statistics of the batches: of each, and of all together."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..._pipeline.marks import UPDATES
from ..._pipeline.population import VALUES
from .._layers import entries, is_state, map_states, path_text
from ..population import AVERAGES, averages_of, population_state
from ._subject import Subject


class Found(NamedTuple):
    """Of one layer, as in its state, but with an axis of batches before, of those that counted any value."""

    pooled: Mapping[str, np.ndarray]
    each: Mapping[str, np.ndarray]
    counts: np.ndarray  # (batches, channels)


def collect(subject: Subject, paths: list[str], batches: list[Any], done: Callable[[int], None]) -> dict[str, Found]:
    """By path; a layer that was in no batch has counts of 0."""
    if not paths:
        return {}
    start: Any = population_state(subject.state)
    wanted = entries(start)
    pooled, each = start, []
    for batch in batches:
        one = subject.step(start, batch)
        if entries(one) != wanted:
            raise ValueError(
                f"the step must return the new state, with the entries of the one that it was given, {wanted}; it returned "
                f"{entries(one) or type(one).__name__}."
            )
        each.append(one)
        done(1)
        pooled = subject.step(pooled, batch)
        done(1)
    together, *single = [_by_path(tree) for tree in (pooled, *each)]
    found = {path: _found(together[path], [tree[path] for tree in single]) for path in paths}
    silent = [path for path, f in found.items() if not f.counts.any() and UPDATES not in subject.running[path]]
    if silent:
        found |= _told_from_averages(subject, silent, batches)
    if not any(f.counts.any() for f in found.values()):
        raise ValueError(
            "nothing was collected: the step must run the model in training mode (use_running_average=False) and return the new state."
        )
    return found


def _by_path(tree: Any) -> dict[str, Mapping[str, Any]]:
    nodes = jax.tree_util.tree_leaves_with_path(jax.device_get(tree), is_leaf=is_state)
    return {path_text(path): node for path, node in nodes if is_state(node)}


def _found(together: Mapping[str, Any], single: list[Mapping[str, Any]]) -> Found:
    averages = [averages_of(one) for one in single]
    each = {key: np.stack([flat(a[key]) for a in averages]) for key in averages[0]}
    return Found({key: flat(a) for key, a in averages_of(together).items()}, each, np.stack([flat(one[VALUES]) for one in single]))


def flat(a: Any) -> np.ndarray:
    a = np.asarray(a).reshape(-1)
    return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64)


# --- Norms that do not collect ------------------------------------------------------------------------------------------------


@np.errstate(invalid="ignore")  # of batches that have infinite values
def _told_from_averages(subject: Subject, paths: list[str], batches: list[Any]) -> dict[str, Found]:
    """Flax's own norms, from where their averages move: ρ·0 + (1 − ρ)·s and ρ·a + (1 − ρ)·s tell ρ and the batch's s.

    With a power of two that is far larger than any s, ρ is told up to its own rounding. How many values that were is not told: infinitely
    many.
    """

    def started(far: bool) -> Any:
        def one(state: Any) -> Any:
            return {**state, **{k: jnp.full_like(state[k], far and _far(state[k])) for k in AVERAGES if k in state}}

        return map_states(one, subject.state)

    ends = [[_by_path(subject.step(started(far), batch)) for far in (False, True)] for batch in batches]
    found = {}
    for path in paths:
        state = subject.running[path]
        keys = [key for key in AVERAGES if key in state]
        zero, end = ({key: np.stack([flat(pair[i][path][key]) for pair in ends]) for key in keys} for i in (0, 1))
        kept = {key: np.real(end[key] - zero[key]) / _far(state[key]) for key in keys}
        moves = np.any([~np.all(abs(kept[key] - 1) <= 1e-6, axis=1) for key in keys], axis=0)  # what is no number has moved, too
        told = np.concatenate([kept[key][moves].ravel() for key in keys])
        told = told[np.isfinite(told)]
        # As it was written: the shortest decimal that rounds to it.
        momentum = float(str(np.float32(np.median(told)))) if told.size else 0.0
        each = {key: zero[key] / np.where(moves[:, None], 1 - momentum, 1) for key in keys}
        weight = moves / max(moves.sum(), 1)
        pooled = {key: weight @ a for key, a in each.items()}
        if "var" in each:
            pooled["var"] = pooled["var"] + weight @ abs(each["mean"] - pooled["mean"]) ** 2
        count = np.where(moves, np.inf, 0.0)[:, None]
        found[path] = Found(pooled, each, np.broadcast_to(count, each["mean"].shape))
    return found


def _far(average: Any) -> float:
    return 2.0 ** (jnp.finfo(average.dtype).maxexp // 2)
