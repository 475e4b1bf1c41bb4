"""The simplest learned head: average pooling and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..heads.class_means import channel_axis
from .learned_head import LearnedHead

__all__ = ["PooledLinear", "average_pool", "num_channels"]


class PooledLinear(LearnedHead, kind="pooled_linear"):
    """Average pooling and one linear layer.

    Args:
        num_classes: K.
        feature_shape: Of maps [C, H, W], of tokens [N, C], or of vectors [C], which are not pooled.
    """

    def __init__(self, num_classes: int, feature_shape: Sequence[int]) -> None:
        super().__init__(num_classes, feature_shape)
        self.linear = nn.Linear(num_channels(self.feature_shape), num_classes)

    def squeeze(self, x: Tensor) -> Tensor:
        return average_pool(x)

    def outputs(self, squeezed: Tensor) -> Tensor | tuple[Tensor, ...]:
        logits: Tensor = self.linear(squeezed)
        return logits


def average_pool(x: Tensor) -> Tensor:
    """Average maps [B, C, H, W] or tokens [B, N, C] over positions; vectors [B, C] stay as they are."""
    if x.dim() == 2:
        return x
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


def num_channels(feature_shape: Sequence[int]) -> int:
    """Return C of maps [C, H, W], tokens [N, C] or vectors [C]."""
    return feature_shape[channel_axis(len(feature_shape), None)]
