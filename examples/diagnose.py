"""Trains a network whose evaluation is worse than its training, finds out why, and cures it.

python examples/diagnose.py                       # too few steps for the momentum of the running averages
python examples/diagnose.py --cause contrast      # evaluation images that are preprocessed in another way
python examples/diagnose.py --quick               # that it works, in seconds
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jnorm.nnx
import jnorm.tools
from digits_data import NUM_CLASSES, Dataset, DigitsError, load_data

WIDTHS = (16, 32)
BATCH_SIZE = 64
BATCHES_TO_INSPECT = 8
LEARNING_RATE = 0.05


class Cause(NamedTuple):
    momentum: float
    epochs: int
    contrast: float  # of the images to evaluate with


CAUSES = {
    "momentum": Cause(0.99, 2, 1.0),
    "contrast": Cause(0.9, 4, 0.3),
}


class Block(nnx.Module):
    """Two convolutions beside a shortcut, each with a norm."""

    def __init__(self, before: int, width: int, momentum: float, rngs: nnx.Rngs) -> None:
        options: Any = {"kernel_size": (3, 3), "use_bias": False, "rngs": rngs}
        self.conv1, self.conv2 = nnx.Conv(before, width, **options), nnx.Conv(width, width, **options)
        self.norm1 = jnorm.nnx.BatchNorm(width, momentum=momentum, rngs=rngs)
        self.norm2 = jnorm.nnx.BatchNorm(width, momentum=momentum, rngs=rngs)
        self.widen = nnx.Conv(before, width, (1, 1), use_bias=False, rngs=rngs) if before != width else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (x if self.widen is None else self.widen(x)))


class Network(nnx.Module):
    def __init__(self, widths: Sequence[int], momentum: float, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = jnorm.nnx.BatchNorm(widths[0], momentum=momentum, rngs=rngs)
        before = (widths[0], *widths[:-1])
        self.blocks = nnx.List([Block(a, b, momentum, rngs) for a, b in zip(before, widths, strict=True)])
        self.dense = nnx.Linear(widths[-1], NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(images[..., None])))
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean((1, 2)))


Batch = tuple[Any, Any]  # images and labels


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line; returns the results. What cannot be done ends the program with a one-line reason."""
    args = parse_args(argv)
    try:
        return diagnose(args, Console())
    except DigitsError as error:
        raise SystemExit(f"diagnose.py: error: {error}") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="diagnose.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cause", choices=CAUSES, default="momentum", help="what makes the evaluation bad (default: momentum)")
    parser.add_argument("--data-dir", help="a directory with MNIST's IDX files, gzipped or not (default: scikit-learn's digits)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of the order of the images (default: 0)")
    parser.add_argument("--quick", action="store_true", help="one epoch of a smaller network, to see that everything works")
    parser.add_argument("--plot", type=Path, default=Path("diagnosis.png"), metavar="PATH", help="default: diagnosis.png")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers of the diagnosis there")
    return parser.parse_args(argv)


def diagnose(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Trains, measures, inspects, recalibrates, and measures again."""
    for path in (args.plot, args.json):
        if path is not None and path.is_dir():
            raise DigitsError(f"{path} is a directory")
    cause, data = CAUSES[args.cause], load_data(args.data_dir)
    train_set, test_set = (data.train_images, data.train_labels), (data.test_images * cause.contrast, data.test_labels)
    widths, epochs = (WIDTHS[:1], 1) if args.quick else (WIDTHS, cause.epochs)
    model = nnx.jit(lambda: Network(widths, cause.momentum, rngs=nnx.Rngs(args.seed)))()
    train(model, data, epochs, args.seed, console)

    # Where evaluation has images of its own, it is their statistics that count.
    source = train_set if cause.contrast == 1 else test_set
    batches = list(cut(source, args.seed))
    report = jnorm.tools.inspect_norms(lambda model, batch: model(batch[0]), model, batches[:BATCHES_TO_INSPECT], loss=loss, progress=True)
    report.print(console)
    report.plot(args.plot)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report.to_dict(), indent=2))

    before = accuracies(model, batches, test_set)
    model.train()
    cured = jnorm.tools.recalibrate(nnx.jit(lambda model, batch: model(batch[0])), model, batches)
    after = accuracies(cured, batches, test_set)
    console.print(accuracy_table(before, after, "training" if source is train_set else "test"))
    console.print(f"plot: {args.plot}", highlight=False)
    return {"before": before, "after": after, "report": report}


def loss(model: Network, batch: Batch) -> jax.Array:
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    value, gradients = nnx.value_and_grad(loss)(model, batch)
    optimizer.update(model, gradients)
    return value


def train(model: Network, data: Dataset, epochs: int, seed: int, console: Console) -> None:
    optimizer = nnx.Optimizer(model, optax.sgd(LEARNING_RATE, momentum=0.9), wrt=nnx.Param)
    columns = (TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=epochs * (len(data.train_labels) // BATCH_SIZE), loss="")
        for epoch in range(epochs):
            for batch in cut((data.train_images, data.train_labels), seed + epoch):
                value = train_step(model, optimizer, batch)
                progress.update(task, advance=1, loss=f"loss {float(value):.3f}")


def cut(images_and_labels: Batch, seed: int) -> Iterator[Batch]:
    """Batches of one size, in random order; what does not fill one is left out."""
    images, labels = images_and_labels
    order = np.random.default_rng(seed).permutation(len(labels))
    for start in range(0, len(labels) - BATCH_SIZE + 1, BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield images[chosen], labels[chosen]


def accuracies(model: Network, batches: list[Batch], test_set: Batch) -> dict[str, float]:
    """On the batches in training mode, on the same ones in evaluation mode, and on the test images."""
    model.train()
    training = accuracy(nnx.clone(model), batches)  # a copy: in training mode the running statistics move
    model.eval()
    return {"training": training, "evaluation": accuracy(model, batches), "test": accuracy(model, [test_set])}


@nnx.jit
def correct(model: Network, batch: Batch) -> jax.Array:
    images, labels = batch
    return jnp.sum(model(images).argmax(-1) == labels)


def accuracy(model: Network, batches: list[Batch]) -> float:
    return sum(int(correct(model, batch)) for batch in batches) / sum(len(labels) for _, labels in batches)


def accuracy_table(before: dict[str, float], after: dict[str, float], images: str) -> Table:
    table = Table("accuracy", title_justify="left")
    for heading in ("before", "recalibrated"):
        table.add_column(heading, justify="right")
    rows = {"training": f"{images} images, training mode", "evaluation": f"{images} images, evaluation", "test": "all test images"}
    for key, name in rows.items():
        table.add_row(name, f"{before[key]:.1%}", f"{after[key]:.1%}")
    return table


if __name__ == "__main__":
    main()
