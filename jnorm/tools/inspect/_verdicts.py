"""From numbers to words. Every threshold is here, and in the guide."""

from typing import NamedTuple

import numpy as np

from .._layers import RUNNING
from ._measure import CHANNEL, DEAD, EXPLODING, SURE, Signs
from ._report import Finding, LayerReport, Losses

EFFECT = 0.02  # a mean divergence: a shift by a fifth of a standard deviation, or a variance that is wrong by a third
NOISY = 0.25  # the standard error of a mean of 16 independent values, in standard deviations
CAUSE = 0.9  # what explains so much of a difference is its cause
INITIAL, ON_THE_WAY = 0.02, 2 / 3  # how much of the initial values; and of both distances that explains, while weights move
PART = 0.05  # of the loss

# In training they normalize with something else than the mean and variance of the batch.
OTHERWISE = set(RUNNING) - {"BatchNorm", "MeanOnlyBatchNorm"}

RECALIBRATE = "recalibrate (jnorm.tools.recalibrate)"


def findings(layer: LayerReport, signs: Signs, losses: Losses | None) -> tuple[Finding, ...]:
    found = [*_no_numbers(layer), _diverges(layer, signs, losses), _noisy(layer, signs), *_channels(layer)]
    return tuple(finding for finding in (*found, _sensitive(layer, signs, losses)) if finding is not None)


def diverges(layer: LayerReport, signs: Signs) -> bool:
    """On the average of the channels, or in some of them; and beyond the noise of the batches."""
    if layer.kl is None or layer.kl_noise is None:
        return False
    return (layer.kl > EFFECT and layer.kl > SURE * layer.kl_noise) or signs.off > 0


def _no_numbers(layer: LayerReport) -> list[Finding]:
    found = []
    if layer.not_finite:
        text = f"the running statistics of {_of(layer.not_finite, layer)} are NaN or infinite"
        found.append(Finding("not finite", text, f"{RECALIBRATE}; a batch in training had an infinite value, or the loss diverged"))
    if layer.not_finite_scale:
        text = f"the scale of {_of(layer.not_finite_scale, layer)} is NaN or infinite"
        found.append(
            Finding("not finite", text, "take parameters from before: the loss diverged; a smaller learning rate, clipped gradients")
        )
    if layer.not_finite_input:
        text = f"the input of {_of(layer.not_finite_input, layer)} has NaN or infinite values in these batches"
        found.append(Finding("not finite input", text, "look at the first norm that has this: at the data, or at the layers before it"))
    if layer.negative_variance:
        text = f"the running variance of {_of(layer.negative_variance, layer)} is negative, which no average of variances is"
        found.append(Finding("negative variance", text, f"{RECALIBRATE}; look where the statistics are from: converted, or written over"))
    return found


def _diverges(layer: LayerReport, signs: Signs, losses: Losses | None) -> Finding | None:
    if layer.frozen or not diverges(layer, signs):
        return None
    text = f"the running statistics are not those of the batches: the means lie {_distance(layer)} apart{_ratio(layer)}"
    if losses is not None and _costs(layer, losses):
        text += f", and alone they make the loss {layer.loss_without:.3g} more"
    cause = _cause(layer, signs)
    return Finding(cause.kind, text + cause.text, cause.remedy)


class _Cause(NamedTuple):
    kind: str
    text: str
    remedy: str


def _cause(layer: LayerReport, signs: Signs) -> _Cause:
    assert layer.kl is not None
    if signs.explained > ON_THE_WAY and INITIAL < (layer.initial or 0) < 1 + INITIAL:
        memory = f" (they remember {layer.batches_remembered:.0f} batches)" if layer.batches_remembered else ""
        return _Cause(
            "initial values",
            f"; {layer.initial:.0%} of them is still what they started as: too few steps for this momentum{memory}",
            f"{RECALIBRATE}; in training a smaller momentum, or track_count=True, which takes the initial values out",
        )
    of_variances = signs.of_means < (1 - CAUSE) * layer.kl
    if of_variances and signs.within < (1 - CAUSE) * layer.kl:
        return _Cause(
            "small batches",
            "; they are the average within batches, and lack what lies between batches",
            f"{RECALIBRATE} with the pooled estimator; in training larger batches (axis_name, larger groups), or shuffled ones",
        )
    if of_variances and signs.wider > CAUSE:
        return _Cause(
            "noise in training",
            "; the means agree, and nearly all of the running variances are larger: training has noise that these batches are without",
            f"{RECALIBRATE} with dropout off; move dropout behind the last batch norm; augment less before the end of training",
        )
    return _Cause(
        "other data",
        "; they are of other data, or of other weights",
        f"{RECALIBRATE}; if these batches are of training data, a smaller momentum; if not, look whether they are preprocessed alike",
    )


def _noisy(layer: LayerReport, signs: Signs) -> Finding | None:
    if layer.noise is None or signs.noise <= NOISY or layer.frozen:
        return None
    part = "group" if layer.kind == "GhostBatchNorm" else "batch"
    text = f"the mean of one {part} is off by {layer.noise:.2f} standard deviations, as that of {1 / layer.noise**2:.1f} independent values"
    if layer.samples is not None and layer.samples * layer.noise**2 > 4:
        kind, text = "unlike batches", text + f", though a {part} has {layer.samples:.0f}"
        remedy = "shuffle, so that every batch has examples of all kinds; or more examples in a batch: axis_name, larger groups"
    else:
        kind = "few samples"
        remedy = "larger batches or groups, axis_name over devices, cross_mini_batch_norm, batch_renorm, or a norm without the batch in it"
    return Finding(kind, text, remedy)


def _channels(layer: LayerReport) -> list[Finding]:
    found = []
    if layer.dead:
        text = f"the scale of {_of(layer.dead, layer)} is 0, or below {DEAD:g}: nothing of the input comes through"
        found.append(
            Finding("dead channels", text, "no weight decay for scales; a scale that starts at 0 has to have moved; or prune them")
        )
    if layer.constant:
        text = f"the input of {_of(layer.constant, layer)} does not vary"
        found.append(
            Finding(
                "constant input", text, "look for dead units in the layer before, or for features that are always the same; or prune them"
            )
        )
    if layer.below_epsilon:
        text = f"the variance of {_of(layer.below_epsilon, layer)} is less than epsilon, which then decides"
        found.append(Finding("below epsilon", text, "a smaller epsilon, or larger initial weights or inputs in the layer before"))
    if layer.exploding:
        text = (
            f"the scale of {_of(layer.exploding, layer)} is {EXPLODING:g} times that of the others, or of 1 (at most {layer.scale_max:.3g})"
        )
        found.append(
            Finding(
                "exploding scale", text, "a smaller learning rate or clipped gradients; freeze the scale or decay it; start anew from 1"
            )
        )
    return found


def _sensitive(layer: LayerReport, signs: Signs, losses: Losses | None) -> Finding | None:
    """Where the numbers of the statistics themselves do not tell."""
    if losses is None or diverges(layer, signs) or not _costs(layer, losses):
        return None
    text = f"the running statistics are hardly other than those of the batches, but alone they make the loss {layer.loss_without:.3g} more"
    return Finding("sensitive", text, f"{RECALIBRATE}; a loss that so little matters for is fragile: train longer, or regularize")


def _costs(layer: LayerReport, losses: Losses) -> bool:
    """Whether the running statistics of this layer matter, where all others are those of the batches."""
    return layer.loss_without is not None and layer.loss_without > PART * abs(losses.means[0])


def _of(channels: tuple[int, ...], layer: LayerReport) -> str:
    some = ", ".join(map(str, channels[:5])) + (", …" if len(channels) > 5 else "")
    return f"{len(channels)} of {layer.channels} channels ({some})"


def _distance(layer: LayerReport) -> str:
    return f"{layer.mean_distance:.2g} standard deviations (at most {layer.mean_distance_max:.2g})"


def _ratio(layer: LayerReport) -> str:
    return (
        ""
        if layer.var_ratio is None
        else f", the variances are {layer.var_ratio:.2g} times theirs (off by {layer.var_ratio_max:.2g} at most)"
    )


# --- All of it ----------------------------------------------------------------------------------------------------------------


def overall(layers: list[LayerReport], losses: Losses | None) -> str:
    running = [layer for layer in layers if layer.used]
    wrong = [layer for layer in layers if layer.findings]
    if not running:
        text = "None of these norms has running statistics that were used: they do the same in training and in evaluation."
        return text + _counted(wrong, layers)
    finite = losses is None or bool(np.isfinite(losses.means).all())
    return (_of_losses(losses, running) if losses is not None else "") + _counted(wrong, layers, finite).strip()


def _counted(wrong: list[LayerReport], layers: list[LayerReport], finite: bool = True) -> str:
    if not wrong and not finite:
        return " No norm has findings: look at the data, at the weights, and at the loss itself."
    if not wrong:
        return f" Nothing is wrong with the {len(layers)} norms." if len(layers) > 1 else " Nothing is wrong with the norm."
    kinds = dict.fromkeys(finding.kind for layer in wrong for finding in layer.findings)
    numbers = [f"{sum(any(f.kind == kind for f in layer.findings) for layer in wrong)} × {kind}" for kind in kinds]
    return f" {len(wrong)} of {len(layers)} norms ha{'s' if len(wrong) == 1 else 've'} findings: {', '.join(numbers)}."


def _of_losses(losses: Losses, layers: list[LayerReport]) -> str:
    running, pooled, own = losses.means
    text = f"In evaluation the loss of these batches is {running:.4g}; {own:.4g} {_own(losses)}; "
    text += f"{pooled:.4g} with those of all of them, as after recalibrate. "
    if running == pooled == own and any(layer.kl for layer in layers):
        return text + "It does not depend on the statistics at all: has the loss to use the state that it is given, in evaluation mode? "
    if not np.isfinite(losses.means).all():
        return text + ("Evaluation gives no finite loss. " if not np.isfinite(running) else "Not each of these losses is finite. ")
    if not significant(losses.running, losses.own):
        return text + _no_gap(losses, layers)
    gap, left = running - own, pooled - own
    text += f"The gap of {gap:.3g} is due to the norms; recalibrate closes {min(max(1 - left / gap, 0), 1):.0%} of it. "
    if significant(losses.pooled, losses.own):
        text += (
            "The rest is due to what a batch's own statistics tell of it: larger or shuffled batches, or a norm without the batch in it. "
        )
    worst = max(layers, key=lambda layer: layer.loss_without or 0)
    return text + (f"Most is due to {worst.path!r}. " if len(layers) > 1 and _costs(worst, losses) else "")


def _own(losses: Losses) -> str:
    return "with the norms in training mode" if losses.as_in_training else "with each batch's own statistics"


def _no_gap(losses: Losses, layers: list[LayerReport]) -> str:
    others = sorted({layer.kind for layer in layers if layer.kind in OTHERWISE})
    if others and not losses.as_in_training:
        return f"What gap the norms make is not told by that: {', '.join(others)} normalize with something else in training. "
    text = "The norms make no gap between training and evaluation on these batches"
    if not losses.as_in_training and any(layer.kind is None for layer in layers):
        text += ", if they are batch norms, which train with each batch's own statistics"
    return text + ": look at overfitting, dropout and other data. "


def significant(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether the first is more, by a part of it that matters, and by three standard errors of the batches' differences."""
    difference = np.subtract(one, other)
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    mean = float(difference.mean())
    return mean > PART * abs(float(np.mean(other))) and mean > SURE**0.5 * error


__all__ = ["CHANNEL", "diverges", "findings", "overall", "significant"]
