"""Trains a network in PyTorch on handwritten digits, ports it to an NNX model with jnorm's norms, and folds these into its layers.

python examples/port_from_torch.py                                 # needs PyTorch: pip install 'jnorm[torch]'
python examples/port_from_torch.py --epochs 20 --batch-size 100
python examples/port_from_torch.py --quick                         # that it works, in a few seconds

It prints the largest differences of the outputs in evaluation and of the running statistics after one more step of training, the test
accuracies, and the times of inference in PyTorch, and here before and after folding.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jnorm.nnx as jnx
import jnorm.tools
from digits_data import NUM_CLASSES, Dataset, load_data
from jnorm.tools import convert

WIDTHS = (16, 32)
HIDDEN = 64
SIDE = 4  # of what the second convolution, with strides of 2, makes of 8 pixels
LEARNING_RATE = 0.1


class Network(nnx.Module):
    """The network of `torch_network`, with the same names, and the channels last."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        one, two = WIDTHS
        # PyTorch's padding=1: "SAME" pads 0 and 1 where the strides are 2 and the size is even.
        self.conv1 = nnx.Conv(1, one, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm1 = jnx.BatchNorm(one, rngs=rngs)
        self.conv2 = nnx.Conv(one, two, (3, 3), strides=2, padding=1, use_bias=False, rngs=rngs)
        self.norm2 = jnx.BatchNorm(two, rngs=rngs)
        self.hidden = nnx.Linear(two * SIDE * SIDE, HIDDEN, rngs=rngs)
        self.norm3 = jnx.BatchNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(images)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.norm3(self.hidden(x.reshape(len(x), -1))))
        return self.head(x)


def torch_network() -> Any:
    import torch
    from torch import nn

    class TorchNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one, two = WIDTHS
            self.conv1 = nn.Conv2d(1, one, 3, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(one)
            self.conv2 = nn.Conv2d(one, two, 3, stride=2, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(two)
            self.hidden = nn.Linear(two * SIDE * SIDE, HIDDEN)
            self.norm3 = nn.BatchNorm1d(HIDDEN)
            self.head = nn.Linear(HIDDEN, NUM_CLASSES)

        def forward(self, images: Any) -> Any:
            x = torch.relu(self.norm1(self.conv1(images)))
            x = torch.relu(self.norm2(self.conv2(x)))
            x = torch.relu(self.norm3(self.hidden(x.flatten(1))))
            return self.head(x)

    return TorchNetwork()


@dataclasses.dataclass
class Report:
    evaluation: float  # largest differences
    statistics: float
    folding: float
    accuracies: dict[str, float]
    seconds: dict[str, float]  # of one batch


def main(argv: Sequence[str] | None = None) -> Report:
    args = parse_args(argv)
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit("port_from_torch.py: error: PyTorch is not installed: pip install 'jnorm[torch]'") from None
    torch.manual_seed(args.seed)
    console, data = Console(), load_data(None)
    if args.batch_size > len(data.train_images):
        raise SystemExit(f"port_from_torch.py: error: --batch-size must be at most {len(data.train_images)}, the number of training images")
    source = torch_network()
    train(source, data, args, console)
    return port(source, data, args, console)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="port_from_torch.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=positive_integer, help="default: 10, or 2 with --quick")
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="of the training, at least 2 (default: 64)")
    parser.add_argument("--repeats", type=positive_integer, help="of the timing, of which the fastest counts (default: 200, or 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of the order of the samples (default: 0)")
    parser.add_argument("--quick", action="store_true", help="to see that everything works")
    args = parser.parse_args(argv)
    if args.batch_size < 2:
        parser.error("--batch-size must be at least 2: a batch of one has no variance")
    args.epochs = args.epochs or (2 if args.quick else 10)
    args.repeats = args.repeats or (20 if args.quick else 200)
    return args


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def train(source: Any, data: Dataset, args: argparse.Namespace, console: Console) -> None:
    """In PyTorch, with SGD."""
    import torch

    optimizer = torch.optim.SGD(source.parameters(), LEARNING_RATE, momentum=0.9)
    images, labels = channels_second(data.train_images), torch.tensor(data.train_labels).long()
    steps = len(images) // args.batch_size
    columns = (TextColumn("training in PyTorch"), BarColumn(20), TextColumn("{task.completed}/{task.total} {task.fields[numbers]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=args.epochs, numbers="")
        for _ in range(args.epochs):
            loss = 0.0
            # What is left over would be a smaller batch.
            for batch in torch.randperm(len(images))[: steps * args.batch_size].split(args.batch_size):
                optimizer.zero_grad()
                batch_loss = torch.nn.functional.cross_entropy(source(images[batch]), labels[batch])
                batch_loss.backward()
                optimizer.step()
                loss += batch_loss.item() / steps
            progress.update(task, advance=1, numbers=f"loss {loss:.4f}")


def channels_second(images: np.ndarray) -> Any:
    import torch

    return torch.tensor(images[:, None])


def torch_inference(source: Any, images: np.ndarray) -> Callable[[], Any]:
    import torch

    x = channels_second(images)

    def run() -> Any:
        with torch.no_grad():
            return source.eval()(x)

    return run


def port(source: Any, data: Dataset, args: argparse.Namespace, console: Console) -> Report:
    """Converts, folds, compares."""
    # No weight is initialized: the abstract model has the structure alone. The hidden layer comes after a flattening.
    abstract = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    model = convert.load(abstract, source, flattened={"hidden": (WIDTHS[1], SIDE, SIDE)})
    model.eval()
    x = jnp.asarray(data.test_images[..., None])
    folded, what_was_folded = jnorm.tools.fold(model, x)
    console.print(str(what_was_folded), highlight=False)

    run, run_folded, run_torch = compiled(model), compiled(folded), torch_inference(source, data.test_images)
    outputs = {"PyTorch": run_torch().numpy(), "jnorm": np.asarray(run(x)), "jnorm, folded": np.asarray(run_folded(x))}
    report = Report(
        evaluation=largest(outputs["jnorm"], outputs["PyTorch"]),
        statistics=step_of_training(model, source, data.train_images[: args.batch_size]),
        folding=largest(outputs["jnorm, folded"], outputs["jnorm"]),
        accuracies={name: float(np.mean(y.argmax(-1) == data.test_labels)) for name, y in outputs.items()},
        seconds=fastest({"PyTorch": run_torch, "jnorm": lambda: run(x), "jnorm, folded": lambda: run_folded(x)}, args.repeats),
    )
    show(report, len(x), console)
    return report


def compiled(model: nnx.Module) -> Callable[[jax.Array], jax.Array]:
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))  # pyright: ignore[reportCallIssue]
    return lambda x: call(state, x)


def largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def step_of_training(model: nnx.Module, source: Any, images: np.ndarray) -> float:
    """The largest difference of the running statistics, after both have seen one more batch in training."""
    model = nnx.clone(model)
    model.train()
    nnx.jit(lambda model, x: model(x))(model, jnp.asarray(images[..., None]))
    source.train()(channels_second(images))
    here, there = convert.to_torch(model, flattened={"hidden": (WIDTHS[1], SIDE, SIDE)}), source.state_dict()
    return max(largest(here[key].numpy(), there[key].numpy()) for key in there if "running" in key)


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of one call: the fastest of many, which take turns, so that all of them see the same other load."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def show(report: Report, size: int, console: Console) -> None:
    differences = Table("largest difference", "")
    differences.add_row("outputs in evaluation, PyTorch and jnorm", f"{report.evaluation:.1e}")
    differences.add_row("running statistics after one more step, PyTorch and jnorm", f"{report.statistics:.1e}")
    differences.add_row("outputs in evaluation, before and after folding", f"{report.folding:.1e}")
    console.print(differences)
    table = Table("network", "test accuracy", f"inference of {size} images")
    for name, accuracy in report.accuracies.items():
        seconds = report.seconds.get(name)
        table.add_row(name, f"{accuracy:.2%}", "" if seconds is None else f"{seconds * 1e3:.2f} ms")
    console.print(table)


if __name__ == "__main__":
    main()
