"""Why is my evaluation worse than my training? What the norms of a model have to do with it."""

from ._inspect import inspect_norms as inspect_norms
from ._report import Finding as Finding
from ._report import LayerReport as LayerReport
from ._report import Losses as Losses
from ._report import Report as Report

__all__ = ["Finding", "LayerReport", "Losses", "Report"]
