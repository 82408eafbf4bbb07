"""Part 1: the test error of every norm against the size of the batch, in a convolutional network and in a dense one."""

from functools import partial
from typing import Any

from matplotlib.figure import Figure

from comparison.data import Task, shuffled
from comparison.methods import GHOST_SIZE, METHODS, Settings
from comparison.networks import cnn, mlp
from comparison.part import Grid, Job, Part, Record, Records, Setup, tuned_grids
from comparison.style import figure, plain_ticks, plot_interval
from comparison.training import Plan, errors, running_momentum, trainer, tuned_runs

BATCH_SIZES = (32, 16, 8, 4, 2)
LARGEST = BATCH_SIZES[0]
ACCUMULATED = ("cross_mini_batch_norm", "accumulated_batch_norm")  # an update for each 32 images, whatever the mini-batch
WITH_POSITIONS = ("instance_norm",)  # reduces over nothing else
NETWORKS = {"cnn": "convolutional network", "mlp": "dense network"}


def jobs(setup: Setup) -> list[Job]:
    return [
        Job(f"{network}-{method}-{size}", {"network": network, "method": method, "batch_size": size})
        for network in NETWORKS
        for size in ((8,) if setup.quick else BATCH_SIZES)
        for method in METHODS
        if method != "normalization_propagation" and not (network == "mlp" and method in WITH_POSITIONS)
        if not setup.quick or (network, method) in QUICK
        if not _is_batch_norm(method, size)
    ]


def _is_batch_norm(method: str, size: int) -> bool:
    """One mini-batch an update, or one group a batch: another name for the same training."""
    return (method in ACCUMULATED and size == LARGEST) or (method == "ghost_batch_norm" and size <= GHOST_SIZE)


QUICK = [("cnn", "batch_norm"), ("cnn", "cross_iteration_batch_norm"), ("cnn", "cross_mini_batch_norm"), ("mlp", "filter_response_norm")]


def run(setup: Setup, task: Task, options: dict[str, Any]) -> Record:
    size = options["batch_size"]
    num_mini_batches = LARGEST // size if options["method"] in ACCUMULATED else 1
    build = cnn if options["network"] == "cnn" else mlp
    network = build(METHODS[options["method"]], Settings(size, num_mini_batches, running_momentum(size)))
    plan = Plan(partial(shuffled, epochs=setup.epochs, batch_size=size), num_mini_batches)
    # Smaller updates are more, and want a smaller learning rate: the grid starts in proportion to the root of their size.
    grid = [rate * (size * num_mini_batches / LARGEST) ** 0.5 for rate in setup.learning_rates]
    runs, record = tuned_runs(trainer(network, task, plan, errors(network, task)), setup.seeds, grid)
    return record | {name: runs.last(name).tolist() for name in ("train_error", "train_loss")}


def _get(records: Records, network: str, method: str, size: int) -> Record | None:
    return records.get(f"{network}-{method}-{size}")


def grids(records: Records) -> list[Grid]:
    labels = {method: METHODS[method].label for method in METHODS}
    headings = ("test error in %", "loss on the training images, in evaluation, times 1000", "the learning rate that was chosen")
    made = []
    for network, what in NETWORKS.items():
        titles = [f"{what}: {heading}, by batch size" for heading in headings]
        made += tuned_grids(titles, labels, BATCH_SIZES, partial(_get, records, network))
    return made


def draw(records: Records) -> Figure:
    def panels(axes: Any, made: Figure) -> None:
        for panel, (network, what) in zip(axes, NETWORKS.items(), strict=True):
            for k, method in enumerate(METHODS):
                found = [(size, record) for size in BATCH_SIZES if (record := _get(records, network, method, size))]
                if found:
                    # Side by side where they would cover one another.
                    x = [size * 1.02 ** (k - len(METHODS) / 2) for size, _ in found]
                    plot_interval(panel, x, [[100 * e for e in record["test_error"]] for _, record in found], method)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            plain_ticks(panel.yaxis)
            panel.invert_xaxis()
            panel.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
            panel.set_xlabel("images in a batch")
            panel.set_ylabel("test error in %, mean and 95 % interval")
            panel.set_title(what)
        axes[0].set_yscale("linear")  # there all are near one another
        handles, labels = axes[0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside right center", fontsize=9)

    return figure(2, panels, height=5.4, width=6.4)


SMALL_BATCHES = Part(1, "small_batches", "Test error against batch size", jobs, run, grids, draw)
