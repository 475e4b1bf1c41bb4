"""Shallow-Deep Networks (Kaya, Hong and Dumitras, 2019): small classifiers inside a network, and one threshold for all.

An internal classifier mixes the maximum and the average of the features over a 4x4 grid, in a proportion that it
learns, and is linear in that. A sample leaves at the first exit whose largest probability is at least T. Who leaves
nowhere gets the most confident of all answers, the network's own among them.

Ours, where the source is silent: at maps whose size is no multiple of the kernel the last rows and columns are left
out, as torch pools; learning rates fall at the same part of the training if it has another number of epochs; at exits
elsewhere than at 15%, 30%, ... 90% of the FLOPs, tau rises up to the exit's own fraction of the FLOPs.
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

__all__ = ["InternalClassifier", "MostConfident", "at_least", "build", "confusion", "curve", "loss", "tau", "train"]

FRACTIONS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
_NEAR = 0.075  # half of what is between two of them


class InternalClassifier(LearnedHead, kind="internal_classifier"):
    """Maps of 4x4 and larger: alpha * max + (1 - alpha) * average over a grid of cells, then Linear; else Linear."""

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
        """[B, 2, channels * cells]: maxima and averages; [B, features] where there is no grid."""
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
    """Every exit answers for itself; at the end the most confident answer counts, the earlier of two that are equal."""

    name = "most_confident"

    def __call__(self, log_probs: Tensor, memory: Tensor | None, exit: int, last: bool) -> tuple[Tensor, Tensor]:
        if memory is not None:
            before = memory.amax(1)
            surer = ~(log_probs.amax(1) <= before) & ~log_probs.isnan().any(1) | before.isnan()
            best = torch.where(surer[:, None], log_probs, memory)
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
    """`model` with internal classifiers, which have learned nothing yet: `train` them. exits: see EarlyExit."""
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
    """Trains the exits, or exits and network together; returns the mean loss of every epoch.

    joint=False: the network does not change; Adam, learning rate 1e-3, a tenth of it after 15 of 25 epochs. A loader
    from training.cache saves running the network in every epoch. joint=True: the model itself is trained, too; SGD
    with momentum 0.9 and weight decay 1e-4, learning rate 0.1, a tenth of it after 35, 60 and 85 of 100 epochs. See
    training.run for the rest.
    """
    epochs = (100 if joint else 25) if epochs is None else epochs
    module: nn.Module
    parts: tuple[float, ...]
    if joint:
        module, parts = training.Joint(ee), (0.35, 0.6, 0.85)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            module.parameters(), 0.1 if lr is None else lr, momentum=0.9, weight_decay=1e-4
        )
        weights = most(ee)
    else:
        module, parts = training.Learners(ee), (0.6,)
        optimizer = torch.optim.Adam(module.parameters(), 1e-3 if lr is None else lr)
        weights = None
    losses = training.run(
        module,
        loader,
        lambda outputs, labels, epoch: loss(outputs, labels, tau(weights, epoch, epochs) if weights else None),
        epochs=epochs,
        optimizer=optimizer,
        schedule=training.falling(optimizer, epochs, parts),
        prepare=training.same if joint else training.Features(ee),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    return losses


def loss(outputs: training.Outputs, labels: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The sum of the exits' cross-entropies; with weights, those times the weights, and the network's own."""
    *early, last = (F.cross_entropy(logits, labels) for logits in outputs)
    if weights is None:
        return torch.stack(early).sum()
    return torch.stack([weight * each for weight, each in zip(weights, early, strict=True)]).sum() + last


def most(ee: EarlyExit) -> list[float]:
    """What tau rises to at every exit: the fraction of the FLOPs that it was asked for at, or else stands at."""
    spent = (torch.tensor(ee.costs.stages, dtype=torch.float64).cumsum(0) / ee.costs.base)[:-1].tolist()
    if len(spent) == len(FRACTIONS) and all(abs(a - b) < _NEAR for a, b in zip(spent, FRACTIONS, strict=True)):
        return list(FRACTIONS)
    return spent


def tau(most: Sequence[float], epoch: int, epochs: int) -> list[float]:
    """The weights of the exits in epoch number `epoch` (from 0) of joint training."""
    return [min(each, 0.01 + epoch * each / epochs) for each in most]


# ---- one threshold --------------------------------------------------------------------------------------------------


def at_least(confidence: float, exits: int) -> Tensor:
    """[M]: the thresholds with which a sample leaves if its largest probability is `confidence` or more.

    Elsewhere in this package it must be above its threshold.
    """
    limit = torch.tensor(confidence, dtype=torch.float32)
    return torch.nextafter(limit, torch.tensor(-math.inf)).repeat(exits)


def curve(record: Record, count: int = 1000, progress: bool = False) -> Curve:
    """Accuracy over FLOPs with one threshold for all exits: `count` quantiles of all the confidences on the record.

    `ee.curve` searches a threshold for every exit, which the source does not.
    """
    every = record.confidence[:, :-1].flatten()
    every = every[~every.isnan()]
    if not len(every):
        raise ValueError("`record` holds no confidence but NaN: no sample can leave")
    every = every.sort().values
    which = torch.linspace(0, len(every) - 1, count, dtype=torch.float64).round().long()
    never = torch.full((record.exits,), torch.finfo(torch.float32).max)
    limits = [at_least(value, record.exits) for value in sorted(set(every[which].tolist()))]
    return curves.curve_of_thresholds(record, torch.stack([*limits, never]), progress)


# ---- overthinking ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def confusion(ee: EarlyExit, loader: Iterable[Any], progress: bool = True) -> Tensor:
    """[N] float64: how far all exits are from the network's own answer, sum over exits of ||p_last - p_exit||_1, in
    standard deviations from the mean over the loader's samples. High: the network has changed its mind on the way."""
    refuse_train_mode(ee, "confusion")
    found = []
    for images, _ in ee.batches(loader, progress).run("confusion"):
        *early, last = (log_probs.double().exp() for log_probs in cascade.scores(ee.stages, ee.head_list(), images))
        found.append(torch.stack([(last - each).abs().sum(1) for each in early]).sum(0).cpu())
    if not found:
        raise ValueError("the loader gave no sample: all its batches are empty")
    scores = torch.cat(found)
    spread = scores.std(correction=0)
    return (scores - scores.mean()) / (spread if spread > 0 else 1)
