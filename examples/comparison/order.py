"""Part 5: the norm before the activation or after it, with and without dropout, and what dropout does to running statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jnorm
from comparison.data import Task, shuffled
from comparison.methods import Phase
from comparison.networks import Network, convolve, he_normal, head, init_head, pool
from comparison.part import Grid, Job, Part, Record, Records, Setup, mean_and_interval, percent, with_interval
from comparison.style import figure
from comparison.training import Plan, Probe, errors, reestimated, running_momentum, trainer, tuned_runs

BATCH_SIZE = 32
WIDTHS = (16, 32, 32)
RATE = 0.5  # of dropout
ORDERS = {"before": "conv, BN, relu", "after": "conv, relu, BN"}
DROPOUTS = {"none": (), "last": (2,), "every": (0, 1, 2)}  # the layers after which there is dropout
LABELS = {"none": "no layer", "last": "the last layer", "every": "every layer"}

# (params, state, images, phase) -> the output of the last layer, the new state, and the variances of what each norm is given
Layers = Callable[[Any, Any, jax.Array, Phase | None], tuple[jax.Array, Any, list[jax.Array]]]


def jobs(setup: Setup) -> list[Job]:
    dropouts = ("every",) if setup.quick else DROPOUTS
    return [Job(f"{order}-{dropout}", {"order": order, "dropout": dropout}) for order in ORDERS for dropout in dropouts]


def run(setup: Setup, task: Task, options: dict[str, Any]) -> Record:
    layers = partial(_layers, options["order"], DROPOUTS[options["dropout"]])
    network = _network(layers)
    plan = Plan(partial(shuffled, epochs=setup.epochs, batch_size=BATCH_SIZE))
    probe = _probe(network, layers, partial(_layers, options["order"], ()), task)
    runs, record = tuned_runs(trainer(network, task, plan, probe), setup.seeds, setup.learning_rates)
    return record | {name: runs.last(name).tolist() for name in ("reestimated_test_error", "variance_ratios")}


def _layers(order: str, dropped: tuple[int, ...], params: Any, state: Any, x: jax.Array, phase: Phase | None) -> Any:
    new_state, variances = [], []
    for i, (layer, layer_state) in enumerate(zip(params, state, strict=True)):
        x = convolve(pool(x) if i else x, layer["kernel"])
        if order == "after":
            x = jax.nn.relu(x + layer["offset"])
        variances.append(x.var((0, 1, 2)))
        x, layer_state = jnorm.batch_norm(
            x,
            layer_state,
            layer["scale"],
            layer["bias"],
            use_running_average=phase is None,
            momentum=running_momentum(BATCH_SIZE),
            running_var_correction=1,
            activation="relu" if order == "before" else None,
        )
        if phase is not None and i in dropped:
            kept = jax.random.bernoulli(jax.random.fold_in(phase.key, i), 1 - RATE, x.shape)
            x = jnp.where(kept, x / (1 - RATE), 0)
        new_state.append(layer_state)
    return x, new_state, variances


def _network(layers: Layers) -> Network:
    def init(key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
        *keys, head_key = jax.random.split(key, len(WIDTHS) + 1)
        made, inputs = [], images.shape[-1]
        for layer_key, width in zip(keys, WIDTHS, strict=True):
            kernel, zeros = he_normal(layer_key, (3, 3, inputs, width)), jnp.zeros(width)
            made.append({"kernel": kernel, "scale": jnp.ones(width), "bias": zeros, "offset": zeros})  # the offset only before a relu
            inputs = width
        state = [jnorm.batch_norm_state(width, track_count=True) for width in WIDTHS]
        outputs = jax.eval_shape(lambda: layers(made, state, images[:1], None)[0])
        return {"layers": made, "head": init_head(head_key, outputs.size)}, state

    def apply(params: Any, state: Any, x: jax.Array, phase: Phase | None) -> tuple[jax.Array, Any]:
        x, state, _ = layers(params["layers"], state, x, phase)
        return head(params["head"], x), state

    return Network(init, apply)


def _probe(network: Network, layers: Layers, without_dropout: Layers, task: Task) -> Probe:
    """Also after re-estimation, and by how much the running variances are larger than those of the same inputs in evaluation."""
    base, images = errors(network, task), jnp.asarray(task.train.images)
    batches = images[: len(images) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE, *images.shape[1:])
    training = Phase(jnp.float32(1), jax.random.key(0))

    def probe(params: Any, state: Any) -> dict[str, jax.Array]:
        anew = reestimated(lambda state, batch: without_dropout(params["layers"], state, batch, training)[1], state, batches)
        both = jax.tree.map(lambda *states: jnp.stack(states), state, anew)
        found = jax.vmap(base, (None, 0))(params, both)  # of both in one: the network is compiled once
        _, _, variances = layers(params["layers"], state, images, None)
        # A relu before the norm may leave a channel with nothing but zeros, of which there is no ratio.
        ratios = [jnp.where(var > 1e-6, one["var"] / jnp.maximum(var, 1e-6), jnp.nan) for one, var in zip(state, variances, strict=True)]
        return {
            **{name: values[0] for name, values in found.items()},
            "reestimated_test_error": found["test_error"][1],
            "variance_ratios": jnp.stack([jnp.nanmean(ratio) for ratio in ratios]),
        }

    return probe


def _name(job: str) -> tuple[str, str]:
    order, dropout = job.split("-")
    return ORDERS[order], LABELS[dropout]


def _together(job: str, between: str = ", ") -> str:
    order, dropout = _name(job)
    return f"{order}{between}{'no dropout' if job.endswith('none') else f'dropout after {dropout}'}"


def grids(records: Records) -> list[Grid]:
    def row(job: str, record: Record) -> list[str]:
        change = np.subtract(record["reestimated_test_error"], record["test_error"])
        errors = [percent(record["test_error"]), percent(record["reestimated_test_error"]), percent(change)]
        return [*_name(job), *errors, f"{record['learning_rate']:.2g}"]

    def ratios(job: str, record: Record) -> list[str]:
        return [*_name(job), *(with_interval(ratio, 3) for ratio in np.transpose(record["variance_ratios"]))]

    return [
        Grid(
            "Test error in % with running statistics and with statistics re-estimated without dropout",
            ["order", "dropout after", "running", "re-estimated", "change", "learning rate"],
            [row(*item) for item in records.items()],
        ),
        Grid(
            "Running variance over the variance of the same inputs in evaluation, mean over channels",
            ["order", "dropout after", *(f"layer {i + 1}" for i in range(len(WIDTHS)))],
            [ratios(*item) for item in records.items()],
        ),
    ]


def draw(records: Records) -> Figure:
    colors = {"none": "#7f7f7f", "last": "#1f6fb4", "every": "#d1602b"}
    statistics = (("test_error", -0.12, "o", "black"), ("reestimated_test_error", 0.12, "D", "white"))
    x = np.arange(len(WIDTHS)) + 1

    def panels(axes: Any, made: Figure) -> None:
        error, ratio = axes
        for y, (job, record) in enumerate(records.items()):
            order, dropout = job.split("-")
            color = colors[dropout]
            for name, shift, mark, face in statistics:
                mean, half = mean_and_interval(record[name])
                face = color if face == "black" else face
                error.errorbar(100 * mean, y + shift, xerr=100 * half, color=color, marker=mark, markerfacecolor=face, capsize=3)
            mean, half = np.array([mean_and_interval(r) for r in np.transpose(record["variance_ratios"])]).T
            line, mark = ("-", "o") if order == "before" else ("--", "s")
            shown: Any = {"color": color, "linestyle": line, "marker": mark, "markersize": 5, "capsize": 3, "label": _together(job)}
            # Side by side where they would cover one another.
            ratio.errorbar(x + 0.02 * (y - len(records) / 2), mean, half, **shown)
        for (_, _, mark, face), label in zip(statistics, ("running statistics", "re-estimated without dropout"), strict=True):
            error.plot([], [], mark, color="black", markerfacecolor=face, label=label)
        error.set_yticks(range(len(records)), [_together(job, "\n") for job in records])
        error.invert_yaxis()
        error.set(xlabel="test error in %, mean and 95 % interval", title="Test error")
        ratio.set(xlabel="layer", ylabel="running variance / variance in evaluation", title="What dropout does to the running variance")
        ratio.set_xticks(x)
        error.legend(fontsize=8)
        low, high = ratio.get_ylim()
        ratio.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
        ratio.legend(fontsize=8, handlelength=4, loc="upper left")

    return figure(2, panels, width=6.4)


ORDER = Part(5, "order", "The norm before or after the activation, with and without dropout", jobs, run, grids, draw)
