"""AEP (Sarti, Lomurno and Matteucci, "Anticipate, Ensemble and Prune", 2023): an ensemble of exits, then pruning.

From the paper, of which only the abstract was available: Classifiers stand at intermediate stages. Network and
classifiers are trained together on a weighted sum of their cross-entropies. The prediction is a weighted sum of all
predictions, the network's own among them. Then the network is cut behind the stage whose ensemble is best on
validation data. What is left is an ordinary, smaller module without early exits. The weights are uniform, rise or fall
with depth, or are "hybrid".

Ours, since the abstract gives no numbers:

- "rising": proportional to 1, 2, 3, ...; "falling": the reverse. They sum to 1.
- "hybrid": falling weights in the loss, so that early exits are good enough to stop at, and rising ones in the
  prediction, since later exits are more accurate.
- What is summed are probabilities. A pruned network keeps the proportions of its weights.
- A classifier is average pooling and one linear layer. The optimizer is Adam with a learning rate of 1e-3.
- Leaving early with the ensemble so far, as an EarlyExit does.
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
    """The combination of AEP: a weighted sum of the probabilities of all exits so far, scaled to sum to 1.

    Args:
        loss_weights: M+1 weights of the cross-entropies, the network's own last.
        prediction_weights: M+1 weights of the predictions. That of the first exit must be above 0.

    Raises:
        ValueError: A weight is negative or not finite, or the two differ in length.
    """

    name = "aep"
    loss_weights: tuple[float, ...]
    prediction_weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("loss_weights", "prediction_weights"):
            numbers = tuple(map(float, getattr(self, name)))
            if not all(0 <= each < math.inf for each in numbers):
                raise ValueError(f"`{name}` is {numbers}; wanted weights, from 0 on")
            object.__setattr__(self, name, numbers)
        if not (self.prediction_weights and self.prediction_weights[0] > 0):
            raise ValueError(
                f"`prediction_weights` is {self.prediction_weights}; wanted more than 0 for the first exit: at that "
                "exit there is no other prediction"
            )
        if len(self.loss_weights) != len(self.prediction_weights):
            raise ValueError(
                f"there are {len(self.loss_weights)} `loss_weights` and {len(self.prediction_weights)} "
                "`prediction_weights`"
            )

    def __call__(self, log_probs: Tensor, memory: Tensor | None, exit: int, last: bool) -> tuple[Tensor, Tensor]:
        """Add the prediction of an exit. The memory is the logarithm of the weighted sum so far [B, K]."""
        weighted = log_probs + _log(self.prediction_weights[exit])
        memory = weighted if memory is None else torch.logaddexp(memory, weighted)
        return memory.log_softmax(1), memory

    def at_exits(self, numbers: Sequence[int]) -> Ensemble:
        """Return the combination of a network with only these exits."""
        chosen = [*numbers, len(self.prediction_weights) - 1]
        return Ensemble(*(tuple(each[j] for j in chosen) for each in (self.loss_weights, self.prediction_weights)))


class Pruned(nn.Module):
    """The first stages of a network with their exits: images -> log-probabilities of the ensemble [B, K].

    It holds copies of stages and heads, and can be saved, loaded and exported like any module.

    Args:
        stages: The stages that are kept.
        heads: One per stage.
        prediction_weights: One per stage.
    """

    def __init__(
        self, stages: Sequence[nn.Module], heads: Sequence[nn.Module], prediction_weights: Sequence[float]
    ) -> None:
        super().__init__()
        # In one call, so that modules shared by two stages stay shared.
        self.stages, self.heads = copy.deepcopy((nn.ModuleList(stages), nn.ModuleList(heads)))
        self.prediction_weights = tuple(prediction_weights)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x, total = images, None
        for stage, head, weight in zip(self.stages, self.heads, self.prediction_weights, strict=True):
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
    """Build a network with exits that predict together. They are not trained yet.

    An exit with the threshold +inf takes no part in the ensemble; `train`, `prune` and `calibrate` switch all exits on.

    Args:
        model: The network, in eval mode, or Stages of it.
        example_input: A batch as the model takes it.
        num_classes: Checked against the model's logits, if given.
        exits: Where exits stand, as in EarlyExit.
        weighting: "uniform", "rising", "falling" or "hybrid": see `weights`. For other weights, set `ee.combination` to
            an `Ensemble`.
        seed: Of the heads' initial weights.

    Returns:
        The network. `train` it.

    Raises:
        ValueError: `weighting` is unknown, or an argument does not fit the model.

    Example:
        ee = aep.build(model, images[:1], weighting="rising")
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
    """Train the exits, and the network with them.

    Afterwards all exits are on and none fires: the network predicts with the whole ensemble. Calibrate or `prune` it.

    Args:
        ee: What `build` returned; it is trained in place.
        loader: Yields (images, labels); for joint=False also what `training.cache` returns.
        epochs: How many.
        joint: Train the network, too: the model's own weights change. False: the exits alone.
        lr: The learning rate of Adam.
        seed: Of the random numbers in training.
        checkpoint: A file to continue from after an interruption, see `training.run`.
        precision: Of the forward pass, see `training.run`.
        progress: Show a progress bar.

    Returns:
        The mean loss of every epoch.

    Example:
        ee = aep.build(model, images[:1])
        aep.train(ee, loader, epochs=2, progress=False)
    """
    loss_weights = _ensemble(ee).loss_weights

    def objective(outputs: training.Outputs, labels: Tensor, epoch: int) -> Tensor:
        return loss(outputs, labels, loss_weights)

    module = training.Joint(ee) if joint else training.ExitHeads(ee)
    losses = training.run(
        module,
        loader,
        objective,
        epochs=epochs,
        optimizer=torch.optim.Adam(module.parameters(), lr),
        prepare=training.identity if joint else training.Features(ee),
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
    """Cut the network behind the first stage whose ensemble is accurate enough. `ee` stays as it is.

    Args:
        ee: A trained network.
        loader: Yields (images, labels) that were not used in training; or a record of them.
        accuracy_drop: How much less accurate than the best prefix the pruned network may be, on these samples.
        progress: Show a progress bar.

    Returns:
        The shortest prefix of the network that is accurate enough.

    Raises:
        ValueError: There are no samples, the record is of another network, or `accuracy_drop` is negative.

    Example:
        small = aep.prune(ee, held_out, accuracy_drop=0.01, progress=False)
        prediction = small(images).argmax(1)
    """
    prediction_weights = _ensemble(ee).prediction_weights
    record = loader if isinstance(loader, Record) else ee.record(loader, progress)
    refuse_foreign(record, ee)
    if not accuracy_drop >= 0:
        raise ValueError(f"`accuracy_drop` is {accuracy_drop}; wanted a number from 0 on, such as 0.01")
    if not len(record):
        raise ValueError("the record holds no samples; wanted some hundred that were not learned")
    accuracy = record.accuracy
    # The tolerance is for rounding: equal accuracies are equal.
    stop = int((accuracy >= accuracy.max() - accuracy_drop - 1e-12).nonzero()[0])
    heads = [*ee.heads, nn.LogSoftmax(1)]
    return Pruned(list(ee.stages)[: stop + 1], heads[: stop + 1], prediction_weights[: stop + 1])


def _ensemble(ee: EarlyExit) -> Ensemble:
    if not isinstance(ee.combination, Ensemble):
        raise TypeError("the exits of `ee` do not answer together: make it with aep.build")
    if len(ee.combination.prediction_weights) != len(ee.stages):
        raise ValueError(
            f"`ee.combination` has {len(ee.combination.prediction_weights)} weights; wanted {len(ee.stages)}, one per "
            "exit and one for the network itself"
        )
    return ee.combination


# ---- formulas --------------------------------------------------------------------------------------------------------


def weights(weighting: str, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the weights of an ensemble. They sum to 1.

    Args:
        weighting: "uniform", "rising" (in proportion to 1, 2, 3, ...), "falling" (the reverse), or "hybrid" (falling in
            the loss, rising in the prediction).
        count: How many exits there are, the network's own classifier among them.

    Returns:
        The weights in the loss, and those in the prediction.

    Raises:
        ValueError: `weighting` is unknown.

    Example:
        loss_weights, prediction_weights = aep.weights("hybrid", 3)  # (1/2, 1/3, 1/6) and (1/6, 1/3, 1/2)
    """
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


def loss(logits: Sequence[Tensor], labels: Tensor, loss_weights: Sequence[float]) -> Tensor:
    """Compute the weighted sum of cross-entropies.

    Args:
        logits: Of the M exits and the network [B, K] each.
        labels: [B].
        loss_weights: M+1 numbers.

    Returns:
        A scalar.

    Example:
        loss = aep.loss([torch.randn(4, 10), torch.randn(4, 10)], torch.tensor([0, 1, 2, 3]), [0.3, 0.7])
    """
    terms = [weight * F.cross_entropy(each.float(), labels) for each, weight in zip(logits, loss_weights, strict=True)]
    return torch.stack(terms).sum()


def _log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf
