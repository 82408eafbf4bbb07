"""Inputs, and the outputs and gradients in float64 NumPy that everything is compared with before it is timed.

NumPy alone, written from the formulas, so that the process of PyTorch and that of JAX make the same arrays.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np

from .cases import Case

Arrays = dict[str, np.ndarray]
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9}  # the rounding error of one operation


def rounded(a: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that are exact in `dtype`."""
    return a.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else a.astype(np.float32)


def inputs(case: Case, seed: int = 0) -> Arrays:
    """x, residual, dy and ds (the cotangent of x + residual) from N(0, 1), and the parameters."""
    rng = np.random.default_rng(seed)
    names = ["x", *(["residual"] if case.has_residual else []), "dy", *(["ds"] if case.op == "add" else [])]
    arrays = {name: rounded(rng.standard_normal(case.shape, np.float32), case.dtype) for name in names}
    arrays |= parameters(case.channels)
    if case.activation == "relu":
        # At the kink, the rounding of its argument decides the derivative: nothing is asked for there.
        arrays["dy"][np.abs(preactivation(case, arrays)) < 32 * UNIT[case.dtype]] = 0
    return arrays


def parameters(channels: int) -> Arrays:
    """scale and bias, and mean and var, the running statistics: exact in bfloat16 for every dtype, so that a library which keeps them so is
    not charged with it."""
    rng = np.random.default_rng(1)
    arrays = {
        "scale": 1 + 0.1 * rng.standard_normal(channels),
        "bias": 0.1 * rng.standard_normal(channels),
        "mean": 0.1 * rng.standard_normal(channels),
        "var": 1 + 0.1 * rng.random(channels),
    }
    return {name: rounded(a, "bfloat16") for name, a in arrays.items()}


def _axes(case: Case, ndim: int) -> tuple[int, ...]:
    if case.norm in ("layer_norm", "rms_norm"):
        return (ndim - 1,)
    return tuple(range(ndim - 1)) if case.norm == "batch_norm" else tuple(range(1, ndim - 2)) + (ndim - 1,)


def _split(case: Case, a: np.ndarray) -> np.ndarray:
    """Channels as (groups, channels of a group) where groups share statistics."""
    if case.norm not in ("group_norm", "instance_norm"):
        return a
    return a.reshape(*a.shape[:-1], case.groups, a.shape[-1] // case.groups)


def reduced(case: Case) -> int:
    """How many values a mean is taken over, at most: of a row, of a channel, or of the gradient of scale."""
    return max(math.prod(case.shape) // case.channels, case.channels)


def _standardized(case: Case, x: np.ndarray, running: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """(x̂, 1/σ), with groups split."""
    x = _split(case, x)
    if running is not None:
        mean, var = running
    else:
        axes = _axes(case, x.ndim)
        mean = 0.0 if case.norm == "rms_norm" else x.mean(axes, keepdims=True)
        var = np.square(x - mean).mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + case.epsilon)
    return (x - mean) * rstd, rstd


def _activate(case: Case, z: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
    """The activation of z and its derivative."""
    if case.activation == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if case.activation == "silu":
        gate = 1 / (1 + np.exp(-z))
        return z * gate, gate * (1 + z * (1 - gate))
    return z, 1.0


def preactivation(case: Case, given: Arrays) -> np.ndarray:
    hat, _ = _standardized(case, given["x"].astype(np.float64), None)
    return _affine(case, given, hat.reshape(case.shape))


def _affine(case: Case, given: Arrays, flat: np.ndarray) -> np.ndarray:
    z = flat * given["scale"] + (given["bias"] if case.has_bias else 0)
    return z + given["residual"] if case.op == "add_act" else z


def expected(case: Case, given: Arrays) -> Arrays:
    """y, and for what trains dx, dscale, dbias, and dresidual or the sum, in float64."""
    wide = {k: v.astype(np.float64) for k, v in given.items()}
    x = wide["x"] + wide["residual"] if case.op == "add" else wide["x"]
    hat, rstd = _standardized(case, x, (wide["mean"], wide["var"]) if case.op == "eval" else None)
    flat = hat.reshape(x.shape)
    y, slope = _activate(case, _affine(case, wide, flat))
    if not case.trains:
        return {"y": y}
    g = wide["dy"] * slope
    outer = tuple(range(x.ndim - 1))
    wanted = {"y": y, "dscale": (g * flat).sum(outer)}
    if case.has_bias:
        wanted["dbias"] = g.sum(outer)
    wanted["dx"] = _input_gradient(case, g * wide["scale"], hat, rstd).reshape(x.shape)
    if case.op == "add":
        wanted |= {"sum": x, "dx": wanted["dx"] + wide["ds"]}
    if case.op == "add_act":
        wanted["dresidual"] = g
    return wanted


def _input_gradient(case: Case, g: np.ndarray, hat: np.ndarray, rstd: np.ndarray) -> np.ndarray:
    g, axes = _split(case, g), _axes(case, hat.ndim)
    centered = g if case.norm == "rms_norm" else g - g.mean(axes, keepdims=True)
    return rstd * (centered - hat * (g * hat).mean(axes, keepdims=True))


def errors(got: dict[str, Any], wanted: Arrays) -> dict[str, float]:
    """The largest error of each array, relative to its largest value. Non-finite results count as infinite."""
    found = {}
    for name, want in wanted.items():
        worst = np.abs(np.asarray(got[name], np.float64).reshape(want.shape) - want).max()
        found[name] = float(worst / max(np.abs(want).max(), 1e-30)) if np.isfinite(worst) else math.inf
    return found


def tolerance(case: Case, fused: bool = False) -> float:
    """Two roundings to x's dtype, of the result and of what a fused operation before it may round, and the float32 arithmetic: about 16
    operations, and a sum over n values, whose roundings walk at random. Twice that for the largest of many. A sum that comes out is rounded
    before it is normalized. After the norm, unless that is `fused`, as in jnorm, a residual rounds once more, SiLU and its derivative four
    times."""
    after = 0 if fused else (case.op == "add_act") + 4 * (case.activation == "silu")
    return 2 * (2 + (case.op == "add") + after) * UNIT[case.dtype] + 4 * UNIT["float32"] * (16 + math.sqrt(reduced(case)))
