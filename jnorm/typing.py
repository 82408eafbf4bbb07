"""Types of jnorm's public functions."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from jaxtyping import Array, ArrayLike, Complex, Float

Axes = int | Sequence[int]
AxisName = Hashable | Sequence[Hashable]
AxisIndexGroups = Sequence[Sequence[int]]
Mask = ArrayLike
Activation = str | Callable[[Array], Array]
Momentum = float | Array | None
Map = Callable[[Any, Any], tuple]
Save = Literal["input", "output"]


class BatchNormState(TypedDict):
    """Running statistics of :func:`jnorm.batch_norm` and :func:`jnorm.tracked_instance_norm`; also Flax's `batch_stats` entry."""

    mean: Float[Array, "*features"] | Complex[Array, "*features"]
    var: Float[Array, "*features"]
    count: NotRequired[Float[Array, ""]]


class SpectralNormState(TypedDict):
    """The power iteration of :func:`jnorm.reparam.spectral_norm`: the last right singular vector and singular value."""

    u: Float[Array, "1 c"]
    sigma: Float[Array, ""]


__all__ = ["Activation", "Axes", "AxisIndexGroups", "AxisName", "BatchNormState", "Map", "Mask", "Momentum", "Save", "SpectralNormState"]
