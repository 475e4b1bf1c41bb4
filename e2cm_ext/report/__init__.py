"""Reports: one HTML page on what a network with early exits does."""

from .measurement import SplitCurve, environment, first_images, measure_times
from .template import check_matplotlib
from .view import ComparisonRow
from .writer import write

__all__ = [
    "ComparisonRow",
    "SplitCurve",
    "check_matplotlib",
    "environment",
    "first_images",
    "measure_times",
    "write",
]
