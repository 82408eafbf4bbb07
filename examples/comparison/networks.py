"""The networks, as pure functions of parameters and running statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from comparison.methods import LinearOp, Method, Phase, Settings
from digits_data import NUM_CLASSES

he_normal = jax.nn.initializers.he_normal()


class Network(NamedTuple):
    init: Callable[[jax.Array, jax.Array], tuple[Any, Any]]  # (key, some training images) -> (params, state)
    apply: Callable[[Any, Any, jax.Array, Phase | None], tuple[jax.Array, Any]]  # params, state, images, phase -> (logits, state)


def convolve(inputs: jax.Array, kernel: jax.Array, borders: Any = "constant") -> jax.Array:
    """A 3x3 convolution as one product. XLA's own, mapped over the kernels of many networks, is several times slower on a CPU."""
    height, width = inputs.shape[1:3]
    padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)), borders)
    patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def pool(x: jax.Array) -> jax.Array:
    """The average of each 2x2 pixels."""
    n, height, width, channels = x.shape
    whole = x[:, : height // 2 * 2, : width // 2 * 2]
    return whole.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def init_head(key: jax.Array, width: int) -> dict[str, jax.Array]:
    return {"kernel": he_normal(key, (width, NUM_CLASSES)), "bias": jnp.zeros(NUM_CLASSES)}


def head(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1) @ params["kernel"] + params["bias"]


def cnn(method: Method, settings: Settings, widths: tuple[int, ...] = (16, 32, 32)) -> Network:
    """3x3 convolutions, each with its norm and activation, with a 2x2 average pooling between two of them, and a dense layer."""
    return _stack(method, settings, widths, convolve, (3, 3), lambda i, x: pool(x) if i else x)


def mlp(
    method: Method, settings: Settings, widths: tuple[int, ...] = (100, 100, 100), initializer: jax.nn.initializers.Initializer = he_normal
) -> Network:
    """Dense layers, each with its norm and activation, and one more. A feature has as many values as the batch has images."""
    return _stack(method, settings, widths, jnp.matmul, (), lambda i, x: x.reshape(len(x), -1), initializer)


def _stack(
    method: Method,
    settings: Settings,
    widths: tuple[int, ...],
    linear_op: LinearOp,
    window: tuple[int, ...],
    before: Callable[[int, jax.Array], jax.Array],
    initializer: jax.nn.initializers.Initializer = he_normal,
) -> Network:
    """`before(i, x)` is what layer i is given; the kernels are of shape (*window, inputs, outputs)."""

    def init(key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        *keys, head_key = jax.random.split(key, len(widths) + 1)
        x, params, state = images, [], []
        for i, (layer_key, width) in enumerate(zip(keys, widths, strict=True)):
            x = before(i, x)
            kernel = initializer(layer_key, (*window, x.shape[-1], width))
            layer, layer_state = method.init(settings, kernel, x, linear_op)
            # In training mode: a layer that is initialized from data sees what the layers before it will give it.
            x, _ = method.apply(settings, layer, layer_state, x, linear_op, Phase(jnp.float32(0), key))
            params.append(layer)
            state.append(layer_state)
        return {"layers": params, "head": init_head(head_key, x[0].size)}, state

    def apply(params: Any, state: Any, x: jax.Array, phase: Phase | None) -> tuple[jax.Array, Any]:
        new_state = []
        for i, (layer, layer_state) in enumerate(zip(params["layers"], state, strict=True)):
            x, layer_state = method.apply(settings, layer, layer_state, before(i, x), linear_op, phase)
            new_state.append(layer_state)
        return head(params["head"], x), new_state

    return Network(init, apply)
