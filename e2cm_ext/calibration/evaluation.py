"""What a network with exits does on a data set: accuracy, FLOPs, and where samples leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.types import Decisions
from ..stages import Costs
from ..utils import distributed

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of running a network with its exits on a data set.

    Attributes:
        accuracy: Share of right predictions.
        flops: Mean FLOPs per sample, active heads included, as a fraction of the base network's.
        exits: [M+1] int64: how many samples left at each exit; the last number is that of the network itself.
        names: Names of the M exits.
    """

    accuracy: float
    flops: float
    exits: Tensor
    names: tuple[str, ...]

    def __str__(self) -> str:
        count, most = int(self.exits.sum()), int(self.exits.max())
        lines = [f"accuracy {self.accuracy:.4f} at FLOPs {self.flops:.4f} on {count} samples, which left at"]
        width = max(len(name) for name in (*self.names, "(end)"))
        for name, leavers in zip((*self.names, "(end)"), self.exits.tolist(), strict=True):
            bar = "#" * math.ceil(30 * leavers / max(1, most))
            lines.append(f"  {name:{width}} {leavers:8d} {leavers / max(1, count):7.2%} {bar}".rstrip())
        return "\n".join(lines)


def evaluate(
    predict: Callable[[Tensor], Decisions], batches: Iterable[tuple[Tensor, Tensor]], costs: Costs, thresholds: Tensor
) -> Evaluation:
    """Run `predict` on all batches and count. Under torch.distributed: on the batches of all processes.

    Args:
        predict: Predicts a batch of images.
        batches: Pairs (images, labels) on the network's device.
        costs: FLOPs of stages and heads.
        thresholds: [M], those that `predict` uses: heads at exits that are off cost nothing.

    Returns:
        The counts as an Evaluation.
    """
    columns = len(costs.stages)
    tally = torch.zeros(columns + 1, dtype=torch.int64, device=thresholds.device)  # the last: right predictions
    with distributed.synchronize_errors("evaluate"):
        for images, labels in batches:
            decisions = predict(images)
            tally[-1] += (decisions.prediction == labels).sum()
            tally[:-1] += decisions.exit.bincount(minlength=columns)
    *exits, correct = distributed.all_reduce_sum(tally).tolist()
    leavers, count = torch.tensor(exits, device="cpu"), sum(exits)
    if not count:
        raise ValueError("the loader gave no sample: all its batches are empty")
    fractions = costs.with_active_heads(thresholds.tolist()).fractions
    return Evaluation(correct / count, float(leavers.double() @ fractions) / count, leavers, costs.names)
