"""jnorm: the normalization library for JAX and Flax.

Every norm is a pure function; running statistics are an explicit dict that goes in and comes out. `jnorm.reparam` holds the
reparametrizations of weights; `jnorm.linen` and `jnorm.nnx`, which are imported by their own names, the same as Flax modules; and
`jnorm.tools`, likewise, what a normalized model needs beside its training.
"""

from . import reparam as reparam
from ._kernels._library import kernels as kernels
from ._kernels._library import kernels_status as kernels_status
from ._norms.add_norm import add_layer_norm as add_layer_norm
from ._norms.add_norm import add_rms_norm as add_rms_norm
from ._norms.batch_norm import batch_norm as batch_norm
from ._norms.batch_norm import batch_norm_state as batch_norm_state
from ._norms.batch_renorm import batch_renorm as batch_renorm
from ._norms.batch_renorm import batch_renorm_state as batch_renorm_state
from ._norms.batch_renorm import renorm_schedules as renorm_schedules
from ._norms.cross_iteration_batch_norm import cross_iteration_batch_norm as cross_iteration_batch_norm
from ._norms.cross_iteration_batch_norm import cross_iteration_batch_norm_state as cross_iteration_batch_norm_state
from ._norms.cross_mini_batch_norm import cross_mini_batch_norm as cross_mini_batch_norm
from ._norms.cross_mini_batch_norm import cross_mini_batch_norm_state as cross_mini_batch_norm_state
from ._norms.divisive_batch_norm import divisive_batch_norm as divisive_batch_norm
from ._norms.divisive_norm import divisive_norm as divisive_norm
from ._norms.eval_norm import eval_norm as eval_norm
from ._norms.eval_norm_fit import eval_norm_fit as eval_norm_fit
from ._norms.eval_norm_fit import eval_norm_fit_state as eval_norm_fit_state
from ._norms.eval_norm_fit import eval_norm_weights as eval_norm_weights
from ._norms.feature_standardization import feature_statistics as feature_statistics
from ._norms.feature_standardization import feature_statistics_state as feature_statistics_state
from ._norms.feature_standardization import merge_feature_statistics as merge_feature_statistics
from ._norms.feature_standardization import standardize_features as standardize_features
from ._norms.feature_standardization import unstandardize_features as unstandardize_features
from ._norms.filter_response_norm import filter_response_norm as filter_response_norm
from ._norms.filter_response_norm import thresholded_linear_unit as thresholded_linear_unit
from ._norms.ghost_batch_norm import ghost_batch_norm as ghost_batch_norm
from ._norms.group_norm import group_norm as group_norm
from ._norms.instance_norm import instance_norm as instance_norm
from ._norms.layer_norm import layer_norm as layer_norm
from ._norms.layer_norm import rms_norm as rms_norm
from ._norms.local_response_norm import local_response_norm as local_response_norm
from ._norms.mean_only_batch_norm import mean_only_batch_norm as mean_only_batch_norm
from ._norms.mean_only_batch_norm import mean_only_batch_norm_state as mean_only_batch_norm_state
from ._norms.tracked_instance_norm import tracked_instance_norm as tracked_instance_norm
from ._pipeline.accumulate import accumulated_moments as accumulated_moments
from ._pipeline.axes import pad_batch as pad_batch
from ._pipeline.moments import moments as moments
from ._pipeline.normalize import normalize as normalize
from ._pipeline.running import update_running as update_running
from ._stats import Stats as Stats
from ._stats import combine as combine

__version__ = "0.1.0"

__all__ = [
    "Stats",
    "accumulated_moments",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_norm_state",
    "batch_renorm",
    "batch_renorm_state",
    "combine",
    "cross_iteration_batch_norm",
    "cross_iteration_batch_norm_state",
    "cross_mini_batch_norm",
    "cross_mini_batch_norm_state",
    "divisive_batch_norm",
    "divisive_norm",
    "eval_norm",
    "eval_norm_fit",
    "eval_norm_fit_state",
    "eval_norm_weights",
    "feature_statistics",
    "feature_statistics_state",
    "filter_response_norm",
    "ghost_batch_norm",
    "group_norm",
    "instance_norm",
    "kernels",
    "kernels_status",
    "layer_norm",
    "local_response_norm",
    "mean_only_batch_norm",
    "mean_only_batch_norm_state",
    "merge_feature_statistics",
    "moments",
    "normalize",
    "pad_batch",
    "renorm_schedules",
    "rms_norm",
    "standardize_features",
    "thresholded_linear_unit",
    "tracked_instance_norm",
    "unstandardize_features",
    "update_running",
]
