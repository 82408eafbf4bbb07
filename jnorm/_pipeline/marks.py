"""States that are frozen: marks in a state of running statistics, which the norms heed whatever they are called with.

A state is marked by a key more. Whether it is there is static; its value is zeros of the mean's shape, which go through unchanged, so that
a marked state is carried, stacked, sharded and saved as any other is.

    "frozen_statistics"   the running statistics normalize, in training mode too
    "frozen_updates"      they do not move
"""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from . import population

State = TypeVar("State", bound=Mapping[str, Any])
STATISTICS, UPDATES = "frozen_statistics", "frozen_updates"
KEYS = (STATISTICS, UPDATES)
# What the keys of a state are extended by, in the order of a module's variables.
ADDED = (*population.ENTRIES, *KEYS)


def marks_of(state: Any) -> dict[str, Any]:
    return {key: state[key] for key in KEYS if key in state} if isinstance(state, Mapping) else {}


def marked(state: State, statistics: bool = True, updates: bool = True) -> State:
    """The state with these marks, beside those that it has."""
    keys = [key for key, wanted in ((STATISTICS, statistics), (UPDATES, updates)) if wanted and key not in state]
    return cast(State, {**state, **{key: _mark_beside(state["mean"]) for key in keys}})


def _mark_beside(mean: Any) -> Any:
    """Abstract where the mean is, as in a model to load a checkpoint into."""
    if isinstance(mean, jax.ShapeDtypeStruct):
        return mean.update(dtype=jax.eval_shape(jnp.real, mean).dtype)
    return jnp.zeros_like(jnp.asarray(mean).real)


def unmarked(state: State, statistics: bool = True, updates: bool = True) -> State:
    """The state without these marks."""
    keys = [key for key, wanted in ((STATISTICS, statistics), (UPDATES, updates)) if wanted]
    return cast(State, {key: v for key, v in state.items() if key not in keys})
