"""The bandwidth of a copy, by the best of several ways, on all cores. A copy of n bytes moves 2n."""

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from . import machine
from .timing import Timed, estimate, interleave, timed

DRAM_CACHES = 8  # so many last-level caches are certainly not in one


def xla_copy(n: int) -> Callable[[], object]:
    """A negation: a program that is certain to read and write every byte, on all threads."""
    x = jnp.ones(max(n // 4, 1), jnp.float32)
    f = jax.jit(jnp.negative).lower(x).compile()
    return lambda: f(x)


def threaded_copy(n: int, pool: ThreadPoolExecutor, threads: int) -> Callable[[], object]:
    """NumPy's copy, which lets the interpreter go, of one piece a thread, into memory that is there already."""
    source, target = np.ones(max(n // 4, 1), np.float32), np.zeros(max(n // 4, 1), np.float32)
    pieces = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    return lambda: [f.result() for f in [pool.submit(np.copyto, t, s) for s, t in pieces]]


def ways(n: int) -> dict[str, Timed]:
    """Copies of n bytes, ready to be timed between other things."""
    found = {"copy, xla": timed(xla_copy(n), jax.block_until_ready)}
    if jax.devices()[0].platform == "cpu":
        pool = ThreadPoolExecutor(machine.cores())
        found["copy, numpy threads"] = timed(threaded_copy(n, pool, machine.cores()), lambda done: done)
    return found


def of_memory(cache: int, rounds: int = 7) -> dict[str, float]:
    """{way: bytes per second, "best": the most} for an array that no cache holds."""
    n = DRAM_CACHES * cache
    copies = ways(n)
    times, _ = interleave(copies, rounds, {k: estimate(v, 1) for k, v in copies.items()})
    found = {k: 2 * n / statistics.median(t) for k, t in times.items()}
    return found | {"best": max(found.values())}
