"""Time of a training step of every norm, as a ratio to Flax's, in one process.

    python benchmarks/step_time.py [--quick] [--rounds 15] [--only batch_norm,group_norm] [--json FILE]

A step is forward and backward in one jit: y, the new state, and the gradients of x, scale and bias for a given cotangent of y. The variants
are interleaved round by round; printed are medians, the ratio of the medians, and of the minima. The forward pass alone is reported too.
The allocator keeps its memory (the script restarts itself so), since otherwise page faults are what is timed. Before anything is timed,
outputs and gradients of both are checked to agree.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

RETAINED = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in RETAINED.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RETAINED})

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jnorm

SHAPES = [(32, 56, 56, 64), (32, 14, 14, 1024), (4096, 1024)]
QUICK_SHAPES = [(4, 8, 8, 64), (64, 256)]
GROUPS = 32
# XLA form against Flax, per training step.
LIMIT = {("layer_norm", "float32"): 1.15}
DEFAULT_LIMIT = 1.05


def norms(dtype: Any, ndim: int) -> dict[str, tuple[Callable, nn.Module]]:
    """Ours as (x, scale, bias) -> (y, state) and Flax's module, for every norm that has an axis to reduce."""
    state = jnorm.batch_norm_state
    found: dict[str, tuple[Callable, nn.Module]] = {
        "batch_norm": (lambda x, s, b: jnorm.batch_norm(x, state(x.shape[-1]), s, b), nn.BatchNorm(use_running_average=False, dtype=dtype)),
        "layer_norm": (lambda x, s, b: (jnorm.layer_norm(x, s, b), {}), nn.LayerNorm(dtype=dtype)),
        "rms_norm": (lambda x, s, b: (jnorm.rms_norm(x, s), {}), nn.RMSNorm(dtype=dtype)),
        "group_norm": (lambda x, s, b: (jnorm.group_norm(x, s, b, num_groups=GROUPS), {}), nn.GroupNorm(GROUPS, dtype=dtype)),
    }
    if ndim > 2:
        instance = nn.InstanceNorm(dtype=dtype)
        found["instance_norm"] = (lambda x, s, b: (jnorm.instance_norm(x, s, b), {}), instance)
        # Flax has no running form: its instance norm does less work.
        found["tracked_instance_norm"] = (lambda x, s, b: jnorm.tracked_instance_norm(x, state(x.shape[-1]), s, b), instance)
    return found


def step_and_forward(f: Callable) -> tuple[Callable, Callable]:
    def step(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, vjp, state = jax.vjp(f, params, x, has_aux=True)
        return y, state, vjp(dy)

    return jax.jit(step), jax.jit(lambda params, x, dy: f(params, x))


def variants(ours: Callable, module: nn.Module, x: jax.Array) -> dict[str, Callable]:
    variables = module.init(jax.random.key(0), x[:1])
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def flax(params: Any, x: jax.Array) -> Any:
        return module.apply({"params": params, **rest}, x, mutable=list(rest)) if rest else (module.apply({"params": params}, x), {})

    mine = step_and_forward(lambda p, x: ours(x, p["scale"], p.get("bias", jnp.zeros_like(p["scale"]))))
    theirs = step_and_forward(flax)
    found = {"jnorm step": mine[0], "flax step": theirs[0], "jnorm forward": mine[1], "flax forward": theirs[1]}
    return {k: (lambda x, dy, f=f: f(params, x, dy)) for k, f in found.items()}


def check(found: dict[str, Callable], x: jax.Array, dy: jax.Array) -> None:
    """Both must agree before they are compared in time: in units of the rounding of x's dtype."""
    mine, theirs = found["jnorm step"](x, dy), found["flax step"](x, dy)
    eps = float(jnp.finfo(x.dtype).eps)
    for a, b in zip(jax.tree.leaves((mine[0], mine[2])), jax.tree.leaves((theirs[0], theirs[2])), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / np.abs(b).max()
        # A reduction over n elements of a random walk of roundings.
        assert error < 4 * eps + 4 * 2.0**-24 * np.sqrt(x.size), f"results differ by {error}"


def timed(found: dict[str, Callable], x: jax.Array, dy: jax.Array, rounds: int) -> dict[str, list[float]]:
    for f in found.values():
        for _ in range(2):
            jax.block_until_ready(f(x, dy))
    times: dict[str, list[float]] = {k: [] for k in found}
    for _ in range(rounds):
        for k, f in found.items():
            start = time.perf_counter()
            jax.block_until_ready(f(x, dy))
            times[k].append(time.perf_counter() - start)
    return times


def measure(shape: tuple[int, ...], dtype: Any, only: list[str], rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    rows = []
    for name, (ours, module) in norms(dtype, len(shape)).items():
        if only and name not in only:
            continue
        found = variants(ours, module, x)
        check(found, x, dy)
        times = timed(found, x, dy, rounds)
        row: dict[str, Any] = {"norm": name, "shape": list(shape), "dtype": jnp.dtype(dtype).name}
        for what in ("step", "forward"):
            mine, theirs = times[f"jnorm {what}"], times[f"flax {what}"]
            row[f"jnorm {what} ms"], row[f"flax {what} ms"] = (1e3 * statistics.median(t) for t in (mine, theirs))
            row[f"{what} ratio"] = statistics.median(mine) / statistics.median(theirs)
            row[f"{what} ratio of minima"] = min(mine) / min(theirs)
        row["limit"] = LIMIT.get((name, row["dtype"]), DEFAULT_LIMIT)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"jax {jax.__version__}, flax {nn.__name__ and __import__('flax').__version__}, {jax.devices()[0].device_kind}")
    for column in ("norm", "shape", "dtype", "jnorm step ms", "flax step ms", "ratio", "of minima", "limit", "forward ratio"):
        table.add_column(column, justify="left" if column in ("norm", "shape", "dtype") else "right")
    for r in rows:
        mark = "" if r["step ratio"] <= r["limit"] else " !"
        table.add_row(
            r["norm"], "×".join(map(str, r["shape"])), r["dtype"], f"{r['jnorm step ms']:.2f}", f"{r['flax step ms']:.2f}",
            f"{r['step ratio']:.2f}{mark}", f"{r['step ratio of minima']:.2f}", f"{r['limit']:.2f}", f"{r['forward ratio']:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and 3 rounds: checks that it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="norms, separated by commas")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    only = [n for n in args.only.split(",") if n]
    rows = []
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            rows += measure(shape, dtype, only, 3 if args.quick else args.rounds)
    show(rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
