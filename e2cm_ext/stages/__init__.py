"""A network, cut into stages with exits between them."""

from .flops import Costs
from .partition import CutError, Stages, at_exits, cut, feature_shapes, stage_flops

__all__ = ["Costs", "CutError", "Stages", "at_exits", "cut", "feature_shapes", "stage_flops"]
