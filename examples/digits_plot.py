"""The figure: loss curves, and the distribution of one unit's pre-activations over time (after figure 1 of arXiv:1502.03167)."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from digits_training import Run

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

NORM_COLOR = "#1f6fb4"
BASELINE_COLOR = "#d1602b"
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def plot_runs(runs: dict[str, Run], title: str, path: Path) -> None:
    """`runs` by name of the norm, "none" for the baseline, in the order of the panels."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 1 + len(runs), figsize=(4.6 * (1 + len(runs)), 4.2), layout="constrained", squeeze=False)
        loss_axes, *probe_axes = panels[0]
        _plot_losses(loss_axes, runs)
        for axes, (name, run) in zip(probe_axes, runs.items(), strict=True):
            _plot_percentiles(axes, name, run)
        low = min(axes.get_ylim()[0] for axes in probe_axes)
        high = max(axes.get_ylim()[1] for axes in probe_axes)
        for axes in probe_axes:  # one scale, so that the two distributions can be compared; the legend has the room at the top
            axes.set_ylim(low, high + 0.2 * (high - low))
        for axes in panels[0]:
            axes.set_xlabel("epoch")
            axes.set_xlim(0, max(len(run.epoch_losses) for run in runs.values()))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
        figure.suptitle(title, fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")
        plt.close(figure)


def _label(name: str) -> str:
    return "no norm" if name == "none" else name


def _color(name: str) -> str:
    return BASELINE_COLOR if name == "none" else NORM_COLOR


def _plot_losses(axes: Axes, runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        num_epochs, num_steps = len(run.epoch_losses), len(run.losses)
        axes.plot(np.arange(1, num_steps + 1) * num_epochs / num_steps, run.losses, color=_color(name), alpha=0.3, linewidth=0.8)
        # The mean of an epoch belongs to its middle.
        middle = np.arange(num_epochs) + 0.5
        label = f"{_label(name)}: test accuracy {run.test_accuracies[-1]:.1%}"
        axes.plot(middle, run.epoch_losses, "o-" if num_epochs < 5 else "-", color=_color(name), linewidth=2, markersize=4, label=label)
    axes.set_title("Training loss: batches (thin), epochs (thick)", fontsize=10)
    axes.set_ylabel("cross-entropy")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)  # room for the legend
    axes.legend(framealpha=1, edgecolor="none", loc="upper right")


def _plot_percentiles(axes: Axes, name: str, run: Run) -> None:
    low, median, high = run.percentiles.T
    color = _color(name)
    axes.fill_between(run.probe_epochs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(run.probe_epochs, high, color=color, linewidth=1, linestyle="--", label="85th")
    axes.plot(run.probe_epochs, median, color=color, linewidth=2, label="50th")
    axes.plot(run.probe_epochs, low, color=color, linewidth=1, linestyle=":", label="15th")
    axes.set_title(f"Pre-activation of one unit: {_label(name)}", fontsize=10)
    axes.set_ylabel("input of the last activation")
    axes.legend(title="percentile", framealpha=1, edgecolor="none", loc="upper center", ncols=3)
