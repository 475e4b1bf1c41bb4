"""SDN (Kaya, Hong and Dumitras, "Shallow-Deep Networks", 2019): internal classifiers and one threshold for all exits.

From the paper: An internal classifier mixes the maximum and the average of the features over a 4x4 grid, in a
proportion that it learns, and applies one linear layer. A sample leaves at the first exit whose largest probability is
at least T. If no exit fires, the most confident of all predictions counts, the network's own among them. Six exits
stand at 15%, 30%, ... 90% of the FLOPs. They are trained alone, on a frozen network, or jointly with the network. In
joint training, tau, the weight of each exit in the loss, rises.

Ours, where the source leaves it open:

- If the size of a map is no multiple of the pooling kernel, the last rows and columns are ignored, as torch pools.
- With another number of epochs, learning rates fall at the same fractions of the training.
- For exits elsewhere, tau rises to the exit's own fraction of the FLOPs.
- `ee.curve` and `ee.calibrate` find one threshold per exit. The paper's single threshold is `curve`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration import curves
from ..calibration.curves import Curve
from ..calibration.record import Record
from ..data.loader import refuse_train_mode
from ..early_exit import EarlyExit
from ..heads.ensemble import Combination
from ..runtime import cascade
from ..stages import Stages
from . import training
from .learned_head import LearnedHead

__all__ = [
    "FRACTIONS",
    "InternalClassifier",
    "MostConfident",
    "build",
    "confusion",
    "curve",
    "inclusive_thresholds",
    "loss",
    "max_weights",
    "tau",
    "train",
]

FRACTIONS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # of the FLOPs, where exits stand
_TOLERANCE = 0.075  # half the distance of two of them


class InternalClassifier(LearnedHead, kind="internal_classifier"):
    """An internal classifier of SDN.

    Maps of 4x4 and larger: alpha * max + (1 - alpha) * average over the cells of a grid, then a linear layer. Other
    features: a linear layer.

    Args:
        num_classes: K.
        feature_shape: Of the features at the exit.
    """

    def __init__(self, num_classes: int, feature_shape: Sequence[int]) -> None:
        super().__init__(num_classes, feature_shape)
        sizes = self.feature_shape[1:]
        self.kernel = tuple(size // 4 for size in sizes) if len(sizes) == 2 and min(sizes) >= 4 else None
        cells = sizes
        if self.kernel is not None:
            self.alpha = nn.Parameter(torch.rand(1))
            cells = tuple(size // cell for size, cell in zip(sizes, self.kernel, strict=True))
        self.linear = nn.Linear(self.feature_shape[0] * math.prod(cells), self.num_classes)

    def squeeze(self, x: Tensor) -> Tensor:
        """Return maxima and averages [B, 2, channels * cells], or features [B, D] where there is no grid."""
        if self.kernel is None:
            return x.flatten(1)
        pooled = F.max_pool2d(x, self.kernel), F.avg_pool2d(x, self.kernel)
        return torch.stack([each.flatten(1) for each in pooled], 1)

    def outputs(self, squeezed: Tensor) -> Tensor:
        if self.kernel is not None:
            squeezed = self.alpha * squeezed[:, 0] + (1 - self.alpha) * squeezed[:, 1]
        logits: Tensor = self.linear(squeezed)
        return logits


@dataclass(frozen=True)
class MostConfident(Combination):
    """The combination of SDN: at the end the most confident prediction counts; of two that are equal, the earlier one.

    An exit that fires gives its own prediction. A prediction with a NaN never counts as the most confident.
    """

    name = "most_confident"

    def __call__(self, log_probs: Tensor, memory: Tensor | None, exit: int, last: bool) -> tuple[Tensor, Tensor]:
        """Compare the prediction of an exit with the most confident one so far, which is the memory [B, K]."""
        if memory is not None:
            before = memory.amax(1)
            higher = ~(log_probs.amax(1) <= before) & ~log_probs.isnan().any(1) | before.isnan()
            best = torch.where(higher[:, None], log_probs, memory)
        else:
            best = log_probs
        return (best if last else log_probs), best


def build(
    model: nn.Module | Stages,
    example_input: Tensor,
    num_classes: int | None = None,
    exits: str | int | Sequence[str] | Sequence[float] = FRACTIONS,
    *,
    seed: int = 0,
) -> EarlyExit:
    """Build a network with internal classifiers. They are not trained yet.

    Args:
        model: The network, in eval mode, or Stages of it. Joint training changes it.
        example_input: A batch as the model takes it.
        num_classes: Checked against the model's logits, if given.
        exits: Where exits stand, as in EarlyExit.
        seed: Of the classifiers' initial weights.

    Returns:
        The network, with the rule "confidence". `train` it.

    Raises:
        ValueError: An argument does not fit the model.

    Example:
        ee = sdn.build(model, images[:1], exits=(0.3, 0.6))
    """
    with training.seeded(seed):
        ee = EarlyExit(model, example_input, num_classes, exits, InternalClassifier, "confidence")
    ee.combination = MostConfident()
    return ee


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    joint: bool = False,
    epochs: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> list[float]:
    """Train the exits, or exits and network together.

    joint=False: the network is frozen. Adam with a learning rate of 1e-3, times 0.1 after 15 of 25 epochs.
    joint=True: the model's own weights change, too. SGD with momentum 0.9, weight decay 1e-4 and a learning rate of
    0.1, times 0.1 after 35, 60 and 85 of 100 epochs.

    Args:
        ee: What `build` returned; it is trained in place.
        loader: Yields (images, labels); for joint=False also what `training.cache` returns, which saves running the
            network in every epoch.
        joint: Train the network, too.
        epochs: How many. None: as above.
        lr: The learning rate at the start. None: as above.
        seed: Of the random numbers in training.
        checkpoint: A file to continue from after an interruption, see `training.run`.
        precision: Of the forward pass, see `training.run`.
        progress: Show a progress bar.

    Returns:
        The mean loss of every epoch.

    Example:
        ee = sdn.build(model, images[:1], exits=2)
        sdn.train(ee, loader, epochs=2, progress=False)
        ee.calibrate(held_out, flops=0.9, progress=False)
    """
    epochs = (100 if joint else 25) if epochs is None else epochs
    module: nn.Module
    milestones: tuple[float, ...]
    if joint:
        module, milestones = training.Joint(ee), (0.35, 0.6, 0.85)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            module.parameters(), 0.1 if lr is None else lr, momentum=0.9, weight_decay=1e-4
        )
        weights = max_weights(ee)
    else:
        module, milestones = training.ExitHeads(ee), (0.6,)
        optimizer = torch.optim.Adam(module.parameters(), 1e-3 if lr is None else lr)
        weights = None
    losses = training.run(
        module,
        loader,
        lambda outputs, labels, epoch: loss(outputs, labels, tau(weights, epoch, epochs) if weights else None),
        epochs=epochs,
        optimizer=optimizer,
        schedule=training.step_decay(optimizer, epochs, milestones),
        prepare=training.identity if joint else training.Features(ee),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    return losses


def loss(outputs: training.Outputs, labels: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Compute the loss of training.

    Args:
        outputs: Logits of the M exits, and of the network [B, K] each.
        labels: [B].
        weights: Of the exits, in joint training. None: the exits are trained alone.

    Returns:
        The sum of the exits' cross-entropies; with weights, their weighted sum plus the network's own.

    Example:
        logits = [torch.randn(4, 10) for _ in range(3)]
        loss = sdn.loss(logits, torch.tensor([0, 1, 2, 3]), weights=(0.3, 0.6))
    """
    *early, last = (F.cross_entropy(logits, labels) for logits in outputs)
    if weights is None:
        return torch.stack(early).sum()
    return torch.stack([weight * each for weight, each in zip(weights, early, strict=True)]).sum() + last


def max_weights(ee: EarlyExit) -> list[float]:
    """Compute the values that tau rises to.

    Args:
        ee: What `build` returned.

    Returns:
        For every exit a fraction of the FLOPs: `FRACTIONS`, if the exits stand near these; else where they stand.

    Example:
        weights = sdn.max_weights(ee)
    """
    cumulative = (torch.tensor(ee.costs.stages, dtype=torch.float64).cumsum(0) / ee.costs.base)[:-1].tolist()
    pairs = zip(cumulative, FRACTIONS, strict=False)
    if len(cumulative) == len(FRACTIONS) and all(abs(a - b) < _TOLERANCE for a, b in pairs):
        return list(FRACTIONS)
    return cumulative


def tau(max_weights: Sequence[float], epoch: int, epochs: int) -> list[float]:
    """Compute the weights of the exits in an epoch of joint training.

    Args:
        max_weights: What they rise to.
        epoch: The number of the epoch, from 0.
        epochs: How many epochs there are.

    Returns:
        One weight per exit.

    Example:
        weights = sdn.tau((0.15, 0.3), epoch=50, epochs=100)  # 0.085 and 0.16
    """
    return [min(each, 0.01 + epoch * each / epochs) for each in max_weights]


# ---- one threshold --------------------------------------------------------------------------------------------------


def inclusive_thresholds(confidence: float, exits: int) -> Tensor:
    """Compute thresholds at which a sample leaves if its largest probability is `confidence` or more.

    Elsewhere in this package the probability must be above the threshold.

    Args:
        confidence: T of the paper, the same for all exits.
        exits: M, how many exits there are.

    Returns:
        [M] float32.

    Example:
        ee.thresholds = sdn.inclusive_thresholds(0.9, len(ee.exit_names))
    """
    threshold = torch.tensor(confidence, dtype=torch.float32)
    return torch.nextafter(threshold, torch.tensor(-math.inf)).repeat(exits)


def curve(record: Record, count: int = 1000, progress: bool = False) -> Curve:
    """Compute the paper's curve of accuracy over FLOPs: one threshold for all exits.

    `ee.curve` searches a threshold for every exit, which the paper does not.

    Args:
        record: Of a trained network.
        count: How many thresholds: quantiles of all confidences on the record.
        progress: Show a progress bar.

    Returns:
        The curve.

    Raises:
        ValueError: All confidences are NaN.

    Example:
        curve = sdn.curve(ee.record(held_out, progress=False))
        ee.calibrate(curve, flops=0.9)
    """
    confidence = record.confidence[:, :-1].flatten()
    confidence = confidence[~confidence.isnan()]
    if not len(confidence):
        raise ValueError("`record` holds no confidence but NaN: no sample can leave")
    confidence = confidence.sort().values
    positions = torch.linspace(0, len(confidence) - 1, count, dtype=torch.float64).round().long()
    never = torch.full((record.exits,), torch.finfo(torch.float32).max)
    thresholds = [inclusive_thresholds(value, record.exits) for value in sorted(set(confidence[positions].tolist()))]
    return curves.curve_of_thresholds(record, torch.stack([*thresholds, never]), progress)


# ---- overthinking ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def confusion(ee: EarlyExit, loader: Iterable[Any], progress: bool = True) -> Tensor:
    """Score how much the exits disagree with the network's own prediction: the paper's measure of overthinking.

    Args:
        ee: A trained network.
        loader: Yields (images, labels); labels are not used.
        progress: Show a progress bar.

    Returns:
        [N] float64: the sum over exits of ||p_last - p_exit||_1, in standard deviations from the mean over the samples.
        A high score says that the prediction changed along the exits.

    Raises:
        RuntimeError: The network is in train mode.
        ValueError: The loader yields no sample.

    Example:
        scores = sdn.confusion(ee, held_out, progress=False)
    """
    refuse_train_mode(ee, "confusion")
    batches = []
    for images, _ in ee.batches(loader, progress).run("confusion"):
        *early, last = (log_probs.double().exp() for log_probs in cascade.scores(ee.stages, ee.head_list(), images))
        batches.append(torch.stack([(last - each).abs().sum(1) for each in early]).sum(0).cpu())
    distances = training.concatenate(batches)
    std = distances.std(correction=0)
    return (distances - distances.mean()) / (std if std > 0 else 1)
