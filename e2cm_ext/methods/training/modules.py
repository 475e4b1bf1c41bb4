"""What is trained: the heads alone, or heads and network together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data.loader import device_and_dtype, to_network
from ...early_exit import EarlyExit
from ..learned_head import LearnedHead

__all__ = ["ExitHeads", "Features", "Joint", "Loss", "Outputs", "finish"]

Outputs = list[Any]  # the outputs of the M heads (logits, or tuples that begin with them), and the network's logits
Loss = Callable[[Outputs, Tensor, int], Tensor]  # outputs, labels, epoch (from 0) -> a scalar


class Features:
    """The inputs of `ExitHeads`, computed from images without gradients.

    Called with a batch of images, it returns a list: for every exit what `LearnedHead.squeeze` makes of the features,
    and last the network's logits. A list, as `Cached` yields it, is returned unchanged.

    Args:
        ee: A network whose heads are all LearnedHeads, in eval mode.

    Raises:
        TypeError: A head is not a LearnedHead.

    Example:
        features = training.Features(ee)
        *squeezed, logits = features(images)
    """

    def __init__(self, ee: EarlyExit) -> None:
        self.stages, self.heads = ee.stages, _learned_heads(ee)

    @torch.no_grad()
    def __call__(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        if isinstance(images, list):
            return images
        x = to_network(images, self.stages)
        features = []
        *early, last = self.stages
        for stage, head in zip(early, self.heads, strict=True):
            x = stage(x)
            squeezed = head.squeeze(x)
            # The next stage may overwrite x.
            shared = squeezed.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            features.append(squeezed.clone() if shared else squeezed)
        return [*features, last(x)]


class ExitHeads(nn.Module):
    """The heads of a network with early exits, to be trained on its `Features`.

    Args:
        ee: A network whose heads are all LearnedHeads.

    Raises:
        TypeError: A head is not a LearnedHead.

    Example:
        heads = training.ExitHeads(ee)
        *outputs, logits = heads(training.Features(ee)(images))
    """

    def __init__(self, ee: EarlyExit) -> None:
        super().__init__()
        _learned_heads(ee)
        self.heads = ee.heads

    def forward(self, features: Sequence[Tensor]) -> Outputs:
        *squeezed, logits = features
        return [*(head.outputs(x) for head, x in zip(self.heads, squeezed, strict=True)), logits]  # type: ignore[operator]


class Joint(nn.Module):
    """A network with early exits, to be trained as a whole, on images. The model's own weights change.

    In train mode dropout and batch normalisation are in train mode, too. What the model's forward() itself decided by
    `self.training` stays as in eval mode, in which the network was cut.

    Args:
        ee: A network whose heads are all LearnedHeads.

    Raises:
        TypeError: A head is not a LearnedHead.

    Example:
        network = training.Joint(ee).train()
        *outputs, logits = network(images)
    """

    def __init__(self, ee: EarlyExit) -> None:
        super().__init__()
        _learned_heads(ee)
        self.stages, self.heads = ee.stages, ee.heads
        self._overwritten = _overwritten_by_next_stage(ee)

    def forward(self, images: Tensor) -> Outputs:
        x = to_network(images, self.stages)
        outputs: Outputs = []
        *early, last = self.stages
        for stage, head, overwritten in zip(early, self.heads, self._overwritten, strict=True):
            x = stage(x)
            features = x.clone() if overwritten and self.training else x
            outputs.append(head.outputs(head.squeeze(features)))  # type: ignore[operator]
        return [*outputs, last(x)]


def finish(ee: EarlyExit) -> EarlyExit:
    """Make a trained network ready for use: eval mode, heads marked as fitted, all thresholds +inf.

    Args:
        ee: The network; it is changed in place.

    Returns:
        The same network.
    """
    for head in ee.heads:
        head.fitted = True  # type: ignore[assignment]
    ee.thresholds = math.inf
    return ee.eval()


def _learned_heads(ee: EarlyExit) -> list[LearnedHead]:
    if not isinstance(ee, EarlyExit):
        raise TypeError(f"`ee` is a {type(ee).__name__}; wanted an EarlyExit")
    for head, name in zip(ee.heads, ee.exit_names, strict=True):
        if not isinstance(head, LearnedHead):
            raise TypeError(f"the head at {name!r} is a {type(head).__name__}; wanted one that learns by gradients")
    return list(ee.heads)  # type: ignore[arg-type]


@torch.no_grad()
def _overwritten_by_next_stage(ee: EarlyExit) -> list[bool]:
    """For every exit, whether the next stage changes the features there in place."""
    device, _ = device_and_dtype(ee.stages)
    x = to_network(torch.zeros(1, *ee.image_shape, dtype=ee.image_dtype, device=device), ee.stages)
    overwritten = []
    x = ee.stages[0](x)
    for stage in list(ee.stages)[1:]:
        version = x._version
        y = stage(x)
        overwritten.append(x._version != version)
        x = y
    return overwritten
