"""The ratios of a run as a picture: one line a case, one mark a peer, on a logarithmic axis."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import claims
from .cases import NORMS, short
from .sections import NAMES, shown_name

MARKS = "osD^vP*X"
COLORS = ["#1b6ca8", "#7fb2d9", "#0a3d62", "#2e8b57", "#8e6bbf", "#c98a1b", "#d1495b", "#7a2034"]

TITLES = {"step": "training step", "forward": "forward pass alone"}


def case_label(row: dict[str, Any]) -> str:
    return row["name"].removesuffix(" " + short(row["dtype"])).replace("_", " ")


def draw(found: dict[str, Any], path: Path) -> None:
    """The first allocator's ratios: a line for each case, a column for step and forward in each dtype."""
    allocator, run = next(iter(found.items()))
    form = claims.headline(run)
    if form is None:
        raise SystemExit("--png: the run has no cases to draw")
    rows = sorted(run["rows"], key=lambda r: NORMS.index(r["norm"]))
    labels = list(dict.fromkeys(map(case_label, rows)))
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    columns = [(what, dtype) for what in ("step", "forward") for dtype in dtypes]
    size = (3.6 * len(columns) + 2.6, 1.9 + 0.27 * len(labels))
    figure, grid = plt.subplots(1, len(columns), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, (what, dtype) in zip(grid[0], columns, strict=True):
        panel(axes, {labels.index(case_label(r)): r for r in rows if r["dtype"] == dtype}, what, form)
        axes.set_title(f"{TITLES[what]}, {dtype}", fontsize=11)
    grid[0][0].set_yticks(range(len(labels)), labels, fontsize=8.5)
    grid[0][0].set_ylim(len(labels) - 0.4, -0.6)
    handles = {h.get_label(): h for axes in grid[0] for h in axes.get_legend_handles_labels()[0]}
    order = [label for label in map(shown_name, NAMES) if label in handles]
    figure.legend([handles[o] for o in order], order, loc="outside lower center", ncols=len(order), frameon=False, fontsize=9)
    figure.suptitle(title(run, form, allocator), fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def title(run: dict[str, Any], form: str, allocator: str) -> str:
    m = run["machine"]
    where = m["processor"] if m["platform"] == "cpu" else m["device"]
    return (
        f"Time of the others over that of {form}: right of the line, jnorm is faster (hollow: not exact)\n"
        f"{where}, {m['cores']} cores, {allocator} allocator, commit {m['commit']}"
    )


def panel(axes: Axes, rows: dict[int, dict[str, Any]], what: str, form: str) -> None:
    """`rows`: {line: row}."""
    values = [1.0]
    for i, name in enumerate(NAMES):
        style: dict[str, Any] = {"marker": MARKS[i], "s": 34, "zorder": 3, "edgecolors": COLORS[i], "linewidths": 1.1}
        points = {y: r["peers"][name] for y, r in rows.items() if form in r["peers"].get(name, {}).get(what, {}).get("over", {})}
        for inexact in (False, True):
            chosen = {y: p[what]["over"][form]["ratio"] for y, p in points.items() if p["inexact"] == inexact}
            face, label = ("none", None) if inexact else (COLORS[i], shown_name(name))
            if chosen:
                axes.scatter(list(chosen.values()), list(chosen), facecolors=face, label=label, **style)
            values += chosen.values()
    axes.axvline(1, color="black", linewidth=1.2, zorder=2)
    axes.axvspan(1e-3, 1, color="#d1495b", alpha=0.07, zorder=0)
    left, right = min(0.5, min(values) / 1.2), max(4, max(values) * 1.2)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if left <= t <= right]
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="both", color="#dddddd", linewidth=0.6, zorder=1)
