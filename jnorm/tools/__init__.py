"""What a normalized model needs beside its training: `jnorm.tools`, which is imported by its own name."""

from . import convert as convert
from .blend_statistics import blend_statistics as blend_statistics
from .commit import commit_once as commit_once
from .commit import commit_population as commit_population
from .feature_files import feature_statistics_of_files as feature_statistics_of_files
from .feature_files import standardize_files as standardize_files
from .feature_statistics import load_feature_statistics as load_feature_statistics
from .feature_statistics import save_feature_statistics as save_feature_statistics
from .feature_statistics import with_feature_statistics as with_feature_statistics
from .fold import fold as fold
from .fold import fold_into_next as fold_into_next
from .fold import fold_into_previous as fold_into_previous
from .freeze import freeze as freeze
from .freeze import thaw as thaw
from .inspect import inspect_norms as inspect_norms
from .param_masks import frozen_param_mask as frozen_param_mask
from .param_masks import norm_param_mask as norm_param_mask
from .param_masks import weight_decay_mask as weight_decay_mask
from .population import merge_populations as merge_populations
from .population import population_state as population_state
from .population import population_statistics as population_statistics
from .recalibrate import recalibrate as recalibrate
from .replace_norms import norm_like as norm_like
from .replace_norms import replace_norms as replace_norms
from .sync_state import sync_state as sync_state

__all__ = [
    "blend_statistics",
    "commit_once",
    "commit_population",
    "convert",
    "feature_statistics_of_files",
    "fold",
    "fold_into_next",
    "fold_into_previous",
    "freeze",
    "frozen_param_mask",
    "inspect_norms",
    "load_feature_statistics",
    "merge_populations",
    "norm_like",
    "norm_param_mask",
    "population_state",
    "population_statistics",
    "recalibrate",
    "replace_norms",
    "save_feature_statistics",
    "standardize_files",
    "sync_state",
    "thaw",
    "weight_decay_mask",
    "with_feature_statistics",
]
