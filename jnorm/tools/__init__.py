"""What a normalized model needs beside its training: `jnorm.tools`, which is imported by its own name."""

from .commit import commit_once as commit_once
from .commit import commit_population as commit_population
from .recalibrate import merge_populations as merge_populations
from .recalibrate import population_state as population_state
from .recalibrate import population_statistics as population_statistics
from .recalibrate import recalibrate as recalibrate
from .sync_state import sync_state as sync_state

__all__ = [
    "commit_once",
    "commit_population",
    "merge_populations",
    "population_state",
    "population_statistics",
    "recalibrate",
    "sync_state",
]
