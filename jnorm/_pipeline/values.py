"""What arguments are read as: arrays, dtypes, scalars and sizes. What is none is refused by the argument's name."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_array(value: Any, name: str = "x") -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        if hasattr(value, "dtype"):  # of one that JAX cannot take it knows why
            raise
        raise TypeError(f"{name} must be an array, got {type(value).__name__}.") from error


def as_dtype(dtype: Any) -> jnp.dtype:
    try:
        return jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f'dtype must be that of an array, such as jnp.float32 or "bfloat16", got {dtype!r}.') from error


def check_scalar(value: Any, name: str) -> None:
    """A real number, static or traced; in its place a schedule is easily given."""
    if _is_function(value):
        raise TypeError(
            f"{name} must be a number or a traced scalar, got a function; call the schedule with the step, {name}=schedule(step)."
        )
    if value is None or isinstance(value, str) or jnp.ndim(value) != 0 or jnp.iscomplexobj(value):
        raise ValueError(f"{name} must be a real scalar, got {value!r}.")


def _is_function(value: Any) -> bool:
    return callable(value) and not hasattr(value, "dtype")


def check_size(size: Any, name: str) -> int:
    if not isinstance(size, int | np.integer) or size < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {told(size)}.")
    return int(size)


def check_sizes(sizes: Any, name: str, wanted: str = "a sequence of ints") -> tuple[int, ...]:
    """Several, in order."""
    if not isinstance(sizes, Sequence) or not all(isinstance(n, int | np.integer) for n in sizes):
        raise TypeError(f"{name} must be {wanted}, got {told(sizes)}.")
    if any(n < 0 for n in sizes):
        raise ValueError(f"{name} must be at least 0, got {min(sizes)}.")
    return tuple(int(n) for n in sizes)


def told(value: Any) -> str:
    """What an error says was given: of an array not all that is in it."""
    return f"an array of shape {value.shape}" if getattr(value, "shape", ()) else repr(value)


def not_a_state(state: Any, wanted: str, made_by: str, name: str = "state") -> ValueError:
    """The refusal of what is no dict of the wanted entries."""
    got, cure = type(state).__name__, f"make it with jnorm.{made_by}"
    if isinstance(state, dict):
        got = str(sorted(map(str, state)))
    elif isinstance(state, Mapping):
        cure = f"dict({name}), or flax.core.unfreeze of the tree that it is from, keeps the statistics"
    return ValueError(f"{name} must be a dict of {wanted}, got {got}; {cure}.")
