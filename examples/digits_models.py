"""The two networks, and their functional style: pure functions, where parameters and running statistics are nested dicts of arrays."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jnorm
from digits_data import NUM_CLASSES, DigitsError

MODELS = ("mlp", "cnn")
NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "tracked_instance_norm", "none")
MLP_WIDTHS = (300, 100)
CNN_WIDTHS = (16, 32)
MOMENTUM = 0.9  # a run takes some 160 steps only: the running statistics must follow faster than with the default of 0.99

Params = Any  # in each style: dicts of arrays, or an nnx.State
State = Any


@dataclass(frozen=True)
class Architecture:
    """All that fixes the shapes of the parameters; it is stored with a checkpoint."""

    model: str
    norm: str
    num_groups: int  # of group_norm
    image_shape: tuple[int, int]
    api: str = "functional"


@dataclass(frozen=True)
class NormalizedLayer:
    name: str
    width: int  # features, or channels
    positions: int  # pixels; 1 in a dense layer


def normalized_layers(arch: Architecture) -> list[NormalizedLayer]:
    """The layers with a norm. The mlp has one on its logits too; the cnn's are all convolutions, where every norm has an axis to reduce."""
    if arch.model == "mlp":
        return [NormalizedLayer(f"dense{i + 1}", width, 1) for i, width in enumerate((*MLP_WIDTHS, NUM_CLASSES))]
    height, width = arch.image_shape  # each convolution is followed by a 2x2 pooling
    return [NormalizedLayer(f"conv{i + 1}", channels, (height >> i) * (width >> i)) for i, channels in enumerate(CNN_WIDTHS)]


def check_architecture(arch: Architecture) -> None:
    """Refuses what could not train: images too small, a norm without an axis to reduce, groups that do not divide the layers."""
    height, width = arch.image_shape
    if arch.model == "cnn" and min(height, width) < 4:
        raise DigitsError(f"--model cnn halves the images twice and needs at least 4x4 pixels; these have {height}x{width}")
    for layer in normalized_layers(arch):
        if arch.norm in ("instance_norm", "tracked_instance_norm") and layer.positions == 1:
            raise DigitsError(
                f"--norm {arch.norm} reduces over the pixels of each channel, but layer {layer.name} of --model {arch.model} has none: "
                "every output would be the bias. Use --model cnn, or another norm"
            )
        if arch.norm == "group_norm":
            _check_groups(arch, layer)


def _check_groups(arch: Architecture, layer: NormalizedLayer) -> None:
    widths = ", ".join(str(each.width) for each in normalized_layers(arch))
    if arch.num_groups < 1 or layer.width % arch.num_groups:
        raise DigitsError(
            f"--num-groups {arch.num_groups} does not divide the {layer.width} features of layer {layer.name}; "
            f"--model {arch.model} has layers of {widths}"
        )
    if layer.width * layer.positions == arch.num_groups:
        raise DigitsError(
            f"--num-groups {arch.num_groups} leaves groups of one value in layer {layer.name}, of {layer.width} features: "
            f"every output would be the bias. Use fewer groups; --model {arch.model} has layers of {widths}"
        )


def init_kernels(arch: Architecture, key: jax.Array) -> dict[str, jax.Array]:
    """He initialization, by layer. It depends on `key` alone, so that runs with and without a norm, and in any style, start the same."""
    height, width = arch.image_shape
    if arch.model == "mlp":
        sizes = (height * width, *MLP_WIDTHS, NUM_CLASSES)
        shapes = {f"dense{i + 1}": (sizes[i], sizes[i + 1]) for i in range(3)}
    else:
        first, second = CNN_WIDTHS
        flat = (height // 4) * (width // 4) * second
        shapes = {"conv1": (3, 3, 1, first), "conv2": (3, 3, first, second), "dense1": (flat, NUM_CLASSES)}
    keys = jax.random.split(key, len(shapes))
    he_normal = jax.nn.initializers.he_normal()
    return {name: he_normal(layer_key, shape) for layer_key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def init_model(arch: Architecture, key: jax.Array) -> tuple[Params, State]:
    """Returns (parameters, running statistics), by layer."""
    # One bias a layer: the norm's own where there is one, for it would take that of the dense layer or convolution away again.
    params = {name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])} for name, kernel in init_kernels(arch, key).items()}
    state = {}
    for layer in normalized_layers(arch):
        if arch.norm != "none":
            params[layer.name]["scale"] = jnp.ones(layer.width)
        if arch.norm in ("batch_norm", "tracked_instance_norm"):
            state[layer.name] = jnorm.batch_norm_state(layer.width)
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
    """Returns (logits, the updated state, the input of the last activation). `mask` is of shape (N,), False where a sample is padding."""
    state = dict(state)
    with_norm = {layer.name for layer in normalized_layers(arch)} if arch.norm != "none" else set()

    def linear_and_norm(name: str, x: jax.Array) -> jax.Array:
        layer = params[name]
        x = _convolve(x, layer["kernel"]) if name.startswith("conv") else x @ layer["kernel"]
        if name not in with_norm:
            return _add_bias(x, layer["bias"])
        x, new_state = _apply_norm(arch, layer, state.get(name), x, train=train, mask=mask, axis_name=axis_name)
        if new_state is not None:
            state[name] = new_state
        return x

    if arch.model == "mlp":
        x = jax.nn.elu(linear_and_norm("dense1", images.reshape(len(images), -1)))
        pre_activation = linear_and_norm("dense2", x)
        logits = linear_and_norm("dense3", jax.nn.elu(pre_activation))
    else:
        x = _average_pool(jax.nn.elu(linear_and_norm("conv1", images[..., None])))
        pre_activation = linear_and_norm("conv2", x)
        x = _average_pool(jax.nn.elu(pre_activation))
        logits = linear_and_norm("dense1", x.reshape(len(x), -1))
    return logits, state, pre_activation


def _apply_norm(
    arch: Architecture, layer: Params, state: Any, x: jax.Array, *, train: bool, mask: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, Any]:
    scale, bias = layer["scale"], layer["bias"]
    if mask is not None:
        mask = mask.reshape((-1,) + (1,) * (x.ndim - 1))
    match arch.norm:
        case "batch_norm":
            # Statistics over the batch: the only norm here that needs the mask and the other devices to normalize.
            return jnorm.batch_norm(
                x, state, scale, bias, use_running_average=not train, momentum=MOMENTUM, mask=mask, axis_name=axis_name if train else None
            )
        case "layer_norm":
            return jnorm.layer_norm(x, scale, bias), None
        case "rms_norm":
            return _add_bias(jnorm.rms_norm(x, scale), bias), None
        case "group_norm":
            return jnorm.group_norm(x, scale, bias, num_groups=arch.num_groups), None
        case "instance_norm":
            return jnorm.instance_norm(x, scale, bias), None
        case "tracked_instance_norm":
            x, new_state = jnorm.tracked_instance_norm(x, state, scale, bias, use_running_average=not train, momentum=MOMENTUM, mask=mask)
            return x, average_over_devices(new_state, mask, axis_name) if train else new_state
    raise ValueError(f"norm must be one of {NORMS}, got {arch.norm!r}")


def average_over_devices(state: Any, mask: jax.Array | None, axis_name: str | None) -> Any:
    """The mean of the devices' running statistics, weighed by counted samples: a share of the last batch may be all padding."""
    if axis_name is None:
        return state
    weight = jnp.sum(mask, dtype=jnp.float32) if mask is not None else jnp.float32(1)
    weight = weight / lax.psum(weight, axis_name)
    return jax.tree.map(lambda leaf: lax.psum(weight * leaf, axis_name), state)


def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + jnp.broadcast_to(bias, x.shape)  # said out loud: works with jax_numpy_rank_promotion="raise" too


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _average_pool(x: jax.Array) -> jax.Array:
    """Not the maximum: where two pixels nearly tie, rounding chooses, and runs on other numbers of devices would drift apart."""
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
