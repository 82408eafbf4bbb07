"""The states of an NNX model's norms, read and written as dicts by path."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from .._pipeline.population import collects
from ._layers import RUNNING_NNX, nnx_norms


def read_states(norms: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {path: {key: v[...] for key, v in vars(norm).items() if isinstance(v, nnx.BatchStat)} for path, norm in norms.items()}


def write_states(norms: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Entries that a norm does not have are made, and those that a state does not have are taken away."""
    for path, state in states.items():
        norm = norms[path]
        had = [key for key, v in vars(norm).items() if isinstance(v, nnx.BatchStat)]
        for key in had:
            if key not in state:
                delattr(norm, key)
        for key, entry in state.items():
            if key in had:
                getattr(norm, key).set_value(entry)
            else:
                setattr(norm, key, nnx.BatchStat(entry))


@contextlib.contextmanager
def borrowed(model: nnx.Module) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """The norms with running statistics, by path, and their states; what goes wrong in here leaves those as they were."""
    norms = nnx_norms(model, RUNNING_NNX)
    before = read_states(norms)
    if any(collects(state) for state in before.values()):
        raise ValueError("the model collects already: recalibrate and commit_once do not go inside of one another.")
    try:
        yield norms, before
    except BaseException:
        write_states(norms, before)
        raise
