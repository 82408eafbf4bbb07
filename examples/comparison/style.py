"""How the figures look: one color and one mark for each norm, wherever it appears."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

from comparison.methods import METHODS  # noqa: E402
from comparison.part import mean_and_interval  # noqa: E402

STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True}
STYLE |= {"grid.alpha": 0.25}
_COLORS: Any = ("#d1602b", "#1f6fb4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#e377c2", "#7f7f7f")
_COLORS += ("#bcbd22", "#000000", "#e7a500", "#5b8cc9", "#c0392b")
_LOOKS = {method: {"color": c, "marker": m} for method, c, m in zip(METHODS, _COLORS, "xos^vDPXh*<>p", strict=True)}


def look(method: str) -> dict[str, Any]:
    return {**_LOOKS[method], "markersize": 4, "linewidth": 2 if method == "batch_norm" else 1.2}


def figure(columns: int, draw: Callable[[Sequence[Axes], Figure], None], height: float = 4.2, width: float = 4.8, rows: int = 1) -> Figure:
    """A grid of panels, given to `draw` in reading order."""
    with plt.rc_context(STYLE):
        made, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)
        draw(list(axes.flat), made)
        return made


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 on an axis that is logarithmic already, in place of powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def plot_interval(axes: Axes, x: Any, values: Any, method: str, **options: Any) -> None:
    """The mean over seeds, and its 95 % interval; of `values` each is those of all seeds at one x."""
    mean, half = np.array([mean_and_interval(v) for v in values]).T
    shown: Any = look(method) | {"label": METHODS[method].label} | options
    axes.errorbar(x, mean, half, capsize=2, **shown)
