"""BranchyNet (Teerapittayanon, McDanel and Kung, 2016): branches with a convolution, trained with the network.

A sample leaves where the entropy of the branch's softmax is below that branch's threshold. Two branches as in E2CM's
comparison: behind the first convolution and at a third of the FLOPs, with weights 1/6 and 1/4 in the loss, and 1 of the
network itself.

Ours, where the sources are silent or differ from network to network: a branch is a 3x3 convolution that keeps the
number of channels, batch normalisation, ReLU, the average over a 4x4 grid, and one Linear; SGD with momentum 0.9 and
weight decay 1e-4, whose learning rate falls to a tenth after a half and after three quarters of the training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..early_exit import EarlyExit
from ..stages import Stages, cut, stage_flops
from . import training
from .learned_head import LearnedHead

__all__ = ["WEIGHTS", "Branch", "build", "loss", "train"]

WEIGHTS = (1 / 6, 1 / 4, 1.0)


class Branch(LearnedHead, kind="branch"):
    """Of maps [C, H, W]."""

    def __init__(self, num_classes: int, feature_shape: Sequence[int]) -> None:
        super().__init__(num_classes, feature_shape)
        if len(self.feature_shape) != 3:
            raise ValueError(f"`feature_shape` is {list(feature_shape)}; a branch needs maps [channels, height, width]")
        channels, *sizes = self.feature_shape
        grid = min(4, *sizes)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(grid),
            nn.Flatten(),
            nn.Linear(channels * grid * grid, self.num_classes),
        )

    def outputs(self, squeezed: Tensor) -> Tensor:
        logits: Tensor = self.layers(squeezed)
        return logits


def build(
    model: nn.Module | Stages,
    example_input: Tensor,
    num_classes: int | None = None,
    exits: str | int | Sequence[str] | Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> EarlyExit:
    """`model` with branches, which have learned nothing yet: `train` them. exits: see EarlyExit; None: behind the stem
    and behind the block that is nearest to a third of the FLOPs."""
    where = _two(model, example_input) if exits is None else exits
    with training.seeded(seed):
        return EarlyExit(model, example_input, num_classes, where, Branch, "entropy")


def _two(model: nn.Module | Stages, example_input: Tensor) -> list[str]:
    stages = cut(model, example_input, "blocks")
    spent = torch.tensor(stage_flops(stages, example_input), dtype=torch.float64).cumsum(0)
    first, *others = stages.names
    if not others:
        return [first]
    return [first, others[int((spent[1:-1] / spent[-1] - 1 / 3).abs().argmin())]]


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    epochs: int = 100,
    lr: float = 0.1,
    weights: Sequence[float] = WEIGHTS,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> list[float]:
    """Trains branches and network together: the model itself changes. Returns the mean loss of every epoch.

    weights: of the branches' losses, and of the network's own. For a network that is trained already give a lower
    learning rate. See training.run for the rest.
    """
    if len(weights) != len(ee.heads) + 1:
        raise ValueError(f"`weights` has length {len(weights)}; wanted {len(ee.heads) + 1}: branches, and the network")
    module = training.Joint(ee)
    optimizer = torch.optim.SGD(module.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    losses = training.run(
        module,
        loader,
        lambda outputs, labels, epoch: loss(outputs, labels, weights),
        epochs=epochs,
        optimizer=optimizer,
        schedule=training.falling(optimizer, epochs, (0.5, 0.75)),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    return losses


def loss(outputs: training.Outputs, labels: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of all cross-entropies, the network's own last."""
    each = [weight * F.cross_entropy(logits, labels) for weight, logits in zip(weights, outputs, strict=True)]
    return torch.stack(each).sum()
