"""What the classes with running statistics pass to their functions, and what sets how they run."""

from typing import Any

import jax
from flax import nnx

from .._modules import merged_axes, state_for, state_keys, takes_statistics
from .._pipeline.marks import ADDED
from .._stats import Stats
from ..typing import Momentum
from ._variables import read_state, value, y_dtype


def set_running_view(module: Any, use_running_average: bool | None, update_running: bool | None) -> None:
    if use_running_average is not None:
        module.use_running_average = use_running_average
    if update_running is not None:
        module.update_running = update_running


def running_arguments(
    module: Any,
    keys_of: type,
    given: jax.Array,
    x: jax.Array,
    shape: tuple[int, ...],
    use_running_average: bool | None,
    update_running: bool | None,
    momentum: Momentum,
    statistics: Stats | None = None,
) -> dict[str, Any]:
    """The arguments that all norms with running statistics take: of the call, else of the constructor. `keys_of`: the state's TypedDict."""
    name = type(module).__name__
    keys = (*state_keys(keys_of, module.track_count), *(key for key in ADDED if hasattr(module, key)))
    state = read_state(module, keys, shape)
    affine = {key: value(getattr(module, key), shape) for key in ("scale", "bias") if hasattr(module, key)}
    evaluates = nnx.module.first_from(
        use_running_average,
        module.use_running_average,
        error_msg=f"No `use_running_average` argument was provided to {name}: "
        "pass it to the constructor or to the call, or set it with train(), eval() or nnx.view.",
    )
    update_running = module.update_running if update_running is None else update_running
    averages = tuple(entry for key, entry in state.items() if key not in ("count", *ADDED))
    options = {key: getattr(module, key) for key in ("epsilon", "save") if hasattr(module, key)}
    if statistics is not None:  # merged already
        options["statistics"] = statistics
    return {
        "state": state_for(x, state),
        **affine,
        **merged_axes(module, takes_statistics(evaluates, update_running, state) and statistics is None),
        "use_running_average": evaluates,
        "update_running": update_running,
        "momentum": module.momentum if momentum is None else momentum,
        "activation": module.activation,
        "dtype": y_dtype(module, given, averages, tuple(affine.values())),
        **options,
    }
