"""One run, under one allocator: everything that was asked for, as JSON."""

import contextlib
import sys
import time
import traceback
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


def run(request: Request, save: Callable[[dict[str, Any]], object]) -> None:
    """`save` gets the run after every part of it, so that a long one that is cut off leaves what it measured. Its `failures` say where
    jnorm is wrong, or fails."""
    platform = jax.devices()[0].platform
    cache = machine.last_level_cache(platform)
    suite = cases.every_case(request.suite, platform, cache)
    wanted = cases.select(suite, request.norms, request.ops, request.shape, request.dtypes) if "cases" in request.only else []
    jobs = network_jobs(request) if "networks" in request.only else []
    counts = [part for part in ("stacks", "collectives") if part in request.only]
    found = start(request)
    with progress(len(wanted) + len(jobs) + len(counts)) as (tell, advance):

        def done() -> None:
            save(found)
            advance()

        if wanted:
            tell("bandwidth of a copy")
            run_cases(request, wanted, cache, found, tell, done)
        for network, dtype in jobs:
            with failing(found, f"{network.name}, {dtype}"):
                found["networks"].append(networks.measure(network, dtype, request.rounds, tell))
            done()
        for part in counts:
            tell(part)
            with failing(found, part):
                found[part] = networks.stacks(dtypes_of(request), tell=tell) if part == "stacks" else collectives.counted()
            done()
    save(found)


def start(request: Request) -> dict[str, Any]:
    """A run in which nothing is measured yet."""
    names = peers.chosen(request.peers)
    missing = peers.missing(names)
    return {
        "machine": machine.describe(jax.devices()),
        "kernels": ours.status(),
        "missing": missing,
        "peers": [n for n in names if n not in missing],
        "rounds": request.rounds,
        "rows": [],
        "networks": [],
        "failures": [],
    }


@contextlib.contextmanager
def failing(found: dict[str, Any], what: str) -> Iterator[None]:
    """What fails here is jnorm's, since that of a peer is caught where it is: it is told at the end, and in the exit status."""
    try:
        yield
    except measure.GateFailure as failure:
        found["failures"].append(str(failure))
    except Exception as error:
        traceback.print_exc()
        found["failures"].append(f"{what}: {type(error).__name__}: {error}")


def network_jobs(request: Request) -> list[tuple[networks.Network, str]]:
    found = [networks.QUICK_BLOCK] if request.suite == "quick" else [networks.CNN, networks.BLOCK]
    return [(network, dtype) for network in found for dtype in dtypes_of(request)]


def dtypes_of(request: Request) -> list[str]:
    """Of the networks."""
    return request.dtypes or (["float32"] if request.suite == "quick" else list(cases.BYTES))


def run_cases(request: Request, wanted: list[cases.Case], cache: int, found: dict[str, Any], tell: Any, done: Any) -> None:
    memory = bandwidth.of_memory(cache)
    found["memory_bandwidth"] = {"before": memory}
    names = found["peers"]
    torch = TorchProcess(found["machine"]["platform"]) if any(n in peers.TORCH_PEERS for n in names) else None
    setting = measure.Setting(names, request.rounds, cache, memory["best"], torch, request.all_ways)
    try:
        for case in wanted:
            with failing(found, case.name):
                found["rows"].append(measure.with_ratios(measure.measure(case, setting, tell)))
            done()
    finally:
        if torch is not None:
            torch.close()
    found["memory_bandwidth"]["after"] = bandwidth.of_memory(cache)
    found["torch"] = torch.about if torch else None
