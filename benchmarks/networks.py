"""Training steps of whole networks with Flax's norms, with jnorm's, and with none: same weights, interleaved in one run.

With none: only scale and bias, which is what the share of the norms in a step is measured against.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jnorm
import jnorm.linen as jnn

from . import timing
from .oracle import UNIT
from .peers import ours

RATE = 1e-3


class Affine(nn.Module):
    """What is left of a norm without its normalization."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x * scale.astype(self.dtype) + bias.astype(self.dtype)


def batch_norm(kind: str, dtype: Any, name: str, x: jax.Array, residual: jax.Array | None = None, relu: bool = True) -> jax.Array:
    """The norm, the residual and ReLU; fused only in "jnorm fused"."""
    if kind == "jnorm fused":
        layer = jnn.BatchNorm(use_running_average=False, dtype=dtype, activation="relu" if relu else None, name=name)
        return layer(x, residual=residual)
    if kind == "none":
        y = Affine(dtype, name=name)(x)
    else:
        y = (nn if kind == "flax" else jnn).BatchNorm(use_running_average=False, dtype=dtype, name=name)(x)
    y = y if residual is None else y + residual
    return nn.relu(y) if relu else y


def layer_norm(kind: str, dtype: Any, name: str, x: jax.Array) -> jax.Array:
    layer = Affine(dtype, name=name) if kind == "none" else (nn if kind == "flax" else jnn).LayerNorm(dtype=dtype, name=name)
    return layer(x)


class ResNet18(nn.Module):
    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(batch_norm, self.kind, self.dtype)
        x = norm("norm_stem", conv(64, (7, 7), 2, name="stem")(x.astype(self.dtype)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, (width, stride) in enumerate([(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]):
            shortcut = x
            if shortcut.shape[-1] != width:
                shortcut = norm(f"norm_{i}_short", conv(width, (1, 1), stride, name=f"conv_{i}_short")(x), relu=False)
            x = norm(f"norm_{i}_a", conv(width, (3, 3), stride, name=f"conv_{i}_a")(x))
            x = norm(f"norm_{i}_b", conv(width, (3, 3), name=f"conv_{i}_b")(x), residual=shortcut)
        return nn.Dense(1000, dtype=self.dtype)(x.mean((1, 2)))


class TransformerBlock(nn.Module):
    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        width = x.shape[-1]
        h = layer_norm(self.kind, self.dtype, "norm_a", x)
        x = x + nn.MultiHeadDotProductAttention(12, dtype=self.dtype)(h)
        h = nn.Dense(4 * width, dtype=self.dtype)(layer_norm(self.kind, self.dtype, "norm_b", x))
        return x + nn.Dense(width, dtype=self.dtype)(nn.gelu(h))


@dataclasses.dataclass(frozen=True)
class Network:
    name: str
    model: Callable[[str, Any], nn.Module]
    shape: tuple[int, ...]
    kinds: tuple[str, ...]


CNN = Network("ResNet-18, 32 images of 64×64", ResNet18, (32, 64, 64, 3), ("flax", "jnorm", "jnorm fused", "none"))
BLOCK = Network("transformer block, 8×197×768, 12 heads", TransformerBlock, (8, 197, 768), ("flax", "jnorm", "none"))
QUICK_BLOCK = dataclasses.replace(BLOCK, name="transformer block, 2×16×96, 12 heads", shape=(2, 16, 96))


def variants(network: Network) -> dict[str, tuple[str, str]]:
    """{row: (kind of norm, form of jnorm's kernels)}."""
    forms = ["native", "xla"] if ours.has_native() else ["xla"]
    found = {}
    for kind in network.kinds:
        for form in forms if kind.startswith("jnorm") else ["xla"]:
            found[f"{kind}, {form}" if kind.startswith("jnorm") else kind] = (kind, form)
    return found


def training_step(model: nn.Module) -> Callable:
    def step(params: Any, stats: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            y, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return jnp.mean(jnp.square(y.astype(jnp.float32))), new.get("batch_stats", stats)

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - RATE * g, params, gradients), new

    return step


def measure(network: Network, dtype: str, rounds: int, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(0), network.shape)
    weights = network.model("flax", jnp.dtype(dtype)).init(jax.random.key(1), x)
    params, stats = weights["params"], weights.get("batch_stats", {})
    runs: dict[str, timing.Timed] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (kind, form) in variants(network).items():
        tell(f"{network.name}, {dtype}: {name}")
        with ours.forced(form):
            compiled = jax.jit(training_step(network.model(kind, jnp.dtype(dtype)))).lower(params, stats, x).compile()
        analysis = compiled.memory_analysis()
        rows[name] = {"loss": float(compiled(params, stats, x)[0])} | memory_of(analysis)
        runs[name] = timing.timed(lambda compiled=compiled: compiled(params, stats, x), jax.block_until_ready)
    check_losses(network.name, dtype, {name: row["loss"] for name, row in rows.items() if name != "none"})
    tell(f"{network.name}, {dtype}: {rounds} rounds")
    times, dropped = timing.interleave(runs, rounds, {name: timing.estimate(run, 2) for name, run in runs.items()})
    bare = statistics.median(times["none"])
    for name, row in rows.items():
        row |= timing.summary(times[name]) | {"share": 1 - bare / statistics.median(times[name])}
        row["over_flax"] = timing.compare(times["flax"], times[name])
    return {"network": network.name, "dtype": dtype, "rounds_dropped": dropped, "variants": rows}


def check_losses(network: str, dtype: str, losses: dict[str, float]) -> None:
    """In float32 the same weights must give the same loss: about 50 layers of 16 roundings are between. bfloat16 would say nothing."""
    for name, loss in losses.items():
        if dtype == "float32" and not abs(loss / losses["flax"] - 1) < 50 * 16 * UNIT[dtype]:
            raise ValueError(f"{network}: the loss with {name} is {loss}, with flax {losses['flax']}")


def memory_of(analysis: Any) -> dict[str, int]:
    if analysis is None:
        return {}
    total = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {"temp": analysis.temp_size_in_bytes, "peak": total}


# --- memory of a deep network -----------------------------------------------------------------------------------------------

DEPTHS = (8, 16)


def stack(norm: Callable) -> Callable:
    """The gradients of blocks of norm, activation and dense, as many as there are parameters for."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for p in params:
            x = norm(x, p["scale"], p["bias"]) @ p["kernel"].astype(x.dtype)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1))


def blocks() -> dict[str, Callable]:
    """{"norm, whose": (x, scale, bias) -> the activation of the norm}."""

    def state(x: jax.Array) -> Any:
        return jnorm.batch_norm_state(x.shape[-1])

    def flax_batch(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        module = nn.BatchNorm(use_running_average=False, dtype=x.dtype)
        y, _ = module.apply({"params": {"scale": scale, "bias": bias}, "batch_stats": state(x)}, x, mutable=["batch_stats"])
        return nn.relu(y)

    def flax_layer(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        y: Any = nn.LayerNorm(dtype=x.dtype).apply({"params": {"scale": scale, "bias": bias}}, x)
        return nn.relu(y)

    def batch(**options: Any) -> Callable:
        return lambda x, s, b: jnorm.batch_norm(x, state(x), s, b, **options)[0]

    return {
        "batch norm + ReLU, flax": flax_batch,
        "batch norm + ReLU, jnorm": batch(activation="relu"),
        "batch norm + leaky ReLU, jnorm": batch(activation="leaky_relu"),
        "batch norm + leaky ReLU, jnorm, save=output": batch(activation="leaky_relu", save="output"),
        "layer norm + ReLU, flax": flax_layer,
        "layer norm + ReLU, jnorm": lambda x, s, b: nn.relu(jnorm.layer_norm(x, s, b)),
        "layer norm, jnorm": jnorm.layer_norm,
        "layer norm, jnorm, save=output": functools.partial(jnorm.layer_norm, save="output"),
    }


def marginal_temp(norm: Callable, form: str, dtype: str, shape: tuple[int, int]) -> float:
    """Temporary bytes that one more block costs, in bytes of its input."""
    width = shape[1]
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    block = {"scale": (width,), "bias": (width,), "kernel": (width, width)}
    found = []
    for depth in DEPTHS:
        params = [{k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in block.items()} for _ in range(depth)]
        with ours.forced(form):
            analysis: Any = jax.jit(stack(norm)).lower(params, x).compile().memory_analysis()
        found.append(analysis.temp_size_in_bytes)
    return (found[1] - found[0]) / (DEPTHS[1] - DEPTHS[0]) / (shape[0] * width * x.dtype.itemsize)


def stacks(dtypes: list[str], shape: tuple[int, int] = (4096, 256), tell: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    rows = []
    for dtype in dtypes:
        for name, norm in blocks().items():
            forms = ["native", "xla"] if ours.has_native() and "jnorm" in name else ["xla"]
            for form in forms:
                tell(f"stack: {name}, {dtype}")
                label = f"{name}, {form}" if "jnorm" in name else name
                temp = marginal_temp(norm, form, dtype, shape)
                rows.append({"block": label, "dtype": dtype, "shape": list(shape), "marginal_temp": temp})
    return rows
