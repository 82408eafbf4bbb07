"""The numbers of a layer, from its statistics: NumPy in float64."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..population import AVERAGES
from ._collect import Found, flat

ROUNDING = 4 * 2.0**-24  # of a mean in float32
DEAD, EXPLODING = 1e-3, 100.0
SURE = 9.0  # three standard errors, squared as the divergence is
CHANNEL = 0.5  # the divergence of a shift by one standard deviation
TINY = float(np.finfo(np.float64).tiny)


class Signs(NamedTuple):
    """What the causes of a divergence are told by."""

    off: int = 0  # channels that diverge by a standard deviation, beyond noise
    of_means: float = 0.0  # the part of the divergence that is due to the means
    wider: float = 0.0  # the fraction of channels whose running variance is the larger one
    within: float = np.inf  # the divergence of the running variance from the mean variance within the batches
    explained: float = 0.0  # how much of the difference is a part of the initial values
    noise: float = 0.0  # what the noise is at least


def measure(
    found: Found, state: Mapping[str, Any], epsilon: float, memory: tuple[float | None, float], scale: np.ndarray | None
) -> tuple[dict[str, Any], Signs]:
    """The fields of a `LayerReport` of running statistics, and signs."""
    stored = {key: flat(state[key]) for key in AVERAGES if key in state}
    divides = "mean" in stored and len(stored) > 1
    (mean, var), (mean_b, var_b) = (_moments(s, epsilon, divides) for s in (stored, found.pooled))
    finite, negative = np.isfinite(mean) & np.isfinite(var), _negative(stored)
    counted = found.counts.any(0)
    of_input = np.isfinite(mean_b) & np.isfinite(var_b)
    numbers: dict[str, Any] = {
        "channels": len(mean),
        "used": bool(counted.any()),
        "not_finite": _which(~finite),
        "not_finite_input": _which(counted & ~of_input),
        "negative_variance": _which(finite & negative),
        "batches_remembered": memory[0],
        "gain_max": _largest(_magnitude(scale, len(mean)) / np.sqrt(np.maximum(var, TINY))),
    }
    there = counted & finite & ~negative & of_input
    if not there.any():
        return numbers | _of_scale(scale, len(mean)), Signs()
    each = {key: a[:, there] for key, a in found.each.items()}
    mean_each, var_each = _moments(each, epsilon, divides)
    count = found.counts[:, there]
    mean, var, mean_b, var_b = (a[there] for a in (mean, np.maximum(var, TINY), mean_b, np.maximum(var_b, TINY)))
    distance, ratio = abs(mean - mean_b) / np.sqrt(var_b), var / var_b
    divergence = _divergence(ratio, distance**2)
    noise, noise_of_var = _noise(count, mean_each, var_each, var_b, divides)
    kl_noise = 0.5 * (noise + 0.5 * noise_of_var) * (1 / len(count) + memory[1])
    alone = _moments(found.pooled, 0.0, divides)[1][there]
    constant = divides & (alone <= (ROUNDING * abs(mean_b)) ** 2)
    samples = count[count > 0].mean()
    numbers |= {
        "samples": float(samples) if np.isfinite(samples) else None,
        "noise": float(np.sqrt(noise)) if divides else None,
        "mean_distance": float(np.sqrt(np.mean(distance**2))),
        "mean_distance_max": float(distance.max()),
        "var_ratio": float(np.exp(np.log(ratio).mean())) if divides else None,
        "var_ratio_max": float(np.exp(abs(np.log(ratio)).max())) if divides else None,
        "kl": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "kl_noise": float(kl_noise),
        "constant": _which(constant, there),
        "below_epsilon": _which(divides & (alone < epsilon) & ~constant, there),
    } | _of_scale(scale, len(there))
    within = np.maximum(_within(count > 0, var_each), TINY)
    freedom = max((len(count) - 1) * len(distance), 1)
    signs = Signs(
        off=int(np.sum((divergence > CHANNEL) & (divergence > (SURE + 2 * np.log(len(distance))) * kl_noise))),
        of_means=float(np.mean(0.5 * distance**2 / ratio)),
        wider=float(np.mean(ratio > 1)),
        within=float(_divergence(var / within, 0).mean()) if divides else np.inf,
        # By two standard errors of a sum of squares; what independent values have is sure.
        noise=max(noise / (1 + 2 * np.sqrt(2 / freedom)), 1 / samples) ** 0.5 if divides else 0.0,
    )
    if "count" not in state:
        initial, explained = _initial(stored, found.pooled, there)
        numbers["initial"], signs = (initial if explained > 0 else None), signs._replace(explained=explained)
    return numbers, signs


def of_groups(numbers: dict[str, Any], signs: Signs, groups: int | None) -> tuple[dict[str, Any], Signs]:
    """Where the parts of a batch have statistics of their own; None: where each example has, of which no noise is told."""
    if groups is None:
        return {**numbers, "samples": None, "noise": None}, signs._replace(noise=0.0)
    samples, noise = numbers.get("samples"), numbers.get("noise")
    numbers = numbers | {"samples": samples and samples / groups, "noise": noise and noise * groups**0.5}
    return numbers, signs._replace(noise=signs.noise * groups**0.5)


def measure_scale(scale: np.ndarray | None) -> dict[str, Any]:
    """The fields of a `LayerReport` of a norm without running statistics."""
    size = 0 if scale is None else scale.size
    return {"channels": size, **_of_scale(scale, size)}


def _moments(averages: Mapping[str, np.ndarray], epsilon: float, divides: bool) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and the variance that is divided by: 1 of norms that do not divide."""
    if not divides:
        return averages["mean"], np.ones(averages["mean"].shape)
    return averages["mean"], np.real(averages["var"] if "var" in averages else averages["std"] ** 2) + epsilon


def _negative(stored: Mapping[str, np.ndarray]) -> np.ndarray:
    second = next((stored[key] for key in ("var", "std") if key in stored), None)
    return np.zeros(len(next(iter(stored.values()))), bool) if second is None else np.real(second) < 0


def _divergence(ratio: np.ndarray, squared_distance: Any) -> np.ndarray:
    return 0.5 * (np.log(ratio) + (1 + squared_distance) / ratio - 1)


def _noise(count: np.ndarray, mean_each: np.ndarray, var_each: np.ndarray, var: np.ndarray, divides: bool) -> tuple[float, float]:
    """The variances of one batch's mean and variance, in units of the variance and its square: the averages over channels.

    From how far the batches lie apart, but no less than of independent values; of a single batch as of independent values.
    """
    there, values = count > 0, 1 / np.maximum(count, 1)
    number = there.sum(0)
    least = float(np.mean(np.where(there, values, 0).sum(0) / number))

    def between(a: np.ndarray) -> np.ndarray:
        apart = a - np.where(there, a, 0).sum(0) / number
        return np.where(there, abs(apart) ** 2, 0).sum(0) / np.maximum(number - 1, 1)

    of_mean = between(mean_each) / var
    of_var = between(var_each) / np.maximum(_within(there, var_each), TINY) ** 2
    return max(float(of_mean.mean()), least), max(float(of_var.mean()), 2 * least * divides)


def _within(there: np.ndarray, var_each: np.ndarray) -> np.ndarray:
    """The average of the batches' variances."""
    return np.where(there, var_each, 0).sum(0) / there.sum(0)


def _initial(stored: Mapping[str, np.ndarray], pooled: Mapping[str, np.ndarray], there: np.ndarray) -> tuple[float, float]:
    """w of: stored = w·initial + (1 − w)·pooled, by least squares over channels and averages; and how well it does.

    That is, how much of the distance to either of the two it explains, the lesser of both: statistics of other data, which happen to have a
    mean near 0 and a variance near 1, are not on the way from there to the batches' ones.
    """
    lines: list[tuple[np.ndarray, np.ndarray]] = []
    second = next((key for key in ("var", "std") if key in stored), None)
    wide = 1.0 if second is None else np.sqrt(1 + abs(pooled[second][there]) ** (2 if second == "std" else 1))
    for key, start in (("mean", 0.0), *(((second, 1.0),) if second else ())):
        unit = wide if key != "var" else wide**2  # of the same size, whichever of the two is large
        lines.append(((start - pooled[key][there]) / unit, (stored[key][there] - pooled[key][there]) / unit))
    whole, part = (np.concatenate(a) for a in zip(*lines, strict=True))
    length = _squared(whole)
    if length < TINY:
        return 0.0, 0.0
    w = float(np.vdot(whole, part).real) / length
    left = _squared(part - w * whole)
    return w, 1 - max(left / max(_squared(a), TINY) for a in (part, whole - part))


def _squared(a: np.ndarray) -> float:
    return float(np.vdot(a, a).real)


def _magnitude(scale: np.ndarray | None, channels: int) -> np.ndarray:
    return np.ones(channels) if scale is None else abs(flat(scale))


def _of_scale(scale: np.ndarray | None, channels: int) -> dict[str, Any]:
    if scale is None:
        return {}
    size = _magnitude(scale, channels)
    finite = size[np.isfinite(size)]
    living = finite[finite > DEAD]
    usual = min(float(np.median(living)), 1.0) if living.size else 1.0
    return {
        "scale_min": float(finite.min()) if finite.size else None,
        "scale_max": float(finite.max()) if finite.size else None,
        "dead": _which(size <= DEAD),
        "exploding": _which(np.isfinite(size) & (size > EXPLODING * usual)),
        "not_finite_scale": _which(~np.isfinite(size)),
    }


def _which(flags: Any, among: np.ndarray | None = None) -> tuple[int, ...]:
    channels = np.arange(len(flags)) if among is None else np.flatnonzero(among)
    return tuple(int(c) for c in channels[np.broadcast_to(flags, channels.shape)])


def _largest(a: np.ndarray) -> float | None:
    return float(a[np.isfinite(a)].max()) if np.isfinite(a).any() else None
