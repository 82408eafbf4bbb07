"""Passes over a stream of batches in which the norms of a model collect its statistics."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._pipeline.marks import STATISTICS, UPDATES, marked
from .._pipeline.population import collects, key_of
from ._layers import Layers, chosen, path_text, states_of, with_states
from ._progress import progress_bar
from .population import AVERAGES, ESTIMATORS, averages_of, check_estimator, check_fresh, collecting, nothing_collected, saw_something

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
RecalibrationEstimator = Literal["pooled", "mean", "cumulative", "exponential"]
Others = Literal["running", "batch"]
Step = Callable[[Any, Any], Any]
States = Mapping[str, Any]  # by path


class Passes(NamedTuple):
    """The arguments of a recalibration; of a tree, in which states of running statistics are."""

    estimator: RecalibrationEstimator
    momentum: float | None
    layers: Layers | None
    others: Others
    layer_by_layer: bool
    tolerance: float
    progress: bool

    def run(self, step: Step, tree: Any, batches: Batches) -> Any:
        """The tree with the new statistics; whatever else the step changes, as a count of calls, stays behind."""
        self._check(batches)
        given = states_of(tree)
        names = self._chosen(given)
        rest = {path: self._held(state) for path, state in given.items() if path not in names}
        now, end = {path: given[path] for path in names}, copied(tree)
        for number in range(1, self._most(now) + 1):
            # In the first pass the batch's own statistics normalize, which are near whatever the running ones were.
            start = {path: self._begun(state, apart=number > 1 or STATISTICS in state) for path, state in now.items()}
            end = self._pass(step, with_states(end, {**rest, **start}), batches, number)
            collected = states_of(end)
            _check_saw({path: collected[path] for path in names})
            before, now = now, {path: _finished(collected[path], given[path]) for path in names}
            if number > 1 and _distance(before, now) <= self.tolerance:
                break
        return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(with_states(tree, now)))

    def _check(self, batches: Batches) -> None:
        check_estimator(self.estimator, (*ESTIMATORS, "exponential"))
        if (self.momentum is not None) != (self.estimator == "exponential"):
            raise ValueError(
                f'momentum goes with estimator="exponential", and is needed there, got {self.momentum} with {self.estimator!r}.'
            )
        if self.momentum is not None and (isinstance(self.momentum, Tracer) or not 0 <= self.momentum <= 1):
            raise ValueError(f"momentum is the weight of a batch in that of the next, a known number from 0 to 1, got {self.momentum}.")
        if self.others not in ("running", "batch"):
            raise ValueError(f'others must be "running" or "batch", got {self.others!r}.')
        if not self.tolerance >= 0 or (self.tolerance and not self.layer_by_layer):
            raise ValueError(f"tolerance must be at least 0, and goes with layer_by_layer=True, got {self.tolerance}.")
        if self.layer_by_layer and isinstance(batches, Iterator):
            raise ValueError(
                f"layer_by_layer goes over the batches several times, but {type(batches).__name__} is an iterator, which is used up by "
                "the first; give a list, or a function that makes an iterator."
            )

    def _chosen(self, given: States) -> list[str]:
        check_fresh(given)
        free = [path for path, state in given.items() if UPDATES not in state]
        if not free:
            raise ValueError("the statistics of all norms are frozen, so that there are none to re-estimate; see jnorm.tools.thaw.")
        return chosen(free, self.layers, "states that are not frozen" if len(free) < len(given) else "states")

    def _held(self, state: Any) -> Any:
        return marked(copied(dict(state)), statistics=self.others == "running")

    def _begun(self, state: Any, apart: bool) -> Any:
        return collecting(state, "cumulative" if self.estimator == "exponential" else self.estimator, apart=apart)

    def _most(self, states: States) -> int:
        """How many passes: as many as norms may follow on one another. Stacked layers have one state, with an axis more."""
        if not self.layer_by_layer:
            return 1
        return sum(math.prod(sorted(jnp.shape(state["mean"]))[1:]) for state in states.values())

    def _pass(self, step: Step, tree: Any, batches: Batches, number: int) -> Any:
        items: Any = batches() if callable(batches) and not hasattr(batches, "__iter__") else batches
        total = len(items) if hasattr(items, "__len__") else None
        wanted, seen = _shapes(tree), 0
        with progress_bar(self.progress, f"pass {number}" if self.layer_by_layer else "batches", total) as done:
            for seen, batch in enumerate(items, 1):
                if self.momentum is not None and seen > 1:
                    tree = _decayed(tree, self.momentum)
                tree = step(tree, batch)
                _check_shapes(_shapes(tree), wanted, tree)
                done(1)
        if not seen:
            which = "there are no batches" if number == 1 else f"there are no batches left for pass {number}"
            raise ValueError(f"{which}, and so no statistics. An iterator that an earlier loop used up has none left.")
        return tree


def copied(tree: Any) -> Any:
    """With arrays of its own, so that a step may donate what it is given."""
    return jax.tree.map(lambda a: a.copy() if isinstance(a, jax.Array) else a, tree)


def _decayed(tree: Any, momentum: float) -> Any:
    """What was collected so far has less weight."""
    states = {path: state for path, state in states_of(tree).items() if collects(state)}
    counts = _times({path: state[key_of(state)] for path, state in states.items()}, momentum)
    return with_states(tree, {path: {**state, key_of(state): counts[path]} for path, state in states.items()})


@jax.jit
def _times(tree: Any, factor: Any) -> Any:
    return jax.tree.map(lambda a: a * factor, tree)


def _finished(state: Any, given: Any) -> Any:
    """With the entries and dtypes of the given one."""
    new = {**state, **averages_of(state)}
    return {key: jnp.asarray(new[key]).astype(jnp.result_type(a)) for key, a in given.items()}


def _distance(old: States, new: States) -> float:
    """How far averages moved at most: means in standard deviations, or of their largest where there are none, spreads of themselves."""
    pairs = [(old[path], new[path]) for path in old]
    if any(isinstance(state["mean"], Tracer) for pair in pairs for state in pair):
        return float("inf")  # nobody knows yet

    def of(a: Any, b: Any) -> float:
        mean = jnp.abs(b["mean"])
        spread = jnp.sqrt(b["var"]) if "var" in b else b.get("std", mean.max())
        scales = {"mean": spread, "var": b.get("var"), "std": b.get("std")}
        moved = [jnp.abs(b[key] - a[key]) / jnp.maximum(scales[key], jnp.finfo(mean.dtype).tiny) for key in AVERAGES if key in b]
        return max(float(jnp.max(m)) for m in moved)

    return max(of(*pair) for pair in pairs)


def _check_saw(states: States) -> None:
    blind = [path for path, state in states.items() if not saw_something(state)]
    if len(blind) == len(states):
        raise ValueError(nothing_collected())
    if blind:
        raise ValueError(
            f"{nothing_collected(' in ' + ', '.join(map(repr, blind)))} To leave out what it does not run, choose with layers."
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_text(path): jnp.shape(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def _check_shapes(got: dict[str, Any], wanted: dict[str, Any], tree: Any) -> None:
    if got == wanted:
        return
    lacks, more = ([key for key in one if key not in two][:5] for one, two in ((wanted, got), (got, wanted)))
    shapes = [f"{key} of shape {got[key]} for {wanted[key]}" for key in got if got[key] != wanted.get(key, got[key])][:5]
    told = ", and ".join(f"{what} {', '.join(some)}" for what, some in (("lacks", lacks), ("has also", more), ("has", shapes)) if some)
    meant = [number for number, part in enumerate(tree) if _shapes(part) == wanted] if isinstance(tree, tuple) else []
    raise ValueError(
        f"the step must return the new state, with the entries of the one that it was given; it returned {type(tree).__name__}"
        + ("." if list(got) == [""] else f", which {told}.")
        + (f" Did you mean to return its item [{meant[0]}] alone?" if meant else "")
    )
