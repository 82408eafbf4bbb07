"""Statistics of a data set, collected by the norms of a model batch by batch."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._pipeline.marks import STATISTICS, UPDATES, marked
from .._pipeline.population import APART, BATCHES, BIASED, ENTRIES, KEYS, VALUES, collection, collects, key_of, merged
from .._stats import stats_dtype
from ._layers import map_states, states_of, with_states

Estimator = Literal["pooled", "mean", "cumulative"]
State = TypeVar("State")
AVERAGES = ("mean", "var", "std")
ESTIMATORS = {"pooled": VALUES, "mean": BATCHES, "cumulative": BIASED}


def population_state(state: State, *, estimator: Estimator = "pooled") -> State:
    """States of running statistics that collect those of a data set: what :func:`recalibrate` runs its step on.

    Args:
      state: any tree with states of running statistics in it.
      estimator: "pooled", "mean" or "cumulative", as in :func:`recalibrate`.

    Returns:
      The tree, where each such state has one more entry, of the shape of its features: "values" (how many values were counted), "batches"
      or "biased_batches" (how many batches were). A norm that updates such a state adds its batch. Averages are widened to float32. A
      state whose running statistics normalize in training mode too (:func:`freeze`) keeps those for that, and collects beside them.

    Raises:
      ValueError: no running statistics in the tree, or ones that collect already; an unknown estimator.
      TypeError: an NNX model, or its state.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> population = jnorm.tools.population_state({"first": jnorm.batch_norm_state(1)})
      >>> _, population["first"] = jnorm.batch_norm(jnp.array([[1.0], [2.0], [6.0]]), population["first"])
      >>> {k: v.tolist() for k, v in population["first"].items()}
      {'mean': [3.0], 'var': [4.666666507720947], 'values': [3.0]}
    """
    check_estimator(estimator, tuple(ESTIMATORS))
    check_fresh(states_of(state))
    return map_states(lambda one: collecting(one, estimator, apart=STATISTICS in one), state)


def check_fresh(states: Mapping[str, Any]) -> None:
    if any(collects(state) for state in states.values()):
        raise ValueError("a state collects already; give the state from before population_state.")


def check_estimator(estimator: str, known: tuple[str, ...]) -> None:
    if estimator not in known:
        raise ValueError(f"estimator must be one of {sorted(known)}, got {estimator!r}.")


def collecting(state: Any, estimator: str, *, apart: bool) -> dict[str, Any]:
    """The state that collects; `apart`: beside its averages, which normalize meanwhile."""
    wide = {key: jnp.asarray(state[key]) for key in AVERAGES if key in state}
    # Copies, so that a step may donate what it is given.
    wide = {key: jnp.array(a, stats_dtype(a.dtype)) for key, a in wide.items()}
    rest = {key: jnp.array(a) for key, a in state.items() if key not in ENTRIES and (apart or key not in AVERAGES)}
    counts = {ESTIMATORS[estimator]: jnp.zeros_like(wide["mean"].real)}
    if apart:
        return {**marked(rest, updates=False), **{APART[key]: a for key, a in wide.items()}, **counts}
    return {**{key: wide.get(key, rest.get(key)) for key in state if key not in ENTRIES}, **counts}


def averages_of(state: Any) -> dict[str, Any]:
    """What a state has collected."""
    return {key: a for key, a in collection(state).items() if key in AVERAGES}


def merge_populations(one: State, two: State) -> State:
    """The collected statistics of two streams of batches, as of two hosts, as if one had seen them all.

    Args:
      one: a tree from :func:`population_state` that collected some batches.
      two: another of the same model and estimator.

    Returns:
      The tree for the batches of both. The order does not matter, but for rounding. What tracked instance normalization collects with
      "pooled" are averages of samples already: collect them with "cumulative", which is the same there, and merges as averages.

    Raises:
      ValueError: a state that does not collect, or that collects for another estimator; states that differ in their paths, entries or
        shapes.

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> start = jnorm.tools.population_state(jnorm.batch_norm_state(1))
      >>> one, two = (jnorm.batch_norm(jnp.array(x), start)[1] for x in ([[1.0], [2.0]], [[3.0], [4.0], [5.0]]))
      >>> both = jnorm.tools.merge_populations(one, two)
      >>> both["mean"].tolist(), both["var"].tolist(), both["values"].tolist()
      ([3.0], [2.0], [5.0])
    """
    first, second = states_of(one), states_of(two)
    alone = [sorted(set(a) - set(b))[:5] for a, b in ((first, second), (second, first))]
    if any(alone):
        raise ValueError(f"both must be of the same model; the first alone has the states {alone[0]}, the second alone {alone[1]}.")
    for path, a in first.items():
        _check_alike(path, a, second[path])
    new = with_states(one, {path: merged(a, second[path]) for path, a in first.items()})
    return jax.tree.unflatten(jax.tree.structure(one), jax.tree.leaves(new))


def _check_alike(path: str, a: Any, b: Any) -> None:
    if not collects(a) or set(a) != set(b):
        raise ValueError(
            f"both must be from population_state with the same estimator, got states of {sorted(a)} and of {sorted(b)} at {path!r}."
        )
    shapes = [{key: jnp.shape(state[key]) for key in sorted(state)} for state in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the states at {path!r} must be of the same shapes, got {shapes[0]} and {shapes[1]}.")


def population_statistics(population: State) -> State:
    """The states for evaluation that a population gives: without the entry that counts.

    Args:
      population: a tree from :func:`population_state` that collected some batches.

    Returns:
      The tree as it was before :func:`population_state`, with the new averages, in at least float32.

    Raises:
      ValueError: a tree that does not collect; a norm that is not frozen collected nothing, which is named (under `jit` or `vmap`, where
        that is not known, a state keeps what it had).

    Example:
      >>> import jax.numpy as jnp, jnorm, jnorm.tools
      >>> population = jnorm.tools.population_state(jnorm.batch_norm_state(1))
      >>> _, population = jnorm.batch_norm(jnp.array([[1.0], [3.0]]), population)
      >>> {k: v.tolist() for k, v in jnorm.tools.population_statistics(population).items()}
      {'mean': [2.0], 'var': [1.0]}
    """
    states = {path: state for path, state in states_of(population).items() if collects(state)}
    if not states:
        raise ValueError("no state collects; give the tree from population_state, after some steps.")
    blind = [path for path, state in states.items() if UPDATES not in state and not saw_something(state)]
    if blind or not any(map(saw_something, states.values())):
        raise ValueError(nothing_collected("" if len(blind) in (0, len(states)) else " in " + ", ".join(map(repr, blind))))
    return map_states(lambda one: {key: v for key, v in collection(one).items() if key not in KEYS}, population)


def saw_something(state: Any) -> bool:
    """Whether a state that collects has counted anything; under a transformation nobody knows yet."""
    count = state[key_of(state)]
    return isinstance(count, Tracer) or bool((jnp.asarray(count) > 0).any())


def nothing_collected(where: str = "") -> str:
    return (
        f"nothing was collected{where}: the step must run the model in training mode (use_running_average=False) and return the new state. "
        "The norms of Flax collect nothing; those of jnorm in their place do."
    )
