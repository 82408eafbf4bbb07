"""The report in the terminal, with rich."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._report import LayerReport, Report

WIDTH = 140  # of a text
WIDE = 132  # a terminal that all columns have room in


def show(report: Report, console: Any) -> None:
    rich = _rich()
    console = console or rich.console.Console()
    console.print(_table(report, rich, console.width >= WIDE))
    for line in _lines(report):
        console.print(line, highlight=False, markup=False)


def as_text(report: Report) -> str:
    rich = _rich()
    text = io.StringIO()
    show(report, rich.console.Console(file=text, width=WIDTH, color_system=None))
    return text.getvalue().rstrip()


def _rich() -> Any:
    try:
        import rich.box
        import rich.console
        import rich.table
        import rich.text
    except ImportError as e:
        raise ImportError('the table needs rich, which the extra has: python -m pip install "jnorm[examples]"; to_dict() does not.') from e
    return rich


def _table(report: Report, rich: Any, wide: bool) -> Any:
    layers = report.layers
    title = f"{_number(len(layers), 'norm')}, {_number(report.batches, 'batch')}"
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    table.add_column("norm", overflow="fold", min_width=min(max(len(layer.path) for layer in layers), 24))
    columns = _wide(layers) if wide else _narrow(layers)
    if report.losses is not None:
        columns |= {"loss\nalone": [_signed(layer.loss_alone) for layer in layers]}
        columns |= {"loss\nwithout": [_signed(layer.loss_without) for layer in layers]} if wide else {}
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for layer, *cells in zip(layers, *columns.values(), strict=True):
        table.add_row(rich.text.Text(layer.path or "(the model)"), *cells, _words(layer, rich))
    return table


def _wide(layers: tuple[LayerReport, ...]) -> dict[str, list[str]]:
    return {
        "channels": [str(layer.channels) for layer in layers],
        "samples": [_short(layer.samples) for layer in layers],
        "noise": [_short(layer.noise) for layer in layers],
        "mean off\nby (max) σ": [_pair(layer.mean_distance, layer.mean_distance_max) for layer in layers],
        "variance\n× (worst)": [_pair(layer.var_ratio, layer.var_ratio_max) for layer in layers],
        "KL (max)": [_pair(layer.kl, layer.kl_max) for layer in layers],
    }


def _narrow(layers: tuple[LayerReport, ...]) -> dict[str, list[str]]:
    return {
        "noise": [_short(layer.noise) for layer in layers],
        "mean\noff by": [_short(layer.mean_distance) for layer in layers],
        "var.\n×": [_short(layer.var_ratio) for layer in layers],
        "KL": [_short(layer.kl) for layer in layers],
    }


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"


def _words(layer: LayerReport, rich: Any) -> Any:
    if layer.findings:
        return rich.text.Text(", ".join(dict.fromkeys(f.kind for f in layer.findings)), style="bold red")
    return rich.text.Text("frozen" if layer.frozen else "ok", style="green")


def _short(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.2g}" if abs(number) < 100 else f"{number:.3g}"


def _pair(number: float | None, largest: float | None) -> str:
    return "–" if number is None else f"{_short(number)} ({_short(largest)})"


def _signed(number: float | None) -> str:
    return "–" if number is None else f"{number:+.3f}" if abs(number) < 100 else f"{number:+.3g}"


def _lines(report: Report) -> list[str]:
    """The verdict of all, and each kind of finding once, in the words of the layer where it is first."""
    lines = [report.verdict]
    for kind in dict.fromkeys(f.kind for layer in report.layers for f in layer.findings):
        some = [(layer, f) for layer in report.layers for f in layer.findings if f.kind == kind]
        layer, finding = max(some, key=lambda pair: pair[0].kl or 0)
        others = "" if len(some) == 1 else f" and {len(some) - 1} more"
        lines.append(f"• {kind} ({layer.path or 'the model'}{others}): {finding.text}. → {finding.remedy}.")
    return lines
