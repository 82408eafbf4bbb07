"""The largest errors of jnorm and of Flax against float64 of the same inputs, on inputs that are hard.

    python benchmarks/accuracy.py

Flax runs with its defaults, and again with `use_fast_variance=False`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jnorm


def standardized(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def flax_batch_norm(fast: bool) -> Callable:
    module = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False, momentum=0.0, use_fast_variance=fast)

    def run(x: jax.Array) -> Any:
        y, new = module.apply({"batch_stats": {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}}, x, mutable=["batch_stats"])
        return y, new["batch_stats"]["var"]

    return jax.jit(run)


def flax_rows(kind: type, fast: bool) -> Callable:
    module = kind(use_scale=False, use_fast_variance=fast, **({} if kind is nn.RMSNorm else {"use_bias": False}))
    return jax.jit(lambda x: module.apply({}, x))


def batch_norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, state = jnorm.batch_norm(x, jnorm.batch_norm_state(x.shape[-1]), momentum=0.0)
    return y, state["var"]


def rows(scale: float) -> np.ndarray:
    return (scale + np.arange(16) * 1e-3)[None].repeat(8, 0).astype(np.float32)


def error(got: jax.Array, want: np.ndarray) -> str:
    worst = np.abs(np.asarray(got, np.float64) - want).max()
    return "NaN" if np.isnan(worst) else f"{worst:.1e}"


def batch_norm_errors(x: np.ndarray) -> list[list[str]]:
    want, var = standardized(x, (0,), 1e-5), x.astype(np.float64).var(0)
    results = [f(x) for f in (jax.jit(batch_norm), flax_batch_norm(True), flax_batch_norm(False))]
    return [[error(y, want) for y, _ in results], [error(v / var, np.ones_like(var)) for _, v in results]]


def row_errors(ours: Callable, kind: type, x: np.ndarray, want: np.ndarray) -> list[str]:
    return [error(f(x), want) for f in (jax.jit(ours), flax_rows(kind, True), flax_rows(kind, False))]


def synchronized_mean() -> list[str]:
    """Two devices, of which one counts 1 value and the other 4: the mean of the five is 4.4."""
    x = jnp.array([[[10.0], [0], [0], [0]], [[1], [2], [4], [5]]])
    mask = jnp.array([[[True], [False], [False], [False]], [[True]] * 4])
    state = jnorm.batch_norm_state(1)
    ours = jax.vmap(lambda x, m: jnorm.batch_norm(x, state, mask=m, momentum=0.0, axis_name="i")[1]["mean"], axis_name="i")(x, mask)
    module = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False, momentum=0.0, axis_name="i")
    theirs: Any = jax.vmap(
        lambda x, m: module.apply({"batch_stats": state}, x, mask=m, mutable=["batch_stats"])[1]["batch_stats"]["mean"], axis_name="i"
    )
    return [f"{float(v[0, 0]):.2f}" for v in (ours, theirs(x, mask), theirs(x, mask))]


def empty_mask() -> list[str]:
    """The running mean after a batch of which nothing counts, from 0.5."""
    x, mask = jnp.ones((4, 1)), jnp.zeros((4, 1), bool)
    state = jnorm.batch_norm_state(1)
    state["mean"] = jnp.full(1, 0.5)
    ours = jnorm.batch_norm(x, state, mask=mask)[1]["mean"]
    module = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
    theirs: Any = module.apply({"batch_stats": state}, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]["mean"]
    return [f"{float(v[0]):.2f}" for v in (ours, theirs, theirs)]


def main() -> None:
    rng = np.random.default_rng(0)
    table = Table(title=f"Largest error against float64; jax {jax.__version__}")
    for column in ("", "jnorm", "Flax", "Flax, fast variance off"):
        table.add_column(column, justify="left" if not column else "right")
    far = (rng.normal(size=(4096, 8)) + 1e4).astype(np.float32)
    output, variance = batch_norm_errors(far)
    table.add_row("batch norm of N(0,1) + 1e4: output", *output)
    table.add_row("  variance, relative", *variance)
    for scale in (1e2, 1e3, 1e4):
        x = rows(scale)
        table.add_row(
            f"layer norm of {scale:g} + i·1e-3: output", *row_errors(jnorm.layer_norm, nn.LayerNorm, x, standardized(x, (-1,), 1e-6))
        )
    huge = (1e30 * rng.normal(size=(8, 16))).astype(np.float32)
    table.add_row("layer norm of 1e30·N(0,1): output", *row_errors(jnorm.layer_norm, nn.LayerNorm, huge, standardized(huge, (-1,), 1e-6)))
    wide = huge.astype(np.float64)
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True))
    table.add_row("rms norm of 1e30·N(0,1): output", *row_errors(jnorm.rms_norm, nn.RMSNorm, huge, rms))
    table.add_row("synchronized mean of 1 + 4 counted values, 4.4", *synchronized_mean())
    table.add_row("running mean after an empty mask, 0.5", *empty_mask())
    Console(width=120).print(table)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    main()
