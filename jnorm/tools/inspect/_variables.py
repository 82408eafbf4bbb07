"""All variables of a Linen model in place of its collection of running statistics."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from .._layers import is_state, path_text

STATS, PARAMS = "batch_stats", "params"


def of_variables(step: Any, state: Any, loss: Any, params: Any) -> tuple[Any, Any, Any, Any]:
    """Without the names of the collections, so that the norms have one path in both. The functions are compiled ones."""
    if isinstance(params, Mapping) and isinstance(params.get(PARAMS), Mapping):
        params = params[PARAMS]
    found = [path_text(path) for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state) if is_state(node)]
    if not found or any(path.split("/")[0] != STATS for path in found):
        return step, state, loss, params
    rest = jax.tree.map(jnp.asarray, {key: node for key, node in state.items() if key != STATS})
    make = FrozenDict if isinstance(state, FrozenDict) else dict

    def run(stats: Any, batch: Any) -> Any:
        result = step(make({**rest, STATS: stats}), batch)
        return result[STATS] if isinstance(result, Mapping) and STATS in result else result

    def evaluate(stats: Any, batch: Any) -> Any:
        return loss(make({**rest, STATS: stats}), batch)

    return run, state[STATS], None if loss is None else evaluate, state.get(PARAMS) if params is None else params


def check_prefix(states: Collection[str], scales: Collection[str]) -> None:
    if set(states) & set(scales):
        return
    for path in states:
        for other in scales:
            if path and other and (path.endswith("/" + other) or other.endswith("/" + path)):
                raise ValueError(
                    f"no scale in params has the path of a state, but for what is before it: {other!r} in params, {path!r} in the state; "
                    "give both from the same level of the model."
                )
