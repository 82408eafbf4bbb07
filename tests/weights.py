"""The weights that the wrappers use, and what a layer makes of them, in float64 NumPy from the formulas."""

import itertools

import numpy as np
import pytest

from oracles import Bounded, wide

WRAPPERS = ("WeightNorm", "SpectralNorm", "WeightStandardization")


def every_other(*lists):
    """All combinations; every second one, in a checkerboard, in the default run."""
    rows = itertools.product(*(enumerate(values) for values in lists))
    slow = pytest.mark.slow
    return [pytest.param(*(v for _, v in row), marks=[slow] if sum(i for i, _ in row) % 2 else []) for row in rows]


def normalized(name, kernel, scale=None, u=None):
    """-> (the weight, {"u", "sigma"} of the power iteration or {}). The defaults of the classes; features are the last axis."""
    kernel = wide(kernel)
    rows, g = tuple(range(kernel.ndim - 1)), 1 if scale is None else wide(scale)
    if name == "WeightNorm":
        w = g * kernel / np.sqrt((kernel**2).sum(rows) + 1e-12)
        return Bounded(w, abs(w)), {}
    if name == "WeightStandardization":
        centered = kernel - kernel.mean(rows)
        w = g * centered / (np.sqrt((centered**2).sum(rows) / (kernel[..., 0].size - 1)) + 1e-5)
        return Bounded(w, abs(g) * (1 + abs(w))), {}
    matrix = kernel.reshape(-1, kernel.shape[-1])
    v = unit(wide(u) @ matrix.T)
    u = unit(v @ matrix)
    sigma = (v @ matrix @ u.T)[0, 0]
    # What v and sigma are added up from is larger than they are: a component cancels where u or v is orthogonal to it.
    spread = (abs(v) @ abs(matrix) @ abs(u).T)[0, 0] / sigma
    return Bounded(kernel / sigma, abs(kernel / sigma) * (1 + spread)), {"u": u, "sigma": sigma}


def unit(a):
    return a / np.sqrt((a**2).sum() + 1e-12)


def dense(x, weight, bias):
    """x @ weight + bias with the sizes of the sums."""
    x = wide(x)
    return Bounded(x @ weight.value + wide(bias), abs(x) @ weight.size + abs(wide(bias)))


def conv(x, weight, bias):
    """A convolution without padding; x is (n, height, width, channels)."""
    taps = weight.value.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(wide(x), taps, (1, 2))
    sums = [np.einsum("nhwcij,ijco->nhwo", a, w) for a, w in ((windows, weight.value), (abs(windows), weight.size))]
    return Bounded(sums[0] + wide(bias), sums[1] + abs(wide(bias)))


def terms(kernel):
    """How many numbers an output of a layer with this kernel adds up: to normalize (three sums in a power iteration), and to multiply."""
    return 4 * (kernel.size // kernel.shape[-1]) + kernel.shape[-1]
