"""AEP (Sarti, Lomurno, Matteucci: Anticipate, Ensemble and Prune): exits answer together, and what adds nothing is cut.

Classifiers stand at intermediate stages; network and classifiers are trained together on a weighted sum of their
cross-entropies; the answer is a weighted sum of their predictions, the network's own among them. What is kept is the
prefix of the network, with the exits in it, that answers best on validation data: often not the whole of it. It is an
ordinary module, smaller than the network, in which nobody leaves early.

The paper's weights are uniform, rise or fall with depth, or are "hybrid"; of numbers its abstract gives none. Ours are:
weights in proportion to 1, 2, 3, ... (rising) or the reverse (falling) that sum to 1; the hybrid that learns by falling
weights, so that early exits are good enough to stop at, and answers by rising ones, since later exits know more;
predictions that are probabilities; weights of a prefix in the proportions they had; classifiers of pooled features and
one Linear; Adam with a learning rate of 1e-3. Leaving early with what the ensemble says so far, which an EarlyExit
offers here as for all methods, is ours too.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration.record import Record
from ..calibration.target import refuse_foreign
from ..early_exit import EarlyExit
from ..heads.ensemble import Combination
from ..stages import Stages
from . import training
from .pooled_linear import PooledLinear

__all__ = ["Ensemble", "Pruned", "build", "loss", "prune", "train", "weights"]


@dataclass(frozen=True)
class Ensemble(Combination):
    """Answers are sums of what all exits so far have said, weighted and scaled to probabilities."""

    name = "aep"
    learning: tuple[float, ...]  # M+1 weights: of the exits' cross-entropies, the network's own last
    answering: tuple[float, ...]  # M+1 weights: of their predictions

    def __post_init__(self) -> None:
        for name in ("learning", "answering"):
            numbers = tuple(map(float, getattr(self, name)))
            if not all(0 <= each < math.inf for each in numbers):
                raise ValueError(f"`{name}` is {numbers}; wanted weights, from 0 on")
            object.__setattr__(self, name, numbers)
        if not (self.answering and self.answering[0] > 0):
            raise ValueError(
                f"`answering` is {self.answering}; wanted more than 0 for the first exit: it has to answer"
            )
        if len(self.learning) != len(self.answering):
            raise ValueError(f"there are {len(self.learning)} `learning` and {len(self.answering)} `answering` weights")

    def __call__(self, log_probs: Tensor, memory: Tensor | None, exit: int, last: bool) -> tuple[Tensor, Tensor]:
        """The memory is the logarithm of the sum so far [B, K]."""
        weighted = log_probs + _log(self.answering[exit])
        memory = weighted if memory is None else torch.logaddexp(memory, weighted)
        return memory.log_softmax(1), memory

    def at_exits(self, numbers: Sequence[int]) -> Ensemble:
        chosen = [*numbers, len(self.answering) - 1]
        return Ensemble(*(tuple(each[j] for j in chosen) for each in (self.learning, self.answering)))


class Pruned(nn.Module):
    """The beginning of a network, with the exits in it: images -> log-probabilities of their ensemble [B, K].

    Copies of stages and heads; nothing else of the network is needed to save, load or export it.
    """

    def __init__(self, stages: Sequence[nn.Module], heads: Sequence[nn.Module], answering: Sequence[float]) -> None:
        super().__init__()
        # In one go: what two stages share stays shared.
        self.stages, self.heads = copy.deepcopy((nn.ModuleList(stages), nn.ModuleList(heads)))
        self.answering = tuple(answering)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x, total = images, None
        for stage, head, weight in zip(self.stages, self.heads, self.answering, strict=True):
            x = stage(x)
            weighted = head(x).float() + _log(weight)
            total = weighted if total is None else torch.logaddexp(total, weighted)
        assert total is not None
        return F.log_softmax(total, 1)


def build(
    model: nn.Module | Stages,
    example_input: Tensor,
    num_classes: int | None = None,
    exits: int | str | Sequence[str] | Sequence[float] = "blocks",
    weighting: str = "hybrid",
    *,
    seed: int = 0,
) -> EarlyExit:
    """A network whose exits answer together, to be trained. weighting: "uniform", "rising", "falling" or "hybrid", see
    `weights`; for others, set `ee.combination` to an Ensemble.

    Exits whose threshold is +inf are not computed and take no part; train, prune and calibrate see to it that all are.
    """
    with training.seeded(seed):
        ee = EarlyExit(model, example_input, num_classes, exits, PooledLinear)
    ee.combination = Ensemble(*weights(weighting, len(ee.exit_names) + 1))
    return ee


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    epochs: int = 25,
    joint: bool = True,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> list[float]:
    """Trains exits and network (joint=False: the exits alone); returns the mean loss of every epoch.

    All exits are on then, and none fires: the network answers with the whole ensemble. lr: Adam's. The rest: see
    training.run.
    """
    learning = _ensemble(ee).learning

    def objective(outputs: training.Outputs, labels: Tensor, epoch: int) -> Tensor:
        return loss(outputs, labels, learning)

    module = training.Joint(ee) if joint else training.Learners(ee)
    losses = training.run(
        module,
        loader,
        objective,
        epochs=epochs,
        optimizer=torch.optim.Adam(module.parameters(), lr),
        prepare=training.same if joint else training.Features(ee),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    ee.thresholds = torch.finfo(torch.float32).max
    return losses


def prune(ee: EarlyExit, loader: Record | Iterable[Any], accuracy_drop: float = 0.0, progress: bool = True) -> Pruned:
    """The shortest beginning of the network whose ensemble is, on a loader's samples or on a record of them, at most
    `accuracy_drop` less accurate than the best. Take samples that were not learned. `ee` stays as it is."""
    answering = _ensemble(ee).answering
    record = loader if isinstance(loader, Record) else ee.record(loader, progress)
    refuse_foreign(record, ee)
    if not accuracy_drop >= 0:
        raise ValueError(f"`accuracy_drop` is {accuracy_drop}; wanted a number from 0 on, such as 0.01")
    if not len(record):
        raise ValueError("the record holds no samples; wanted some hundred that were not learned")
    accuracy = record.accuracy
    stop = int((accuracy >= accuracy.max() - accuracy_drop - 1e-12).nonzero()[0])
    heads = [*ee.heads, nn.LogSoftmax(1)]
    return Pruned(list(ee.stages)[: stop + 1], heads[: stop + 1], answering[: stop + 1])


def _ensemble(ee: EarlyExit) -> Ensemble:
    if not isinstance(ee.combination, Ensemble):
        raise TypeError("the exits of `ee` do not answer together: make it with aep.build")
    if len(ee.combination.answering) != len(ee.stages):
        raise ValueError(
            f"`ee.combination` has {len(ee.combination.answering)} weights; wanted {len(ee.stages)}, one per exit and "
            "one for the network itself"
        )
    return ee.combination


# ---- formulas --------------------------------------------------------------------------------------------------------


def weights(weighting: str, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of `count` exits, the network's own last: for the loss, and for the answer. They sum to 1."""
    rising = tuple((i + 1) / (count * (count + 1) / 2) for i in range(count))
    uniform = (1 / count,) * count
    known = {
        "uniform": (uniform, uniform),
        "rising": (rising, rising),
        "falling": (rising[::-1], rising[::-1]),
        "hybrid": (rising[::-1], rising),
    }
    if weighting not in known:
        raise ValueError(f"`weighting` is {weighting!r}; wanted one of {', '.join(map(repr, known))}")
    return known[weighting]


def loss(logits: Sequence[Tensor], labels: Tensor, learning: Sequence[float]) -> Tensor:
    """The weighted sum of the cross-entropies of M+1 times logits [B, K]."""
    terms = [weight * F.cross_entropy(each.float(), labels) for each, weight in zip(logits, learning, strict=True)]
    return torch.stack(terms).sum()


def _log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf
