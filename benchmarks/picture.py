"""The ratios of a run as a picture: one line a case, one mark a peer, on a logarithmic axis."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import claims
from .cases import NORMS, short
from .report import NAMES, shown_name

MARKS = "osD^vP*X"
COLORS = ["#1b6ca8", "#7fb2d9", "#0a3d62", "#2e8b57", "#8e6bbf", "#c98a1b", "#d1495b", "#7a2034"]


def case_label(row: dict[str, Any]) -> str:
    return row["name"].removesuffix(" " + short(row["dtype"])).replace("_", " ")


def draw(found: dict[str, Any], path: Path) -> None:
    """The first allocator's ratios: step on the left, forward on the right, a row of panels for each dtype."""
    allocator, run = next(iter(found.items()))
    form = claims.headline(run)
    if form is None:
        raise SystemExit("--png: the run has no cases to draw")
    dtypes = list(dict.fromkeys(r["dtype"] for r in run["rows"]))
    by_dtype = {d: sorted((r for r in run["rows"] if r["dtype"] == d), key=lambda r: NORMS.index(r["norm"])) for d in dtypes}
    heights = [len(rows) + 2 for rows in by_dtype.values()]
    figure, grid = plt.subplots(
        len(dtypes), 2, figsize=(13, 1.6 + 0.27 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for line, (dtype, rows) in zip(grid, by_dtype.items(), strict=True):
        for axes, (what, title) in zip(line, (("step", "training step"), ("forward", "forward pass alone")), strict=True):
            panel(axes, rows, what, form)
            axes.set_title(f"{title}, {dtype}", fontsize=11)
        line[1].tick_params(labelleft=False)
    handles = {h.get_label(): h for axes in grid.flat for h in axes.get_legend_handles_labels()[0]}
    order = [label for label in map(shown_name, NAMES) if label in handles]
    figure.legend([handles[o] for o in order], order, loc="outside lower center", ncols=len(order), frameon=False, fontsize=9)
    m = run["machine"]
    figure.suptitle(
        f"Time of the others over {form}'s: right of the line, jnorm is faster (hollow: not exact)\n"
        f"{m['processor'] if m['platform'] == 'cpu' else m['device']}, {m['cores']} cores, {allocator} allocator, commit {m['commit']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axes: Axes, rows: list[dict[str, Any]], what: str, form: str) -> None:
    for i, name in enumerate(NAMES):
        points = [(y, r["peers"][name]) for y, r in enumerate(rows) if form in r["peers"].get(name, {}).get(what, {}).get("over", {})]
        style: dict[str, Any] = {"marker": MARKS[i], "s": 34, "zorder": 3, "edgecolors": COLORS[i], "linewidths": 1.1}
        for inexact in (False, True):
            chosen = [(y, p[what]["over"][form]["ratio"]) for y, p in points if p["inexact"] == inexact]
            if chosen:
                ys, values = zip(*chosen, strict=True)
                axes.scatter(values, ys, facecolors="none" if inexact else COLORS[i], label=None if inexact else shown_name(name), **style)
    axes.axvline(1, color="black", linewidth=1.2, zorder=2)
    axes.axvspan(1e-3, 1, color="#d1495b", alpha=0.07, zorder=0)
    values = [v for c in axes.collections for v in c.get_offsets()[:, 0]] if axes.collections else [1.0]  # type: ignore[index]
    axes.set_xscale("log")
    axes.set_xlim(min([0.5, *(v / 1.2 for v in values if v > 0)]), max([4, *(v * 1.2 for v in values)]))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [case_label(r) for r in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="both", color="#dddddd", linewidth=0.6, zorder=1)
