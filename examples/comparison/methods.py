"""The norms in one form: each makes a linear layer, its norm and its activation, so that a network can be built with any of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jnorm
from jnorm import reparam

Params = dict[str, jax.Array]
State = Any  # a dict of arrays, empty where a norm has no running statistics
LinearOp = Callable[[jax.Array, jax.Array], jax.Array]  # (inputs, kernel) -> outputs, features last

GROUPS = 4
GHOST_SIZE = 4
RENORM_LIMITS = 3.0, 5.0  # of r and d, reached over the training
BURN_IN = 0.25  # the share of the training before CBN opens its window
WINDOW = 4
LEARNED_EPSILON = 1e-4  # of FRN, where it starts


class Phase(NamedTuple):
    """Where in the training a step is. None in its place: evaluation."""

    progress: jax.Array  # updates that are done over all, 0 ... 1
    key: jax.Array  # of this step's random numbers


@dataclass(frozen=True)
class Settings:
    batch_size: int = 32  # of a mini-batch
    num_mini_batches: int = 1  # whose gradients make an update
    momentum: float = 0.9  # of running averages
    activation: str | Callable[[jax.Array], jax.Array] | None = "relu"


class Method(NamedTuple):
    label: str
    init: Callable[[Settings, jax.Array, jax.Array, LinearOp], tuple[Params, State]]  # settings, kernel, inputs, linear_op
    apply: Callable[[Settings, Params, State, jax.Array, LinearOp, Phase | None], tuple[jax.Array, State]]


def _affine(kernel: jax.Array) -> Params:
    return {"kernel": kernel, "scale": jnp.ones(kernel.shape[-1]), "bias": jnp.zeros(kernel.shape[-1])}


def without_state(settings: Settings, kernel: jax.Array, inputs: jax.Array, linear_op: LinearOp) -> tuple[Params, State]:
    return _affine(kernel), {}


def _with_state(make_state: Callable[[jax.Array], Any]) -> Any:
    return lambda settings, kernel, inputs, linear_op: (_affine(kernel), make_state(kernel))


def _no_norm_init(settings: Settings, kernel: jax.Array, inputs: jax.Array, linear_op: LinearOp) -> tuple[Params, State]:
    return {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}, {}


def _no_norm(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    x = linear_op(inputs, params["kernel"]) + params["bias"]
    if isinstance(settings.activation, str):
        return getattr(jax.nn, settings.activation)(x), state
    return x if settings.activation is None else settings.activation(x), state


def _of_samples(norm: Callable[..., jax.Array]) -> Any:
    """A norm over each sample by itself."""

    def apply(settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None) -> Any:
        x = linear_op(inputs, params["kernel"])
        return norm(x, params["scale"], params["bias"], activation=settings.activation), state

    return apply


def _of_batches(norm: Callable[..., Any], options: Callable[[Settings, jax.Array], dict[str, Any]] = lambda *_: {}) -> Any:
    """A norm with running statistics; `options` are what it takes in training, of the settings and the share of the training done."""

    def apply(settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None) -> Any:
        x = linear_op(inputs, params["kernel"])
        given = options(settings, jnp.float32(0) if phase is None else phase.progress)
        if phase is None:
            given["use_running_average"] = True
        y, state = norm(x, state, params["scale"], params["bias"], momentum=settings.momentum, activation=settings.activation, **given)
        return y, state

    return apply


def _unbiased(settings: Settings, progress: jax.Array) -> dict[str, Any]:
    """Running averages of the unbiased variance: of two values the biased one is half of what evaluation needs."""
    return {"running_var_correction": 1}


def _renorm_limits(settings: Settings, progress: jax.Array) -> dict[str, Any]:
    """The paper's proportions; that it is a tenth of the training as batch normalization, with d open at half, r at 0.8, is not."""
    limits = jnorm.renorm_schedules(begin=100, d_end=500, r_end=800, r_max=RENORM_LIMITS[0], d_max=RENORM_LIMITS[1])
    step = 1000 * progress
    return {"r_max": limits.r_max(step), "d_max": limits.d_max(step)}


def _cross_iteration(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    y, state = jnorm.cross_iteration_batch_norm(
        linear_op(inputs, params["kernel"]),
        state,
        params["scale"],
        params["bias"],
        inputs=inputs,
        kernel=params["kernel"],
        linear_op=linear_op,
        window_size=None if phase is None else jnp.where(phase.progress < BURN_IN, 1, WINDOW),
        use_running_average=phase is None,
        momentum=settings.momentum,
        running_var_correction=1,
        activation=settings.activation,  # pyright: ignore[reportArgumentType]
    )
    return y, state


def _filter_response(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    """The threshold takes the activation's place."""
    x = linear_op(inputs, params["kernel"])
    y = jnorm.filter_response_norm(x, params["scale"], params["bias"], learned_epsilon=params.get("learned_epsilon"))
    return jnorm.thresholded_linear_unit(y, params["threshold"]), state


def _filter_response_init(settings: Settings, kernel: jax.Array, inputs: jax.Array, linear_op: LinearOp) -> tuple[Params, State]:
    params = {**_affine(kernel), "threshold": jnp.zeros(kernel.shape[-1])}
    if kernel.ndim == 2:  # without positions little is left of x but its sign, unless an epsilon is learned
        params["learned_epsilon"] = jnp.float32(LEARNED_EPSILON)
    return params, {}


def _weight_norm(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    y, state = jnorm.mean_only_batch_norm(
        linear_op(inputs, reparam.weight_norm(params["kernel"], params["scale"])),
        state,
        params["bias"],
        use_running_average=phase is None,
        momentum=settings.momentum,
        activation=settings.activation,  # pyright: ignore[reportArgumentType]
    )
    return y, state


def _weight_norm_init(settings: Settings, kernel: jax.Array, inputs: jax.Array, linear_op: LinearOp) -> tuple[Params, State]:
    """From data: with this scale, outputs have the variance 1 on the inputs given here."""
    scale, bias, _ = reparam.weight_norm_data_init(linear_op(inputs, reparam.weight_norm(kernel)), mean_only=True)
    return {"kernel": kernel, "scale": scale, "bias": bias}, jnorm.mean_only_batch_norm_state(kernel.shape[-1], track_count=True)


def _propagation(
    settings: Settings, params: Params, state: State, inputs: jax.Array, linear_op: LinearOp, phase: Phase | None
) -> tuple[jax.Array, State]:
    y = reparam.normalization_propagation(
        inputs,
        params["kernel"],
        params["scale"],
        params["bias"],
        linear_op=linear_op,
        activation=settings.activation,  # pyright: ignore[reportArgumentType]
    )
    return y, state


def _batch_state(kernel: jax.Array) -> Any:
    return jnorm.batch_norm_state(kernel.shape[-1], track_count=True)


_batch_norm = _with_state(_batch_state), _of_batches(jnorm.batch_norm, _unbiased)

METHODS = {
    "none": Method("no norm", _no_norm_init, _no_norm),
    "batch_norm": Method("BN", *_batch_norm),
    "layer_norm": Method("LN", without_state, _of_samples(partial(jnorm.group_norm, num_groups=1))),
    "instance_norm": Method("IN", without_state, _of_samples(jnorm.instance_norm)),
    "group_norm": Method("GN", without_state, _of_samples(partial(jnorm.group_norm, num_groups=GROUPS))),
    "batch_renorm": Method(
        "BRN",
        _with_state(lambda kernel: jnorm.batch_renorm_state(kernel.shape[-1], track_count=True)),
        _of_batches(jnorm.batch_renorm, _renorm_limits),
    ),
    "filter_response_norm": Method("FRN + TLU", _filter_response_init, _filter_response),
    "weight_norm": Method("WN + mean-only BN", _weight_norm_init, _weight_norm),
    "cross_iteration_batch_norm": Method(
        "CBN",
        _with_state(lambda kernel: jnorm.cross_iteration_batch_norm_state(kernel.shape, window=WINDOW, track_count=True)),
        _cross_iteration,
    ),
    "ghost_batch_norm": Method(
        f"ghost BN, {GHOST_SIZE}",
        _with_state(_batch_state),
        _of_batches(
            jnorm.ghost_batch_norm, lambda settings, done: {"group_size": min(GHOST_SIZE, settings.batch_size), **_unbiased(settings, done)}
        ),
    ),
    "cross_mini_batch_norm": Method(
        "CmBN, accumulated",
        _with_state(lambda kernel: jnorm.cross_mini_batch_norm_state(kernel.shape[-1], track_count=True)),
        _of_batches(
            jnorm.cross_mini_batch_norm, lambda settings, done: {"num_mini_batches": settings.num_mini_batches, **_unbiased(settings, done)}
        ),
    ),
    "accumulated_batch_norm": Method("BN, accumulated", *_batch_norm),
    "normalization_propagation": Method("norm propagation", without_state, _propagation),
}
