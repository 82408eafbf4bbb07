"""What a model of another library holds, by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._convolutions import Convolution
from ._norm import Norm


class Weights(NamedTuple):
    """What a model of another library holds: made by `weights_of_keras`, `weights_of_haiku` and `weights_of_equinox`.

    Args:
      values: arrays by layer and name, as "encoder.dense.kernel", in Flax's layouts: kernel and bias, embedding, scale and bias, mean and
        var. Those of norms are without axes of size 1, and kernels of attention are matrices.
      norms: by layer, with the hyperparameters, where the source has them.
      plain: kernels as they are used, by the name of one that is normalized, for a model that does not normalize it.
      steps: how many steps a debiased average of that layer made, where the momentum is not known.
      debiased: what such averages are made from.
      heads: how many an attention has, where the source tells.
      convolutions: by layer, its strides, dilation, groups and padding, where the source tells.
    """

    values: dict[str, np.ndarray]
    norms: dict[str, Norm]
    plain: dict[str, np.ndarray]
    steps: dict[str, int]
    debiased: dict[str, dict[str, np.ndarray]]
    heads: dict[str, int]
    convolutions: dict[str, Convolution]

    def without_options(self) -> "Weights":
        """The values alone, as of a source that has no hyperparameters."""
        return self._replace(norms={}, steps={}, debiased={}, heads={}, convolutions={})


def no_weights() -> Weights:
    return Weights({}, {}, {}, {}, {}, {}, {})


def note(weights: Weights, name: str, arrays: Mapping[str, Any]) -> None:
    """Adds a layer's arrays, whose names no other has."""
    for key, a in arrays.items():
        if a is None:
            continue
        if (full := dotted(name, key)) in weights.values:
            raise ValueError(f"two layers of the source have weights of the name {full!r}: rename one of them there.")
        weights.values[full] = a


def note_norm(weights: Weights, name: str, norm: Norm) -> None:
    arrays = {key: getattr(norm, key) for key in ("scale", "bias", "mean", "var")}
    note(weights, name, {key: None if a is None else a.reshape(squeezed(a.shape)) for key, a in arrays.items()})
    weights.norms[name] = norm


def dotted(*names: str) -> str:
    return ".".join(name for name in names if name)


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of size 1, but of one axis at least."""
    return tuple(n for n in shape if n != 1) or (1,)
