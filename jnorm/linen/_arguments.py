"""What the classes with running statistics pass to their functions, and the variables that they hold them in."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from .._modules import merged_axes, result_dtype, state_dtype, state_for, state_keys, takes_statistics
from .._pipeline.marks import ADDED
from .._stats import Stats
from ..typing import Momentum
from ._variables import StateVariables, bias_param, scale_param


def running_variables(module: Any, make: Callable[..., Any], keys_of: type, x: jax.Array, shape: tuple[int, ...]) -> StateVariables:
    """The state that `make` makes, of the TypedDict `keys_of`, as variables."""
    dtype = state_dtype(x.dtype, module.param_dtype, getattr(module, "force_float32_reductions", True))
    keys = (*state_keys(keys_of, module.track_count), *(key for key in ADDED if module.has_variable("batch_stats", key)))
    return StateVariables(module, lambda: make(shape, track_count=module.track_count, dtype=dtype), keys)


def running_arguments(
    module: Any,
    given: jax.Array,
    x: jax.Array,
    variables: StateVariables,
    use_running_average: bool | None,
    update_running: bool | None,
    momentum: Momentum,
    statistics: Stats | None = None,
) -> dict[str, Any]:
    """The arguments that all norms with running statistics take: of the call, else of the constructor."""
    state = state_for(x, variables.read())
    shape = state["mean"].shape
    affine = {}
    if hasattr(module, "use_scale"):
        affine["scale"] = scale_param(module, shape)
    affine["bias"] = bias_param(module, shape)
    evaluates = nn.merge_param("use_running_average", module.use_running_average, use_running_average)
    update_running = module.update_running if update_running is None else update_running
    # One example, whose batch has its axis outside, or later.
    alone = module.is_initializing() and len(shape) == x.ndim and statistics is None
    options = {name: getattr(module, name) for name in ("epsilon", "save") if hasattr(module, name)}
    if statistics is not None:  # merged already
        options["statistics"] = statistics
    return {
        "state": state,
        **affine,
        **merged_axes(module, takes_statistics(evaluates, update_running, state) and statistics is None and not module.is_initializing()),
        "use_running_average": evaluates or alone,
        "update_running": False if module.is_initializing() else update_running,
        "momentum": module.momentum if momentum is None else momentum,
        "activation": module.activation,
        "dtype": result_dtype(given, *affine.values(), dtype=module.dtype),
        **options,
    }
