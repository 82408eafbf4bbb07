"""The parts of `compare_norms.py`."""

from comparison.small_batches import SMALL_BATCHES

PARTS = (SMALL_BATCHES,)
