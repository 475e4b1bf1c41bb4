"""BranchyNet (Teerapittayanon, McDanel and Kung, 2016): branches with a convolution, trained with the network.

From the paper: Branches and network are trained together on a weighted sum of their cross-entropies. A sample leaves
at the first branch where the entropy of the softmax is below the threshold of that branch. The defaults are those of
the comparison in the E2CM paper: two branches, behind the first convolution and at a third of the FLOPs, with the
weights 1/6 and 1/4 in the loss, and 1 for the network itself.

Ours, where the sources leave it open or differ between networks:

- A branch is a 3x3 convolution that keeps the number of channels, batch normalisation, ReLU, average pooling to 4x4,
  and one linear layer.
- SGD with momentum 0.9 and weight decay 1e-4. The learning rate is multiplied by 0.1 after half and after three
  quarters of the training.
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

WEIGHTS = (1 / 6, 1 / 4, 1.0)  # in the loss: of two branches, and of the network


class Branch(LearnedHead, kind="branch"):
    """A branch of BranchyNet: 3x3 convolution, batch normalisation, ReLU, average pooling to 4x4, linear layer.

    Args:
        num_classes: K.
        feature_shape: Of maps [C, H, W].

    Raises:
        ValueError: The features are not maps.
    """

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
    """Build a network with branches. They are not trained yet.

    Args:
        model: The network, in eval mode, or Stages of it. Training changes it.
        example_input: A batch as the model takes it.
        num_classes: Checked against the model's logits, if given.
        exits: Where branches stand, as in EarlyExit. None: behind the stem, and behind the block nearest to a third of
            the FLOPs.
        seed: Of the branches' initial weights.

    Returns:
        The network, with the rule "entropy". `train` it.

    Raises:
        ValueError: An exit has no feature map, or an argument does not fit the model.

    Example:
        ee = branchynet.build(model, images[:1], exits=2)
    """
    where = _default_exits(model, example_input) if exits is None else exits
    with training.seeded(seed):
        return EarlyExit(model, example_input, num_classes, where, Branch, "entropy")


def _default_exits(model: nn.Module | Stages, example_input: Tensor) -> list[str]:
    stages = cut(model, example_input, "blocks")
    cumulative = torch.tensor(stage_flops(stages, example_input), dtype=torch.float64).cumsum(0)
    first, *others = stages.names
    if not others:
        return [first]
    return [first, others[int((cumulative[1:-1] / cumulative[-1] - 1 / 3).abs().argmin())]]


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
    """Train branches and network together. The model's own weights change.

    Args:
        ee: What `build` returned; it is trained in place.
        loader: Yields (images, labels).
        epochs: How many.
        lr: The learning rate of SGD. For a network that is trained already, take a smaller one.
        weights: In the loss: of the branches, and of the network itself.
        seed: Of the random numbers in training.
        checkpoint: A file to continue from after an interruption, see `training.run`.
        precision: Of the forward pass, see `training.run`.
        progress: Show a progress bar.

    Returns:
        The mean loss of every epoch.

    Raises:
        ValueError: There are not as many weights as exits and network.

    Example:
        ee = branchynet.build(model, images[:1], exits=2)
        branchynet.train(ee, loader, epochs=2, lr=0.01, progress=False)
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
        schedule=training.step_decay(optimizer, epochs, (0.5, 0.75)),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    return losses


def loss(outputs: training.Outputs, labels: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute the weighted sum of cross-entropies.

    Args:
        outputs: Logits of the branches, and of the network [B, K] each.
        labels: [B].
        weights: As many numbers.

    Returns:
        A scalar.

    Example:
        logits = [torch.randn(4, 10) for _ in range(3)]
        loss = branchynet.loss(logits, torch.tensor([0, 1, 2, 3]), branchynet.WEIGHTS)
    """
    terms = [weight * F.cross_entropy(logits, labels) for weight, logits in zip(weights, outputs, strict=True)]
    return torch.stack(terms).sum()
