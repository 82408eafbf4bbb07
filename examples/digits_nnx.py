"""The two networks in Flax's NNX style: modules that hold their arrays, with the norms of jnorm.nnx."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jnorm.nnx
from digits_data import NUM_CLASSES
from digits_models import CNN_WIDTHS, MLP_WIDTHS, MOMENTUM, NORMS, Architecture, Params, State, average_over_devices, init_kernels


class RMSNormAndBias(nnx.Module):
    """An RMS norm has no bias of its own; the example adds one, for every layer to have a bias."""

    def __init__(self, num_features: int, *, rngs: nnx.Rngs) -> None:
        self.rms = jnorm.nnx.RMSNorm(num_features, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(num_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.rms(x) + jnp.broadcast_to(self.bias[...], x.shape)


def make_norm(arch: Architecture, num_features: int, axis_name: str | None, *, rngs: nnx.Rngs) -> Any:
    """The norm that the command line asks for, or None."""
    match arch.norm:
        case "batch_norm":
            return jnorm.nnx.BatchNorm(num_features, momentum=MOMENTUM, axis_name=axis_name, rngs=rngs)
        case "layer_norm":
            return jnorm.nnx.LayerNorm(num_features, rngs=rngs)
        case "rms_norm":
            return RMSNormAndBias(num_features, rngs=rngs)
        case "group_norm":
            return jnorm.nnx.GroupNorm(num_features, num_groups=arch.num_groups, rngs=rngs)
        case "instance_norm":
            return jnorm.nnx.InstanceNorm(num_features, rngs=rngs)
        case "tracked_instance_norm":
            return jnorm.nnx.TrackedInstanceNorm(num_features, momentum=MOMENTUM, rngs=rngs)
        case "none":
            return None
    raise ValueError(f"norm must be one of {NORMS}, got {arch.norm!r}")


class Network(nnx.Module):
    """Returns the logits and the input of the last activation. `train()` and `eval()` choose what the norms normalize with."""

    def __init__(self, arch: Architecture, axis_name: str | None = None, *, rngs: nnx.Rngs) -> None:
        self.arch = arch
        height, width = arch.image_shape
        he_normal = nnx.initializers.he_normal()
        # One bias a layer: the norm's own where there is one.
        options: Any = {"use_bias": arch.norm == "none", "kernel_init": he_normal, "rngs": rngs}
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), **options)
        norm = functools.partial(make_norm, arch, axis_name=axis_name, rngs=rngs)
        if arch.model == "mlp":
            first, second = MLP_WIDTHS
            self.dense1, self.dense1_norm = nnx.Linear(height * width, first, **options), norm(first)
            self.dense2, self.dense2_norm = nnx.Linear(first, second, **options), norm(second)
            self.dense3, self.dense3_norm = nnx.Linear(second, NUM_CLASSES, **options), norm(NUM_CLASSES)
        else:
            first, second = CNN_WIDTHS
            self.conv1, self.conv1_norm = conv(1, first), norm(first)
            self.conv2, self.conv2_norm = conv(first, second), norm(second)
            self.dense1 = nnx.Linear((height // 4) * (width // 4) * second, NUM_CLASSES, kernel_init=he_normal, rngs=rngs)

    def __call__(self, images: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        if self.arch.model == "mlp":
            x = nnx.elu(_normalize(self.dense1_norm, self.dense1(images.reshape(len(images), -1)), mask))
            pre_activation = _normalize(self.dense2_norm, self.dense2(x), mask)
            logits = _normalize(self.dense3_norm, self.dense3(nnx.elu(pre_activation)), mask)
        else:
            x = _average_pool(nnx.elu(_normalize(self.conv1_norm, self.conv1(images[..., None]), mask)))
            pre_activation = _normalize(self.conv2_norm, self.conv2(x), mask)
            x = _average_pool(nnx.elu(pre_activation))
            logits = self.dense1(x.reshape(len(x), -1))
        return logits, pre_activation


def _normalize(norm: Any, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    if norm is None:
        return x
    if mask is not None and isinstance(norm, jnorm.nnx.BatchNorm | jnorm.nnx.TrackedInstanceNorm):
        # Only what is taken from several samples, output or running statistics, needs to know which of them are padding.
        return norm(x, mask=mask.reshape((-1,) + (1,) * (x.ndim - 1)))
    return norm(x)


def _average_pool(x: jax.Array) -> jax.Array:
    return nnx.avg_pool(x, (2, 2), strides=(2, 2))


def init_model(arch: Architecture, key: jax.Array) -> tuple[Params, State]:
    """Returns the network's variables of the types nnx.Param and nnx.BatchStat."""
    model = Network(arch, rngs=nnx.Rngs(key))
    # NNX counts the keys that it takes from a stream. So that the losses can be compared with those of the other styles, the kernels are
    # replaced by theirs, of the same initializer; a program of its own has no need to.
    for name, kernel in init_kernels(arch, key).items():
        getattr(model, name).kernel[...] = kernel
    _, params, state = nnx.split(model, nnx.Param, nnx.BatchStat)
    return params, state


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
    """As in digits_models.py."""
    # The network without its arrays, here where `axis_name` is known: this runs when the step is traced, and computes nothing.
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Network(arch, axis_name, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, params, state, copy=True)  # its variables are then this call's own, to be written under value_and_grad too
    if train:
        model.train()
    else:
        model.eval()
    logits, pre_activation = model(images, mask)
    state = nnx.state(model, nnx.BatchStat)
    if arch.norm == "tracked_instance_norm" and train:  # the statistics of a sample need no other device; the running ones do
        state = average_over_devices(state, mask, axis_name)
    return logits, state, pre_activation
