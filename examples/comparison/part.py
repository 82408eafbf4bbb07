"""What a part of the comparison is made of: jobs that train, and what is made of their records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from scipy import stats

from comparison.data import Sizes, Task

Record = dict[str, Any]  # what a job found, in JSON's types
Records = dict[str, Record]  # by the name of the job


@dataclass(frozen=True)
class Setup:
    """What all jobs of a run have in common."""

    data_dir: str | None
    quick: bool
    sizes: Sizes
    epochs: int
    seeds: int
    learning_rates: tuple[float, ...]


class Job(NamedTuple):
    name: str  # unique in its part, and a file's name
    options: dict[str, Any]


class Grid(NamedTuple):
    """A table, for the terminal and for a page."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.headings, ["---", *["--:"] * (len(self.headings) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


class Part(NamedTuple):
    number: int
    name: str  # of its figure
    title: str
    jobs: Callable[[Setup], list[Job]]
    run: Callable[[Setup, Task, dict[str, Any]], Record]  # the options of one job
    grids: Callable[[Records], list[Grid]]
    figure: Callable[[Records], Figure]


def mean_and_interval(values: Any) -> tuple[float, float]:
    """The mean over seeds, and half the width of its 95 % interval (Student's t)."""
    values = np.asarray(values, float)
    n = len(values)
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def percent(errors: Any) -> str:
    """Shares such as errors, one a seed, as their mean and interval in percent."""
    return with_interval(100 * np.asarray(errors))


def with_interval(values: Any, digits: int = 2) -> str:
    """Numbers, one a seed, as their mean and interval; the mean alone of a single seed."""
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def thousandths(losses: Any) -> str:
    """Losses, one a seed, as their mean and interval times 1000."""
    diverged = int((~np.isfinite(losses)).sum())
    if diverged:
        return f"{diverged} of {len(losses)} diverged"
    return with_interval(1000 * np.asarray(losses), 1)


def geometric(values: Any, form: str) -> str:
    """Positive numbers, one a seed, as their geometric mean and its 95 % interval."""
    mean, half = mean_and_interval(np.log(values))
    middle, low, high = np.exp([mean, mean - half, mean + half])
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def tuned_grids(
    titles: Sequence[str], labels: dict[str, str], columns: Sequence[int], get: Callable[[str, int], Record | None]
) -> list[Grid]:
    """What tuned trainings found: test error, training loss and learning rate, each under its title, with a row for each of the labels."""
    present = [column for column in columns if any(get(name, column) for name in labels)]
    found = {name: [get(name, column) for column in present] for name in labels}
    shown = (("test_error", percent), ("train_loss", thousandths), ("learning_rate", lambda rate: f"{rate:.2g}"))
    return [
        Grid(
            title,
            ["", *map(str, present)],
            [[labels[name], *(show(one[key]) if one else "" for one in row)] for name, row in found.items() if any(row)],
        )
        for title, (key, show) in zip(titles, shown, strict=True)
    ]
