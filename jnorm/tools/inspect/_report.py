"""What was found: numbers and words, for people and for programs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a layer.

    Args:
      kind: one or two words, the same for all such findings.
      text: what was found, in numbers.
      remedy: what to do.
    """

    kind: str
    text: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The numbers of a norm, over its channels that are numbers; and what is wrong with it. What cannot be told is None.

    Args:
      path: of the norm in the model.
      kind: its class, where that is known.
      channels: how many.
      findings: what is wrong; nothing, as a rule.
      frozen: its running statistics normalize in training too.
      used: it has running statistics, and the step called it.
      samples: how many values of a channel a batch has; a group of an NNX model's ghost batch norm. In a tree that norm is like others:
        a batch counts.
      noise: the standard error of the mean of these, in standard deviations: root mean square.
      batches_remembered: how many batches the running averages remember: the count of those that count, else 1 / (1 − momentum).
      mean_distance: d, root mean square.
      mean_distance_max: d, the largest.
      var_ratio: r, the geometric mean.
      var_ratio_max: the largest factor by which r is off, up or down.
      kl: the divergence of the batches' Gaussian from the running one, the mean.
      kl_max: the largest.
      kl_noise: what the mean divergence would be if nothing was wrong, by the noise of the batches.
      initial: the part of the running averages that is still what they started as (0 and 1), by least squares.
      scale_min: the smallest magnitude of the scale.
      scale_max: the largest.
      gain_max: the largest magnitude of scale / sqrt(var + epsilon).
      dead: the channels whose scale is 0, or nearly.
      constant: those whose input does not vary.
      below_epsilon: those whose variance is less than epsilon.
      exploding: those whose scale is far too large.
      not_finite: those whose running statistics are NaN or infinite.
      not_finite_scale: those whose scale is.
      not_finite_input: those whose input in the batches is.
      negative_variance: those whose running variance is below 0.
      loss_alone: what changes in the loss of evaluation if this layer alone has the statistics of the batches.
      loss_without: what changes in the loss with the statistics of the batches if this layer alone has the running ones.
    """

    path: str
    kind: str | None
    channels: int
    findings: tuple[Finding, ...] = ()
    frozen: bool = False
    used: bool = False
    samples: float | None = None
    noise: float | None = None
    batches_remembered: float | None = None
    mean_distance: float | None = None
    mean_distance_max: float | None = None
    var_ratio: float | None = None
    var_ratio_max: float | None = None
    kl: float | None = None
    kl_max: float | None = None
    kl_noise: float | None = None
    initial: float | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    gain_max: float | None = None
    dead: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    below_epsilon: tuple[int, ...] = ()
    exploding: tuple[int, ...] = ()
    not_finite: tuple[int, ...] = ()
    not_finite_scale: tuple[int, ...] = ()
    not_finite_input: tuple[int, ...] = ()
    negative_variance: tuple[int, ...] = ()
    loss_alone: float | None = None
    loss_without: float | None = None

    @property
    def verdict(self) -> str:
        """All findings in words, with what to do."""
        return " ".join(f"{_sentence(f.text)} {_sentence(f.remedy)}" for f in self.findings) or "Nothing is wrong."


@dataclasses.dataclass(frozen=True)
class Losses:
    """Of each batch, in evaluation mode, with three kinds of statistics.

    Args:
      running: as the model is.
      pooled: those of all batches together: as after :func:`jnorm.tools.recalibrate`.
      own: those of the batch itself.
      as_in_training: whether `own` is with the norms in training mode, without dropout, whatever they normalize with there: of NNX models.
        Else it is in evaluation mode, with the mean and variance of the batch, which is what batch norm has in training, and others have
        not: ghost, cross mini-batch and cross-iteration batch norm, batch renorm, tracked instance norm.
    """

    running: tuple[float, ...]
    pooled: tuple[float, ...]
    own: tuple[float, ...]
    as_in_training: bool = False

    @property
    def means(self) -> tuple[float, float, float]:
        """Running, pooled and own, over the batches."""
        running, pooled, own = (float(np.mean(a)) for a in (self.running, self.pooled, self.own))
        return running, pooled, own


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What :func:`jnorm.tools.inspect_norms` found. `print` shows a table.

    Args:
      layers: in the order of the state, or of an NNX model in the one that the step calls them in.
      losses: None without a loss.
      batches: how many there were.
      verdict: of all of it, in words.
    """

    layers: tuple[LayerReport, ...]
    losses: Losses | None
    batches: int
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and words, which `json.dumps` takes."""
        return _plain({**dataclasses.asdict(self), "layers": [{**dataclasses.asdict(a), "verdict": a.verdict} for a in self.layers]})

    def print(self, console: Any = None) -> None:
        """Shows the table and the verdicts in the terminal.

        Args:
          console: a `rich.console.Console`; None: one for the standard output.
        """
        from ._table import show

        show(self, console)

    def __str__(self) -> str:
        from ._table import as_text

        return as_text(self)

    def __repr__(self) -> str:
        wrong = sum(bool(layer.findings) for layer in self.layers)
        return f"Report({len(self.layers)} norms, {wrong} with findings, {self.batches} batches)"

    def plot(self, path: str | Path | None = None) -> Any:
        """A figure: distances, ratios, divergences and sensitivities of all layers that have running statistics.

        Args:
          path: where to save it, as an image of the type of its suffix; None: not at all.

        Returns:
          The `matplotlib.figure.Figure`.
        """
        from ._figure import draw

        return draw(self, path)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _plain(value: Any) -> Any:
    """What is no number is None: JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
