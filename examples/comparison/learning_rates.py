"""Part 4: which learning rates each norm tolerates, and how many updates it needs to a fixed accuracy."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from matplotlib.figure import Figure

from comparison.data import Task, shuffled
from comparison.methods import METHODS, Settings
from comparison.networks import cnn
from comparison.part import Grid, Job, Part, Record, Records, Setup, geometric, percent, with_interval
from comparison.style import figure, plain_ticks, plot_interval
from comparison.training import TUNING_SEEDS, Plan, errors, running_momentum, trainer

COMPARED = ("none", "batch_norm", "layer_norm", "group_norm")
LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
BATCH_SIZE = 32
EVERY = 4  # updates between two measurements
ACCURACIES = (90, 95)  # of the validation images, in %
LOW = 0.05  # of a mean test error
NEVER = "–"


def jobs(setup: Setup) -> list[Job]:
    rates = LEARNING_RATES[4:9:2] if setup.quick else LEARNING_RATES
    methods = COMPARED[:2] if setup.quick else COMPARED
    return [Job(method, {"method": method, "learning_rates": list(rates)}) for method in methods]


def run(setup: Setup, task: Task, options: dict[str, Any]) -> Record:
    """With a constant learning rate, so that the updates to an accuracy do not depend on how long the training is to go on."""
    network = cnn(METHODS[options["method"]], Settings(BATCH_SIZE, momentum=running_momentum(BATCH_SIZE)))
    epochs = -(-setup.epochs // 2)
    updates = epochs * (len(task.train.labels) // BATCH_SIZE)
    plan = Plan(partial(shuffled, epochs=epochs, batch_size=BATCH_SIZE), probes=updates // math.gcd(updates, EVERY), decay=False)
    train = trainer(network, task, plan, errors(network, task, ("validation",)))
    test = jax.jit(partial(lax.map, lambda trained: errors(network, task, ("test",))(*trained)["test_error"]))
    seeds = (*TUNING_SEEDS, *range(setup.seeds))
    record: Record = {"learning_rates": options["learning_rates"], "tuning": {}}

    def keep(name: str, values: Sequence[Any]) -> None:
        record["tuning"].setdefault(name, []).append(values[: len(TUNING_SEEDS)])
        record.setdefault(name, []).append(values[len(TUNING_SEEDS) :])

    for rate in options["learning_rates"]:
        runs = train([rate] * len(seeds), seeds)
        measured = runs.probed["validation_error"]
        keep("validation_error", measured[:, -1].tolist())
        keep("test_error", test((runs.params, runs.state)).tolist())
        for accuracy in ACCURACIES:
            keep(f"updates_{accuracy}", _updates_to(measured, accuracy, updates // measured.shape[1]))
    return record


def _updates_to(validation_errors: np.ndarray, accuracy: int, every: int) -> list[int | None]:
    """When each run first had that accuracy; None where it never had."""
    reached = validation_errors <= 1 - accuracy / 100 + 1e-6
    return [int(every * (row.argmax() + 1)) if row.any() else None for row in reached]


def _fastest(record: Record, accuracy: int) -> int | None:
    """The number of the learning rate with which the tuning seeds, all of them, had the accuracy soonest."""
    means = [np.nan if None in updates else np.mean(updates) for updates in record["tuning"][f"updates_{accuracy}"]]
    return None if np.isnan(means).all() else int(np.nanargmin(means))


def _low(record: Record) -> list[float]:
    """The learning rates with a low mean test error."""
    return [rate for rate, errors in zip(record["learning_rates"], record["test_error"], strict=True) if np.mean(errors) < LOW]


def _updates(updates: list[int | None]) -> str:
    """The mean over the seeds and its interval, if all reached the accuracy, or how many did."""
    if None in updates:
        reached = len(updates) - updates.count(None)
        return f"{reached} of {len(updates)} seeds" if reached else NEVER
    return with_interval(updates, 0)


def _times_fewer(without: list[int | None], with_norm: list[int | None]) -> str:
    """The geometric mean over the seeds of without / with, and its 95 % interval."""
    if None in without or None in with_norm:
        return NEVER
    return geometric(np.array(without, float) / np.array(with_norm, float), ".2f")


def grids(records: Records) -> list[Grid]:
    made = [
        _by_rate(
            records, "test error at the end in %, by learning rate (90 is chance, a run that diverged counts as 100)", "test_error", percent
        ),
        _by_rate(
            records, f"updates to {ACCURACIES[-1]} % of the validation images, by learning rate", f"updates_{ACCURACIES[-1]}", _updates
        ),
        _range_grid(records),
        _speed_grid(records, "each at its own fastest learning rate", lambda record, reference, accuracy: _fastest(record, accuracy)),
    ]
    if "none" in records:
        title = "all at the fastest learning rate of the network without a norm"
        made.append(_speed_grid(records, title, lambda record, reference, accuracy: _fastest(reference, accuracy)))
    return made


def _by_rate(records: Records, title: str, name: str, show: Any) -> Grid:
    rates = next(iter(records.values()))["learning_rates"]
    rows = [[f"{rate:g}", *(show(record[name][i]) for record in records.values())] for i, rate in enumerate(rates)]
    return Grid(title, ["learning rate", *(METHODS[method].label for method in records)], rows)


def _range_grid(records: Records) -> Grid:
    rows = [[METHODS[method].label, ", ".join(f"{rate:g}" for rate in _low(record)) or NEVER] for method, record in records.items()]
    return Grid("which learning rates train", ["", f"those with a mean test error below {100 * LOW:g} %"], rows)


def _speed_grid(records: Records, which: str, choose: Any) -> Grid:
    reference, rows = records.get("none"), []
    for accuracy in ACCURACIES:
        for method, record in records.items():
            i, name = choose(record, reference, accuracy), f"updates_{accuracy}"
            if i is None:
                rows.append([METHODS[method].label, f"{accuracy} %", *[NEVER] * 3])
                continue
            base = None if reference is None else choose(reference, reference, accuracy)
            fewer = NEVER if method == "none" or reference is None or base is None else _times_fewer(reference[name][base], record[name][i])
            rows.append([METHODS[method].label, f"{accuracy} %", f"{record['learning_rates'][i]:g}", _updates(record[name][i]), fewer])
    headings = ["", "accuracy", "learning rate", "updates", "times fewer than no norm"]
    return Grid(f"updates to an accuracy on the validation images, {which}", headings, rows)


def draw(records: Records) -> Figure:
    accuracy = ACCURACIES[-1]

    def panels(axes: Any, made: Figure) -> None:
        for k, (method, record) in enumerate(records.items()):
            # Side by side where they would cover one another.
            x = np.array(record["learning_rates"]) * 1.05 ** (k - len(records) / 2)
            plot_interval(axes[0], x, 100 * np.array(record["test_error"]), method)
            found = [(rate, updates) for rate, updates in zip(x, record[f"updates_{accuracy}"], strict=True) if None not in updates]
            if found:
                plot_interval(axes[1], [rate for rate, _ in found], [updates for _, updates in found], method)
        for panel in axes:
            panel.set_xscale("log")
            panel.set_yscale("log")
            plain_ticks(panel.yaxis)
            panel.set_xlabel("learning rate (constant)")
        axes[0].set_ylabel("test error at the end in %, mean and 95 % interval")
        axes[1].set_xlim(axes[0].get_xlim())
        axes[1].set_ylabel("updates, mean and 95 % interval")
        axes[1].set_title(f"updates until {accuracy} % of the validation images are right\n(shown where all seeds got there)", fontsize=10)
        axes[0].legend(fontsize=8)

    return figure(2, panels, height=4.8, width=5.6)


TITLE = "Learning rates, and updates to an accuracy"
LEARNING_RATE_TOLERANCE = Part(4, "learning_rates", TITLE, jobs, run, grids, draw)
