"""The two networks in Flax's Linen style: modules, with the norms of jnorm.linen."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jnorm.linen
from digits_data import NUM_CLASSES
from digits_models import CNN_WIDTHS, MLP_WIDTHS, MOMENTUM, NORMS, Architecture, Params, State, average_over_devices, init_kernels


class RMSNormAndBias(nn.Module):
    """An RMS norm has no bias of its own; the example adds one, for every layer to have a bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return jnorm.linen.RMSNorm(name="rms")(x) + jnp.broadcast_to(bias, x.shape)


class Norm(nn.Module):
    """The norm that the command line asks for, or none."""

    arch: Architecture
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None) -> jax.Array:
        if mask is not None:
            mask = mask.reshape((-1,) + (1,) * (x.ndim - 1))
        match self.arch.norm:
            case "batch_norm":
                return jnorm.linen.BatchNorm(use_running_average=not train, momentum=MOMENTUM, axis_name=self.axis_name)(x, mask=mask)
            case "layer_norm":
                return jnorm.linen.LayerNorm()(x)
            case "rms_norm":
                return RMSNormAndBias()(x)
            case "group_norm":
                return jnorm.linen.GroupNorm(num_groups=self.arch.num_groups)(x)
            case "instance_norm":
                return jnorm.linen.InstanceNorm()(x)
            case "tracked_instance_norm":
                return jnorm.linen.TrackedInstanceNorm(use_running_average=not train, momentum=MOMENTUM)(x, mask=mask)
            case "none":
                return x
        raise ValueError(f"norm must be one of {NORMS}, got {self.arch.norm!r}")


class Network(nn.Module):
    """Returns the logits and the input of the last activation."""

    arch: Architecture
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        # One bias a layer: the norm's own where there is one.
        options = {"use_bias": self.arch.norm == "none", "kernel_init": nn.initializers.he_normal()}
        dense, conv = functools.partial(nn.Dense, **options), functools.partial(nn.Conv, kernel_size=(3, 3), **options)

        def norm(layer: str, x: jax.Array) -> jax.Array:
            return Norm(self.arch, self.axis_name, name=f"{layer}_norm")(x, train=train, mask=mask)

        if self.arch.model == "mlp":
            x = nn.elu(norm("dense1", dense(MLP_WIDTHS[0], name="dense1")(images.reshape(len(images), -1))))
            pre_activation = norm("dense2", dense(MLP_WIDTHS[1], name="dense2")(x))
            logits = norm("dense3", dense(NUM_CLASSES, name="dense3")(nn.elu(pre_activation)))
        else:
            x = _average_pool(nn.elu(norm("conv1", conv(CNN_WIDTHS[0], name="conv1")(images[..., None]))))
            pre_activation = norm("conv2", conv(CNN_WIDTHS[1], name="conv2")(x))
            x = _average_pool(nn.elu(pre_activation))
            logits = nn.Dense(NUM_CLASSES, kernel_init=nn.initializers.he_normal(), name="dense1")(x.reshape(len(x), -1))
        return logits, pre_activation


def init_model(arch: Architecture, key: jax.Array) -> tuple[Params, State]:
    """Returns the collections "params" and "batch_stats"."""
    variables = Network(arch).init(key, jnp.zeros((1, *arch.image_shape)), train=True)
    # Linen derives each layer's key from the layer's name. So that the losses can be compared with those of the other styles, the kernels
    # are replaced by theirs, of the same initializer; a program of its own has no need to.
    params = dict(variables["params"])
    for name, kernel in init_kernels(arch, key).items():
        params[name] = {**params[name], "kernel": kernel}
    return params, variables.get("batch_stats", {})


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
    variables: dict[str, Any] = {"params": params, "batch_stats": state}
    (logits, pre_activation), updates = Network(arch, axis_name).apply(variables, images, train=train, mask=mask, mutable=["batch_stats"])
    state = updates.get("batch_stats", {})
    if arch.norm == "tracked_instance_norm" and train:  # the statistics of a sample need no other device; the running ones do
        state = average_over_devices(state, mask, axis_name)
    return logits, state, pre_activation


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (2, 2), strides=(2, 2))
