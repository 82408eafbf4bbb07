"""jnorm as Flax NNX modules: the classes of `flax.nnx` that normalize, with their arguments, defaults and variables, and more."""

from ._residual import AddLayerNorm as AddLayerNorm
from ._residual import AddRMSNorm as AddRMSNorm
from ._running import BatchNorm as BatchNorm
from ._running import TrackedInstanceNorm as TrackedInstanceNorm
from ._stateless import GroupNorm as GroupNorm
from ._stateless import InstanceNorm as InstanceNorm
from ._stateless import LayerNorm as LayerNorm
from ._stateless import RMSNorm as RMSNorm
from ._weights import SpectralNorm as SpectralNorm
from ._weights import WeightNorm as WeightNorm
from ._weights import WeightStandardization as WeightStandardization

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "SpectralNorm",
    "TrackedInstanceNorm",
    "WeightNorm",
    "WeightStandardization",
]
