"""Part 3: a network of sigmoids with and without batch normalization: how fast it learns, and what reaches its layers meanwhile."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparison.data import Task, shuffled
from comparison.methods import METHODS, Method, Phase, Settings
from comparison.networks import mlp
from comparison.part import Grid, Job, Part, Record, Records, Setup, mean_and_interval, percent, with_interval
from comparison.style import figure, look
from comparison.training import Plan, Probe, cross_entropy, errors, running_momentum, trainer, tuned_runs

BATCH_SIZE = 64
LONGER = 4  # times as many epochs as the other parts: a small network that learns slowly
PERCENTILES = (15, 50, 85)
SATURATED = 0.02  # so near 0 or 1 a sigmoid passes on less than a twelfth of the gradient that it passes in its middle
UNITS = 10  # of the last hidden layer, whose inputs are looked at: the first ones
ACCURACIES = (0.8, 0.9, 0.95)
FIRST, LAST = 0, 2  # of the hidden layers


def jobs(setup: Setup) -> list[Job]:
    return [Job(method, {"method": method}) for method in ("none", "batch_norm")]


def run(setup: Setup, task: Task, options: dict[str, Any]) -> Record:
    method, settings = METHODS[options["method"]], Settings(BATCH_SIZE, momentum=running_momentum(BATCH_SIZE), activation=jax.nn.sigmoid)
    # A sigmoid passes its inputs on around 0; the larger weights that are right for a relu would only saturate it.
    network = mlp(method, settings, initializer=jax.nn.initializers.lecun_normal())
    epochs = LONGER * setup.epochs
    plan = Plan(partial(shuffled, epochs=epochs, batch_size=BATCH_SIZE), probes=epochs, at_start=True)
    base, inside = errors(network, task), _inside(network, method, settings, task)
    train = trainer(network, task, plan, lambda params, state: {**base(params, state), **inside(params, state)})
    runs, record = tuned_runs(train, setup.seeds, setup.learning_rates)
    low, median, high = np.moveaxis(runs.probed["percentiles"], 2, 0)  # each (runs, probes, units)
    return record | {
        "updates": np.linspace(0, runs.losses.shape[1], epochs + 1).round().tolist(),
        "test_errors": runs.probed["test_error"].tolist(),
        "gradients": runs.probed["gradients"].tolist(),  # (runs, probes, layers), the last that of the layer that gives the logits
        "saturated": runs.last("saturated").tolist(),
        "unit": runs.probed["percentiles"][0, :, :, 0].tolist(),  # of the first run, the first unit: no better or worse than others
        "spread_at_start": (high - low)[:, 0].mean(-1).tolist(),
        "spread_at_end": (high - low)[:, -1].mean(-1).tolist(),
        "range_of_median": np.ptp(median, axis=1).mean(-1).tolist(),
    }


def _inside(network: Any, method: Method, settings: Settings, task: Task) -> Probe:
    """Of the training images, as one batch in training mode: gradients, and what the sigmoids of the last hidden layer are given."""
    images, labels = jnp.asarray(task.train.images), jnp.asarray(task.train.labels)
    phase = Phase(jnp.float32(1), jax.random.key(0))
    without_activation = dataclasses.replace(settings, activation=None)

    def probe(params: Any, state: Any) -> dict[str, jax.Array]:
        grads = jax.grad(lambda params: cross_entropy(network.apply(params, state, images, phase)[0], labels))(params)
        *before, last = zip(params["layers"], state, strict=True)
        x = images.reshape(len(images), -1)
        for layer, layer_state in before:
            x, _ = method.apply(settings, layer, layer_state, x, jnp.matmul, phase)
        x, _ = method.apply(without_activation, *last, x, jnp.matmul, phase)
        return {
            "gradients": jnp.stack([jnp.linalg.norm(layer["kernel"]) for layer in (*grads["layers"], grads["head"])]),
            "percentiles": jnp.percentile(x[:, :UNITS], jnp.array(PERCENTILES), axis=0),
            "saturated": (jnp.abs(jax.nn.sigmoid(x) - 0.5) > 0.5 - SATURATED).mean(),
        }

    return probe


def grids(records: Records) -> list[Grid]:
    every = next(iter(records.values()))["updates"][1]
    learning = [
        [
            METHODS[method].label,
            percent(record["test_error"]),
            *(_updates_to(record, accuracy) for accuracy in ACCURACIES),
            f"{record['learning_rate']:.2g}",
        ]
        for method, record in records.items()
    ]
    headings = ["", "test error in %", *(f"updates to {100 * a:.0f} %" for a in ACCURACIES), "learning rate"]
    inside = [
        [METHODS[method].label, *map(with_interval, (*_ratios(record), *(record[name] for name in INSIDE))), percent(record["saturated"])]
        for method, record in records.items()
    ]
    heading = "Inside: norm of the first hidden layer's gradient over that of the third's; inputs of the third's sigmoids (15th to 85th "
    heading += "percentile, and the range of the median over training; means over units); share of saturated sigmoids"
    columns = ["gradient ratio, start", "end", "percentiles, start", "end", "median's range", "saturated, %"]
    return [
        Grid(f"Learning: updates until an accuracy on the test images, measured every {every:.0f}", headings, learning),
        Grid(heading, ["", *columns], inside),
    ]


INSIDE = ("spread_at_start", "spread_at_end", "range_of_median")


def _updates_to(record: Record, accuracy: float) -> str:
    """A seed that never gets there has no number; then it is said how many do."""
    there = np.less_equal(record["test_errors"], 1 - accuracy)
    arrived = np.any(there, axis=1)
    if not arrived.all():
        return f"{np.sum(arrived)} of {arrived.size} seeds"
    return with_interval(np.array(record["updates"])[np.argmax(there, axis=1)], 0)


def _ratios(record: Record) -> tuple[np.ndarray, np.ndarray]:
    gradients = np.array(record["gradients"])
    ratios = gradients[:, :, FIRST] / gradients[:, :, LAST]
    return ratios[:, 0], ratios[:, -1]


def draw(records: Records) -> Figure:
    def panels(axes: Any, made: Figure) -> None:
        error, gradients, unit = axes
        updates = next(iter(records.values()))["updates"]
        for method, record in records.items():
            label, color = METHODS[method].label, look(method)["color"]
            _band(error, updates, 100 * np.array(record["test_errors"]), color=color, label=label)
            for layer, name, line in ((FIRST, "first", "-"), (LAST, "third", "--")):
                norms = np.array(record["gradients"])[:, :, layer]
                _band(gradients, updates, norms, color=color, linestyle=line, label=f"{label}, {name} layer")
            low, median, high = np.array(record["unit"]).T
            unit.fill_between(updates, low, high, color=color, alpha=0.2, linewidth=0)
            unit.plot(updates, median, color=color, label=label)
        error.set(yscale="log", ylabel="test error in %", title="Test error")
        error.set_yticks([3, 5, 10, 20, 50, 90], ["3", "5", "10", "20", "50", "90"])
        error.minorticks_off()
        gradients.set(
            yscale="log", ylabel="Euclidean norm of the weights' gradient", title="Gradients of the first and the third hidden layer"
        )
        unit.set(ylabel="input of the sigmoid", title="One unit of the third hidden layer:\n15th, 50th and 85th percentile over the images")
        for axis in axes:
            # What differs happens early; and 0 is shown too, where the first measurement is.
            axis.set_xscale("symlog", linthresh=updates[1])
            ticks = [tick for tick in (0, 10, 30, 100, 300, 1000, 3000) if tick <= updates[-1]]
            axis.set_xticks(ticks, map(str, ticks))
            axis.set_xlim(0, updates[-1])
            axis.set_xlabel("updates")
            axis.legend(fontsize=8)

    return figure(3, panels)


def _band(axis: Axes, x: Any, values: np.ndarray, color: str, **options: Any) -> None:
    """The geometric mean over seeds, for an axis in logarithms, and its 95 % interval."""
    mean, half = np.array([mean_and_interval(v) for v in np.log(np.maximum(values, 1e-12)).T]).T
    axis.fill_between(x, np.exp(mean - half), np.exp(mean + half), color=color, alpha=0.2, linewidth=0)
    axis.plot(x, np.exp(mean), color=color, **options)


VANISHING = Part(3, "vanishing", "A sigmoid network with and without batch normalization", jobs, run, grids, draw)
