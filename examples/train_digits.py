"""Trains a network on handwritten digits with a norm of jnorm and without one, and compares.

python examples/train_digits.py                                    # batch_norm in a small dense network
python examples/train_digits.py --model cnn --norm group_norm
python examples/train_digits.py --api nnx                          # in one of Flax's two styles, with the same losses
python examples/train_digits.py --devices 4                        # data-parallel, the same losses as on one device
python examples/train_digits.py --eval                             # the test accuracy of the checkpoint written before
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from digits_apis import APIS
from digits_checkpoint import Checkpoint, check_destination, load_checkpoint, save_checkpoint
from digits_data import Dataset, DigitsError, load_data
from digits_models import MODELS, NORMS, Architecture, check_architecture
from digits_plot import plot_runs
from digits_training import Options, Run, make_evaluate, make_mesh, train

DEFAULT_NUM_GROUPS = 2  # divides the layers of both models
DEFAULT_EPOCHS = 20
DEFAULT_LEARNING_RATES = {"mlp": 0.01, "cnn": 0.1}
QUICK_EPOCHS = 2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line; returns the results. What cannot be done ends the program with a one-line reason."""
    args = parse_args(argv)
    try:
        return evaluate_checkpoint(args) if args.eval else train_and_compare(args)
    except DigitsError as error:
        raise SystemExit(f"train_digits.py: error: {error}") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_digits.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="mlp", help="hidden layers of 300 and 100, or two convolutions (default: mlp)")
    parser.add_argument("--norm", choices=NORMS, default="batch_norm", help="default: batch_norm")
    parser.add_argument("--api", choices=APIS, default="functional", help="pure functions, or modules of Flax (default: functional)")
    parser.add_argument("--num-groups", type=_positive_integer, help=f"the groups of group_norm (default: {DEFAULT_NUM_GROUPS})")
    parser.add_argument("--no-baseline", action="store_true", help="do not train the same network without a norm too")
    parser.add_argument("--data-dir", help="a directory with MNIST's IDX files, gzipped or not (default: scikit-learn's digits)")
    parser.add_argument("--devices", type=_positive_integer, default=1, metavar="N", help="train data-parallel; a CPU is N virtual devices")
    parser.add_argument("--epochs", type=_positive_integer, help=f"default: {DEFAULT_EPOCHS}, or {QUICK_EPOCHS} with --quick")
    parser.add_argument("--batch-size", type=_positive_integer, default=200, help="over all devices (default: 200)")
    parser.add_argument("--learning-rate", type=_positive_float, help="of plain SGD (default: 0.01 for the mlp, 0.1 for the cnn)")
    parser.add_argument("--seed", type=_natural_number, default=0, help="of the parameters and of the order of the samples (default: 0)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs, to see that everything works")
    parser.add_argument("--plot", type=Path, default=Path("digits.png"), metavar="PATH", help="default: digits.png")
    parser.add_argument("--checkpoint", type=Path, default=Path("digits-checkpoint"), metavar="DIR", help="default: digits-checkpoint")
    parser.add_argument("--eval", action="store_true", help="test the network in --checkpoint; api, model, norm and data are read there")
    return parser.parse_args(argv)


def _positive_integer(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def _positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def _natural_number(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def train_and_compare(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with the norm and without; writes the checkpoint of the first and the plot of both; prints the table."""
    if args.num_groups is not None and args.norm != "group_norm":
        raise DigitsError(f"--num-groups is for --norm group_norm, not for {args.norm}")
    if args.plot.is_dir():
        raise DigitsError(f"--plot: {args.plot} is a directory")
    check_destination(args.checkpoint)
    data = load_data(args.data_dir)
    arch = Architecture(args.model, args.norm, args.num_groups or DEFAULT_NUM_GROUPS, data.image_shape, args.api)
    check_architecture(arch)
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else DEFAULT_EPOCHS)
    learning_rate = args.learning_rate or DEFAULT_LEARNING_RATES[args.model]
    options = Options(epochs, args.batch_size, learning_rate, args.seed, args.devices)
    make_mesh(options.devices)  # before anything is printed: the devices may not be there

    console = Console()
    console.print(f"{args.model} ({args.api}) on {_describe(data, args.data_dir)}, {args.devices} device{'s' * (args.devices > 1)}")
    norms = [args.norm] if args.no_baseline or args.norm == "none" else [args.norm, "none"]
    runs = {norm: train_with_progress(dataclasses.replace(arch, norm=norm), data, options, console) for norm in norms}

    run = runs[args.norm]
    data_dir = None if args.data_dir is None else str(Path(args.data_dir).resolve())
    save_checkpoint(args.checkpoint, Checkpoint(arch, data_dir, run.params, run.state))
    plot_runs(runs, f"{args.model} on {_describe(data, args.data_dir)}", args.plot)
    console.print(results_table(runs))
    console.print(f"plot: {args.plot}   checkpoint: {args.checkpoint}", highlight=False)
    return {"api": args.api, "norm": args.norm, "test_accuracy": run.test_accuracies[-1], "runs": runs}


def _describe(data: Dataset, data_dir: str | None) -> str:
    return f"{'scikit-learn digits' if data_dir is None else data_dir} ({len(data.train_images)} + {len(data.test_images)} images)"


def train_with_progress(arch: Architecture, data: Dataset, options: Options, console: Console) -> Run:
    columns = (
        TextColumn("{task.description:>21}"),
        BarColumn(10),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(arch.norm, total=options.epochs, numbers="")

        def report(epoch: int, loss: float, accuracy: float) -> None:
            progress.update(task, completed=epoch, numbers=f"loss {loss:.4f}  test accuracy {accuracy:.2%}")

        return train(arch, data, options, report)


def results_table(runs: dict[str, Run]) -> Table:
    table = Table("norm")
    for heading in ("training loss", "test accuracy", "after epoch 1", "seconds"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        first, last = run.test_accuracies[0], run.test_accuracies[-1]
        table.add_row(name, f"{run.epoch_losses[-1]:.4f}", f"{last:.2%}", f"{first:.2%}", f"{run.seconds:.1f}")
    return table


def evaluate_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Tests the network of a checkpoint. The data may have moved since: --data-dir says where to."""
    checkpoint = load_checkpoint(args.checkpoint)
    arch = checkpoint.arch
    data_dir = args.data_dir or checkpoint.data_dir
    data = load_data(data_dir)
    if data.image_shape != arch.image_shape:
        raise DigitsError(f"the network in {args.checkpoint} is for images of {arch.image_shape} pixels; these have {data.image_shape}")
    accuracy = make_evaluate(arch, data.test_images, data.test_labels)(checkpoint.params, checkpoint.state)
    network = f"{arch.model} ({arch.api}) with norm {arch.norm}"
    Console().print(f"{network}: test accuracy {accuracy:.2%} on {len(data.test_images)} images", highlight=False)
    return {"api": arch.api, "norm": arch.norm, "test_accuracy": accuracy}


if __name__ == "__main__":
    main()
