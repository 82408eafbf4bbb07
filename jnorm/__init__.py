"""jnorm: the normalization library for JAX and Flax.

Every norm is a pure function; running statistics are an explicit dict that goes in and comes out. `jnorm.reparam` holds the
reparametrizations of weights; `jnorm.linen` and `jnorm.nnx`, which are imported by their own names, the same as Flax modules.
"""

from . import reparam as reparam
from ._kernels._library import kernels as kernels
from ._kernels._library import kernels_status as kernels_status
from ._norms.add_norm import add_layer_norm as add_layer_norm
from ._norms.add_norm import add_rms_norm as add_rms_norm
from ._norms.batch_norm import batch_norm as batch_norm
from ._norms.batch_norm import batch_norm_state as batch_norm_state
from ._norms.group_norm import group_norm as group_norm
from ._norms.instance_norm import instance_norm as instance_norm
from ._norms.layer_norm import layer_norm as layer_norm
from ._norms.layer_norm import rms_norm as rms_norm
from ._norms.tracked_instance_norm import tracked_instance_norm as tracked_instance_norm
from ._pipeline.axes import pad_batch as pad_batch
from ._pipeline.moments import moments as moments
from ._pipeline.normalize import normalize as normalize
from ._stats import Stats as Stats
from ._stats import combine as combine

__version__ = "0.1.0"

__all__ = [
    "Stats",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_norm_state",
    "combine",
    "group_norm",
    "instance_norm",
    "kernels",
    "kernels_status",
    "layer_norm",
    "moments",
    "normalize",
    "pad_batch",
    "rms_norm",
    "tracked_instance_norm",
]
