"""Compares the norms of jnorm on images of handwritten digits, with equal budgets, learning rates tuned by one rule, and intervals.

python examples/compare_norms.py                       # all parts; some 20 minutes on two cores
python examples/compare_norms.py --only 2,3            # some of them
python examples/compare_norms.py --quick               # to see that everything works
python examples/compare_norms.py --data-dir ~/mnist    # MNIST's IDX files instead of scikit-learn's digits

Each training is kept in --out as it ends: a run that was interrupted goes on where it was.
"""

import argparse
import dataclasses
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jnorm
from comparison import PARTS
from comparison.data import Sizes
from comparison.part import Part, Records, Setup
from comparison.runner import run_parts
from comparison.training import LEARNING_RATES
from digits_data import DigitsError

FULL = Setup(None, False, Sizes(), epochs=16, seeds=12, learning_rates=LEARNING_RATES)
QUICK = Setup(None, True, Sizes(128, 64, 128), epochs=1, seeds=2, learning_rates=LEARNING_RATES[1:2])


def main(argv: Sequence[str] | None = None) -> dict[int, Records]:
    """Runs the command line; returns the records by part. What cannot be done ends the program with a one-line reason."""
    args = parse_args(argv)
    try:
        return compare(args)
    except DigitsError as error:
        raise SystemExit(f"compare_norms.py: error: {error}") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parts = "; ".join(f"{part.number}: {part.title.lower()}" for part in PARTS)
    parser = argparse.ArgumentParser(prog="compare_norms.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="N,N", help=f"some of the parts ({parts})")
    parser.add_argument(
        "--data-dir", help="a directory with MNIST's IDX files, gzipped or not (default: scikit-learn's digits); some GB a process"
    )
    parser.add_argument("--epochs", type=_positive_integer, help=f"default: {FULL.epochs}, or {QUICK.epochs} with --quick")
    parser.add_argument("--seeds", type=_positive_integer, help=f"of each training (default: {FULL.seeds}, or {QUICK.seeds} with --quick)")
    parser.add_argument("--quick", action="store_true", help="a few short trainings, to see that everything works")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=_positive_integer, default=cores, metavar="N", help=f"processes (default: {cores})")
    parser.add_argument("--out", type=Path, default=Path("compare-norms"), metavar="DIR", help="default: compare-norms")
    return parser.parse_args(argv)


def _parts(text: str) -> tuple[Part, ...]:
    by_number = {str(part.number): part for part in PARTS}
    unknown = [number for number in text.split(",") if number not in by_number]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no part {', '.join(map(repr, unknown))}; the parts are {', '.join(by_number)}")
    return tuple(by_number[number] for number in sorted(set(text.split(","))))


def _positive_integer(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def compare(args: argparse.Namespace) -> dict[int, Records]:
    """Trains what is not there yet, prints the tables, and writes them and the figures."""
    start = time.perf_counter()
    # Half the time to compile, and these small programs run no slower. Read as JAX starts, in each of the processes.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level={0 if args.quick else 1}"
    setup = dataclasses.replace(QUICK if args.quick else FULL, data_dir=args.data_dir and str(Path(args.data_dir).resolve()))
    given = {name: value for name in ("epochs", "seeds") if (value := getattr(args, name))}
    setup = dataclasses.replace(setup, **given)
    if args.out.exists() and not args.out.is_dir():
        raise DigitsError(f"--out: {args.out} is not a directory")
    console = Console()
    commit = _commit()  # before the run, during which there may be another
    found = run_with_progress(setup, args, console)
    pages = ["# All tables of the comparison", _described(setup, args.workers, commit, time.perf_counter() - start)]
    for part in args.only:
        grids = part.grids(found[part.number])
        console.rule(f"{part.number}. {part.title}")
        for grid in grids:
            console.print(grid.rich())
        pages += [f"## {part.number}. {part.title}", *(grid.markdown() for grid in grids)]
        part.figure(found[part.number]).savefig(args.out / f"{part.name}.png", dpi=130)
    (args.out / "tables.md").write_text("\n\n".join(pages) + "\n")
    console.print(f"figures and tables.md: {args.out}", highlight=False)
    return found


def run_with_progress(setup: Setup, args: argparse.Namespace, console: Console) -> dict[int, Records]:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("all", total=sum(len(part.jobs(setup)) for part in args.only))
        tasks = {
            part.number: progress.add_task(f"{part.number}. {part.name.replace('_', ' ')}", total=len(part.jobs(setup)))
            for part in args.only
        }

        def report(part: Part) -> None:
            progress.advance(tasks[part.number])
            progress.advance(total)

        return run_parts(args.only, setup, args.out / "runs", args.workers, report)


def _described(setup: Setup, workers: int, commit: str, seconds: float) -> str:
    data = "scikit-learn's digits" if setup.data_dir is None else Path(setup.data_dir).name
    command = "python examples/compare_norms.py" + " --quick" * setup.quick
    sizes = setup.sizes
    return (
        f"`{command}`: {data}, {sizes.train} images to train on, {sizes.validation} to choose learning rates by and {sizes.test} to test "
        f"with; {setup.seeds} seeds; {setup.epochs} epochs, 4 times as many in part 3 and half as many in parts 4 and 6; jnorm "
        f"{jnorm.__version__}{commit}, jax {jax.__version__}, {workers} processes, {seconds / 60:.1f} minutes for what was not there yet."
    )


def _commit() -> str:
    """Of a checkout; an installed jnorm has none."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return f" ({subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()})"
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    main()
