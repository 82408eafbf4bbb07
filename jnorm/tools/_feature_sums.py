"""The statistics of blocks of rows together, on the host in float64."""

import warnings
from typing import Any

import numpy as np

from .._pipeline.axes import Layout


class Sums:
    """Of what was seen so far, in float64: how many, and their mean and squares, as deviations from a center that stays."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count: Any = np.zeros(shape)
        self.center: Any = np.zeros(shape)
        self.offset: Any = np.zeros(shape)
        self.m2: Any = np.zeros(shape)

    def add(self, block: np.ndarray, layout: Layout, missing: bool, name: str) -> None:
        layout = layout._replace(shape=block.shape)
        d = block.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            counted: Any = np.isnan(d) if missing else True
            if missing:
                np.logical_not(counted, out=counted)
            count = np.sum(counted, axis=layout.reduced, dtype=np.float64) if missing else np.full_like(self.count, layout.reduced_size)
            number = np.maximum(count, 1)
            if (self.count == 0).any():
                start = np.sum(d, axis=layout.reduced, where=counted) / number
                self.center = np.where(self.count > 0, self.center, start)
            d -= layout.feature_view(self.center)
            offset: Any = np.sum(d, axis=layout.reduced, where=counted) / number
            d -= layout.feature_view(offset)
            np.square(d, out=d)
            m2 = np.sum(d, axis=layout.reduced, where=counted)
        if not np.isfinite(m2).all():
            raise ValueError(_not_finite(block, m2, layout, missing, name))
        total = self.count + count
        weight, delta = count / np.maximum(total, 1), offset - self.offset
        self.m2 += m2 + delta**2 * self.count * weight
        self.offset += weight * delta
        self.count = total

    def statistics(self) -> Any:
        seen = self.count > 0
        if not seen.all():
            warnings.warn(f"there is no value of {_features(~seen)}: its count is 0, and it stays as it is.", UserWarning, stacklevel=3)
        var = np.where(seen, self.m2 / np.maximum(self.count, 1), 1)
        return {"count": self.count, "mean": self.center + self.offset, "var": var}


def _not_finite(block: np.ndarray, m2: np.ndarray, layout: Layout, missing: bool, name: str) -> str:
    where = _features(~np.isfinite(m2))
    if np.isinf(block).any():
        return f"{name} has infinite values, of {where}."
    if np.isnan(block).any() and not missing:
        return f'{name} has NaN, of {where}; with missing="nan" such values are left out.'
    return f"{name} has values whose squares are too large for float64, of {where}."


def _features(which: np.ndarray) -> str:
    places = [place[0] if len(place) == 1 else place for place in zip(*(axis.tolist() for axis in np.nonzero(which)), strict=True)]
    shown = ", ".join(map(str, places[:8])) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    return f"feature{'s' if len(places) > 1 else ''} {shown}"
