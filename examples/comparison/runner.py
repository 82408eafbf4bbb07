"""Runs the jobs of the parts, several processes at once, and keeps each record on disk: what was done once is not done again."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax

import jnorm
from comparison.data import Task, load_task
from comparison.part import Job, Part, Record, Records, Setup


def load_record(path: Path, setup: Setup, job: Job) -> Record | None:
    """What an earlier run of the same job found, if it was of the same setup."""
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    made_with = _made_with(setup, job)
    return stored["record"] if {name: stored.get(name) for name in made_with} == made_with else None


def save_record(path: Path, setup: Setup, job: Job, record: Record, seconds: float) -> None:
    stored = _made_with(setup, job) | {"seconds": round(seconds, 1), "record": record}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # so that an interrupted run leaves no half of a record
    partial.write_text(json.dumps(stored, indent=1))
    partial.replace(path)


def _made_with(setup: Setup, job: Job) -> dict[str, Any]:
    """What a record depends on: with another of these, or after a change of the code, it is made again."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    versions = {"jax": jax.__version__, "jnorm": jnorm.__version__, "code": hashlib.sha256(code).hexdigest()}
    return {"setup": _plain(setup), "options": _plain(job.options), **versions}


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))  # type: ignore[arg-type]


def run_parts(parts: Sequence[Part], setup: Setup, folder: Path, workers: int, report: Callable[[Part], None]) -> dict[int, Records]:
    """The records of all jobs, in their order, by the parts' numbers. `report` is called for each as it is there."""
    jobs = [(part, job) for part in parts for job in part.jobs(setup)]
    found = {(part.number, job.name): load_record(_path(folder, part, job), setup, job) for part, job in jobs}

    def missing(part: Part, job: Job) -> bool:
        return found[part.number, job.name] is None

    for part, job in jobs:
        if not missing(part, job):
            report(part)
    for part, job, record, seconds in _executed([one for one in jobs if missing(*one)], setup, workers):
        save_record(_path(folder, part, job), setup, job, record, seconds)
        found[part.number, job.name] = record
        report(part)
    return {part.number: {job.name: found[part.number, job.name] or {} for job in part.jobs(setup)} for part in parts}


def _path(folder: Path, part: Part, job: Job) -> Path:
    return folder / f"{part.number}-{job.name}.json"


def _executed(jobs: list[tuple[Part, Job]], setup: Setup, workers: int) -> Iterator[tuple[Part, Job, Record, float]]:
    if jobs:
        _start(setup)  # here too: data that cannot be read is found out before any process is started
    if workers == 1 or len(jobs) < 2:
        for part, job in jobs:
            yield part, job, *_execute(part.run, setup, job)
        return
    # Most of a job is compilation, which uses one core; so processes, not threads, and new ones, since JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for i in range(workers):
        cores.put(i)
    with ProcessPoolExecutor(workers, context, _start_worker, (setup, cores)) as pool:
        futures = {pool.submit(_execute_or_describe, part.run, setup, job): (part, job) for part, job in jobs}
        try:
            for future in as_completed(futures):
                (part, job), outcome = futures[future], future.result()
                if isinstance(outcome, str):
                    raise RuntimeError(f"job {job.name} of part {part.number} failed:\n{outcome}")
                yield part, job, *outcome
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or when interrupted


_task: dict[Setup, Task] = {}  # of this process


def _start(setup: Setup) -> None:
    _task[setup] = _task.get(setup) or load_task(setup.data_dir, setup.sizes)


def _start_worker(setup: Setup, cores: Any) -> None:
    """With a core of its own, where the system knows of such: XLA's threads would only be in each other's way."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {available[core % len(available)]})
    _start(setup)


def _execute(run: Callable[[Setup, Task, dict[str, Any]], Record], setup: Setup, job: Job) -> tuple[Record, float]:
    start = time.perf_counter()
    return run(setup, _task[setup], job.options), time.perf_counter() - start


def _execute_or_describe(run: Callable[[Setup, Task, dict[str, Any]], Record], setup: Setup, job: Job) -> tuple[Record, float] | str:
    """Of an error its text: some of JAX's cannot be sent to another process."""
    try:
        return _execute(run, setup, job)
    except Exception:
        return traceback.format_exc()
