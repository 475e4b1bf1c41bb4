"""The plainest head that learns: averages over the map, and one Linear."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..heads.class_means import channel_axis
from .learned_head import LearnedHead

__all__ = ["PooledLinear", "averages", "channels"]


class PooledLinear(LearnedHead, kind="pooled_linear"):
    """Logits = Linear(averages). Of maps [C, H, W], tokens [N, C] or vectors [C], which stay as they are."""

    def __init__(self, num_classes: int, feature_shape: Sequence[int]) -> None:
        super().__init__(num_classes, feature_shape)
        self.linear = nn.Linear(channels(self.feature_shape), num_classes)

    def squeeze(self, x: Tensor) -> Tensor:
        return averages(x)

    def outputs(self, squeezed: Tensor) -> Tensor | tuple[Tensor, ...]:
        logits: Tensor = self.linear(squeezed)
        return logits


def averages(x: Tensor) -> Tensor:
    """[B, C]: of every channel of maps [B, C, H, W], tokens [B, N, C] or vectors [B, C]."""
    if x.dim() == 2:
        return x
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


def channels(feature_shape: Sequence[int]) -> int:
    return feature_shape[channel_axis(len(feature_shape), None)]
