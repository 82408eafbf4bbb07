"""Runs the jobs of a part, several processes at once, and keeps each record on disk: what was done once is not done again."""

import dataclasses
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax

from comparison.data import Task, load_task
from comparison.part import Job, Part, Record, Records, Setup


def load_record(path: Path, setup: Setup, job: Job) -> Record | None:
    """What an earlier run of the same job found, if it was of the same setup."""
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return stored["record"] if (stored["setup"], stored["options"]) == (_plain(setup), _plain(job.options)) else None


def save_record(path: Path, setup: Setup, job: Job, record: Record, seconds: float) -> None:
    stored: Record = {"setup": _plain(setup), "options": _plain(job.options), "seconds": round(seconds, 1), "jax": jax.__version__}
    stored["record"] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # so that an interrupted run leaves no half of a record
    partial.write_text(json.dumps(stored, indent=1))
    partial.replace(path)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))  # type: ignore[arg-type]


def run_jobs(part: Part, setup: Setup, folder: Path, workers: int, report: Callable[[str], None]) -> Records:
    """The records of all jobs of a part, in their order. `report` is called with the name of each as it is there."""
    jobs = {job.name: job for job in part.jobs(setup)}
    paths = {name: folder / f"{part.number}-{name}.json" for name in jobs}
    found = {name: load_record(paths[name], setup, job) for name, job in jobs.items()}
    for name, record in found.items():
        if record is not None:
            report(name)
    missing = [jobs[name] for name, record in found.items() if record is None]
    for job, record, seconds in _executed(part, setup, missing, workers):
        save_record(paths[job.name], setup, job, record, seconds)
        found[job.name] = record
        report(job.name)
    return {name: record for name, record in found.items() if record is not None}


def _executed(part: Part, setup: Setup, jobs: list[Job], workers: int) -> Iterator[tuple[Job, Record, float]]:
    if workers == 1 or len(jobs) < 2:
        _start(setup)
        for job in jobs:
            yield job, *_execute(part.run, setup, job)
        return
    # Most of a job is compilation, which uses one core; so processes, not threads, and new ones, since JAX's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (setup,)) as pool:
        futures = {pool.submit(_execute_or_describe, part.run, setup, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                outcome = future.result()
                if isinstance(outcome, str):
                    raise RuntimeError(f"job {futures[future].name} failed:\n{outcome}")
                yield futures[future], *outcome
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or when interrupted


_task: dict[Setup, Task] = {}  # of this process


def _start(setup: Setup) -> None:
    _task[setup] = _task.get(setup) or load_task(setup.data_dir, setup.sizes)


def _execute(run: Callable[[Setup, Task, dict[str, Any]], Record], setup: Setup, job: Job) -> tuple[Record, float]:
    start = time.perf_counter()
    return run(setup, _task[setup], job.options), time.perf_counter() - start


def _execute_or_describe(run: Callable[[Setup, Task, dict[str, Any]], Record], setup: Setup, job: Job) -> tuple[Record, float] | str:
    """Of an error its text: some of JAX's cannot be sent to another process."""
    try:
        return _execute(run, setup, job)
    except Exception:
        return traceback.format_exc()
