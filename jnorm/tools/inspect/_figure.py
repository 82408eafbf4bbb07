"""The report as a figure, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ._report import LayerReport, Report

GOOD, BAD, SECOND = "#1f6fb4", "#c23b22", "#8a8a8a"


def draw(report: Report, path: str | Path | None) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('plot() needs matplotlib, which the extra has: python -m pip install "jnorm[examples]".') from e
    layers = [layer for layer in report.layers if layer.kl is not None]
    if not layers:
        raise ValueError("there is nothing to plot: none of the norms has running statistics that were used and are numbers.")
    panels = 4 if report.losses is not None else 3
    figure = Figure(figsize=(2.2 + 2.7 * panels, 1.6 + 0.28 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    _distances(axes[0], layers)
    _ratios(axes[1], layers)
    _divergences(axes[2], layers)
    if report.losses is not None:
        _losses(axes[3], layers)
    axes[0].set_yticks(range(len(layers)), [_label(layer.path) for layer in layers])
    axes[0].set_ylim(len(layers) - 0.4, -0.6)  # the first on top
    for label, layer in zip(axes[0].get_yticklabels(), layers, strict=True):
        label.set_color(_color(layer))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.title.set_fontsize(10)
    figure.suptitle(_title(report), fontsize=11)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def _distances(axes: Any, layers: list[LayerReport]) -> None:
    _spans(axes, layers, [layer.mean_distance for layer in layers], [layer.mean_distance_max for layer in layers])
    axes.set_title("distance of means")
    axes.set_xlabel("standard deviations:\nr.m.s., and the largest")
    axes.set_xlim(left=0)


def _ratios(axes: Any, layers: list[LayerReport]) -> None:
    ratios = [1.0 if layer.var_ratio is None else layer.var_ratio for layer in layers]
    worst = [1.0 if layer.var_ratio_max is None else layer.var_ratio_max for layer in layers]
    for i, (layer, one, most) in enumerate(zip(layers, ratios, worst, strict=True)):
        axes.plot([1 / most, most], [i, i], color=SECOND, linewidth=1.2, alpha=0.6)
        axes.plot(one, i, "o", color=_color(layer), markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    limit = max(2.0, 1.2 * max(worst))
    axes.set_xscale("log")
    axes.set_xlim(1 / limit, limit)
    marks = [m for m in (2.0, 4.0, 10.0) if m <= limit] if limit < 20 else [10.0 ** int(np.log10(limit))]
    ticks = [*(1 / m for m in marks[::-1]), 1.0, *marks]
    axes.set_xticks(ticks, [f"{t:g}" if t >= 1 else f"1/{1 / t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_title("running / batch variance")
    axes.set_xlabel("geometric mean, and\nthe worst factor either way")


def _divergences(axes: Any, layers: list[LayerReport]) -> None:
    least = 1e-5
    for i, layer in enumerate(layers):
        one, most, noise = (max(a or 0.0, least) for a in (layer.kl, layer.kl_max, layer.kl_noise))
        axes.plot([one, most], [i, i], color=SECOND, linewidth=1.2, alpha=0.6)
        axes.plot(one, i, "o", color=_color(layer), markersize=5)
        axes.plot(noise, i, "|", color="black", markersize=9, label="noise" if i == 0 else None)
    axes.set_xscale("log")
    axes.set_xlim(left=least)
    axes.set_title("KL(batch ‖ running)")
    axes.set_xlabel("nats: mean, and the largest;\n| is what noise would make")


def _losses(axes: Any, layers: list[LayerReport]) -> None:
    alone, without = ([getattr(layer, key) or 0.0 for layer in layers] for key in ("loss_alone", "loss_without"))
    rows = np.arange(len(layers))
    axes.barh(rows - 0.18, alone, height=0.34, color=GOOD, label="alone")
    axes.barh(rows + 0.18, without, height=0.34, color=SECOND, label="without")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title("change of the loss")
    axes.set_xlabel("blue (alone): batch statistics here only\ngray (without): all but here")


def _spans(axes: Any, layers: list[LayerReport], middle: list[float | None], largest: list[float | None]) -> None:
    for i, (layer, one, most) in enumerate(zip(layers, middle, largest, strict=True)):
        axes.plot([one, most], [i, i], color=SECOND, linewidth=1.2, alpha=0.6)
        axes.plot(one, i, "o", color=_color(layer), markersize=5)


def _color(layer: LayerReport) -> str:
    return BAD if layer.findings else GOOD


def _label(path: str) -> str:
    path = path or "the model"
    return path if len(path) <= 32 else "…" + path[-31:]


def _title(report: Report) -> str:
    title = f"Running statistics against those of {report.batches} batch{'es' * (report.batches > 1)}"
    if report.losses is None:
        return title
    running, pooled, own = report.losses.means
    third = "in training mode" if report.losses.as_in_training else "with each batch's own"
    return f"{title}: the loss is {running:.3g} in evaluation, {pooled:.3g} when recalibrated, {own:.3g} {third}"
