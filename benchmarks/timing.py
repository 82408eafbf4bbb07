"""Interleaved rounds, and what may be said about two columns of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from . import machine

STEAL_LIMIT = 0.05
# A sample of a short call is many calls; one of a long call is one.
SAMPLE_SECONDS = 4e-3
MOST_CALLS = 200
WARM_BELOW = 20e-3

# Runs it `calls` times, waiting for each, after `warm` calls that are not timed -> seconds of one call.
Timed = Callable[[int, int], float]


def timed(call: Callable[[], object], wait: Callable[[object], object]) -> Timed:
    def run(calls: int, warm: int) -> float:
        for _ in range(warm):
            wait(call())
        start = time.perf_counter()
        for _ in range(calls):
            wait(call())
        return (time.perf_counter() - start) / calls

    return run


def calls_for(seconds: float, sample_seconds: float = SAMPLE_SECONDS) -> int:
    return max(1, min(MOST_CALLS, math.ceil(sample_seconds / max(seconds, 1e-9))))


def estimate(run: Timed, tries: int = 3) -> float:
    """The least of a few samples, after a call that compiles or warms what is left to."""
    first = run(1, 1)
    return min([first, *(run(calls_for(first), 0) for _ in range(tries - 1))])


def interleave(variants: Mapping[str, Timed], rounds: int, estimates: Mapping[str, float]) -> tuple[dict[str, list[float]], int]:
    """-> ({name: seconds of every round that counts}, rounds dropped). One sample of every variant is a round; each round begins with
    another variant. A round in which the hypervisor took more than 5 % of the processor is dropped, and up to as many are added."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    kept = dropped = 0
    while kept < rounds and dropped < rounds:
        before = machine.steal()
        turn = (kept + dropped) % max(len(names), 1)
        found = {}
        for name in names[turn:] + names[:turn]:
            found[name] = variants[name](calls_for(estimates[name]), int(estimates[name] < WARM_BELOW))
        if stolen(before, machine.steal()) > STEAL_LIMIT:
            dropped += 1
            continue
        kept += 1
        for name, seconds in found.items():
            times[name].append(seconds)
    if not kept:
        raise RuntimeError(f"the hypervisor took more than {STEAL_LIMIT:.0%} of the processor in every round: measure at another time")
    return times, dropped


def stolen(before: tuple[int, int], after: tuple[int, int]) -> float:
    """The share of the time between two readings of `machine.steal`. Below a quarter of a second one tick would be too large a share."""
    ticks = after[1] - before[1]
    return (after[0] - before[0]) / max(ticks, 50)


def bootstrap_ratio(a: Sequence[float], b: Sequence[float], samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """median(a) / median(b) and its 95 % interval, by drawing whole rounds, so that what disturbed a round disturbs both."""
    one, two = np.asarray(a, float), np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(one), (samples, len(one)))
    ratios = np.median(one[drawn], 1) / np.median(two[drawn], 1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(one) / np.median(two)), float(low), float(high)


def compare(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The ratio of the medians with its interval, and that of the minima."""
    ratio, low, high = bootstrap_ratio(a, b)
    return {"ratio": ratio, "low": low, "high": high, "minima": min(a) / min(b)}


def summary(times: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "rounds": len(times)}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))
