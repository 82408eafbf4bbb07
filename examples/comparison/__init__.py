"""The parts of `compare_norms.py`."""

from comparison.class_batches import CLASS_BATCHES
from comparison.depth import DEPTH
from comparison.learning_rates import LEARNING_RATE_TOLERANCE
from comparison.order import ORDER
from comparison.small_batches import SMALL_BATCHES
from comparison.vanishing import VANISHING

PARTS = (SMALL_BATCHES, CLASS_BATCHES, VANISHING, LEARNING_RATE_TOLERANCE, ORDER, DEPTH)
