"""The kernels as functions of tensors; see `functional`."""

from .functional import (
    class_distances,
    class_scores,
    compact,
    decide,
    decide_masked,
    exit_step,
    linear_scores,
    linear_step,
    statistics,
)
from .packing import Packed, pack
from .types import ClassScores

__all__ = [
    "ClassScores",
    "Packed",
    "class_distances",
    "class_scores",
    "compact",
    "decide",
    "decide_masked",
    "exit_step",
    "linear_scores",
    "linear_step",
    "pack",
    "statistics",
]
