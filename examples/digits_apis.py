"""The same networks in three styles. Each is a module with the two functions here, and everything else in the example is written once."""

from typing import Any

import jax

import digits_linen
import digits_models
import digits_nnx
from digits_models import Architecture, Params, State

APIS: dict[str, Any] = {"functional": digits_models, "linen": digits_linen, "nnx": digits_nnx}


def init_model(arch: Architecture, key: jax.Array) -> tuple[Params, State]:
    """Returns what is trained, and the running statistics: pytrees, each of the style's own kind."""
    return APIS[arch.api].init_model(arch, key)


def apply_model(
    arch: Architecture,
    params: Params,
    state: State,
    images: jax.Array,
    *,
    train: bool,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, State, jax.Array]:
    """Returns (logits, the updated state, the input of the last activation). `mask` is of shape (N,), False where a sample is padding."""
    return APIS[arch.api].apply_model(arch, params, state, images, train=train, mask=mask, axis_name=axis_name)
