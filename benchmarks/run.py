"""One run, under one allocator: everything that was asked for, as JSON."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import bandwidth, cases, collectives, machine, measure, networks, peers
from .options import Request
from .peers import ours
from .peers.torch_process import TorchProcess


@contextlib.contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(say what is going on, count one as done), as a bar in a terminal and as lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        started = time.perf_counter()
        last = [""]

        def done() -> None:
            print(f"{time.perf_counter() - started:6.0f} s  {last[0]}", file=sys.stderr, flush=True)

        yield lambda text: last.__setitem__(0, text), done
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


def run(request: Request) -> dict[str, Any]:
    """The JSON of one run. `failures`: where jnorm differs from float64."""
    platform = jax.devices()[0].platform
    cache = machine.last_level_cache(platform)
    wanted = cases.select(cases.every_case(request.suite, platform, cache), request.norms, request.ops, request.shape, request.dtypes)
    wanted = wanted if "cases" in request.only else []
    jobs = network_jobs(request) if "networks" in request.only else []
    names = peers.chosen(request.peers)
    found: dict[str, Any] = {
        "machine": machine.describe(jax.devices()),
        "kernels": ours.status(),
        "missing": peers.missing(names),
        "peers": [n for n in names if n not in peers.missing(names)],
        "rounds": request.rounds,
        "rows": [],
        "networks": [],
        "failures": [],
    }
    with progress(len(wanted) + len(jobs) + len({"stacks", "collectives"} & set(request.only))) as (tell, done):
        if wanted:
            tell("bandwidth of a copy")
            found |= run_cases(request, wanted, found["peers"], platform, cache, found["failures"], tell, done)
        for network, dtype in jobs:
            found["networks"].append(networks.measure(network, dtype, request.rounds, tell))
            done()
        if "stacks" in request.only:
            found["stacks"] = networks.stacks(tell=tell)
            done()
        if "collectives" in request.only:
            tell("collectives over 8 devices")
            found["collectives"] = collectives.counted()
            done()
    return found


def network_jobs(request: Request) -> list[tuple[networks.Network, str]]:
    found = [networks.QUICK_BLOCK] if request.suite == "quick" else [networks.CNN, networks.BLOCK]
    dtypes = ["float32"] if request.suite == "quick" else ["float32", "bfloat16"]
    return [(n, d) for n in found for d in dtypes if not request.dtypes or d in request.dtypes]


def run_cases(
    request: Request, wanted: list[cases.Case], names: list[str], platform: str, cache: int, failures: list[str], tell: Any, done: Any
) -> dict[str, Any]:
    memory = bandwidth.of_memory(cache)
    torch = TorchProcess(platform) if any(n in peers.TORCH_PEERS for n in names) else None
    setting = measure.Setting(names, request.rounds, cache, memory["best"], torch, request.all_ways)
    rows = []
    try:
        for case in wanted:
            try:
                rows.append(measure.measure(case, setting, tell))
            except measure.GateFailure as failure:
                failures.append(str(failure))
            done()
    finally:
        if torch is not None:
            torch.close()
    measure.add_ratios(rows)
    after = bandwidth.of_memory(cache)
    return {"rows": rows, "memory_bandwidth": {"before": memory, "after": after}, "torch": torch.about if torch else None}
