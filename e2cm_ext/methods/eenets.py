"""EENets (Demir and Akbas: Early-exit Convolutional Neural Networks): exits that learn when to be taken.

An exit has two branches on its pooled features (normalised over the batch before, with `norm`): y = softmax(Linear) are
its class probabilities, h = sigmoid(Linear to one number) is its gate. Training takes h for the probability of leaving,
so that what comes of a sample from exit i on, and what it will have cost, is

    Y'_i = h_i y_i + (1 - h_i) Y'_{i+1},  Y'_M = y_M        C'_i = h_i c_i + (1 - h_i) C'_{i+1},  C'_M = c_M

with c the FLOPs of leaving there, and the loss sets one against the other: the sum over i of NLL(log Y'_i) +
price * mean C'_i. In use a sample leaves at the first exit whose h is above 0.5; other thresholds can be calibrated.

The authors' public code has: the loss over all i at the price 1 (its default) or over i = 0 alone; 25 epochs on the
plain sum of NLL(log y_i) before the latter (its two stages); Adam with a learning rate of 1e-3 and a weight decay of
1e-4, for 150 epochs; the rules of placement, "fine" for two exits by default. Ours are: exits at the place nearest to
the FLOPs that these rules ask for (theirs are behind the first block that has spent them); costs that hold all exits on
the way, not only the one that is taken; sums in log space; and training the exits alone, of a finished network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..early_exit import EarlyExit
from ..stages import Stages
from . import training
from .learned_head import LearnedHead
from .pooled_linear import averages, channels

__all__ = ["ExitBlock", "build", "loss", "outcome", "placements", "train"]


class ExitBlock(LearnedHead, kind="eenets"):
    """Both branches of an exit. norm: batch normalisation of the features before they are averaged over the map."""

    def __init__(self, num_classes: int, feature_shape: Sequence[int], *, norm: bool = False) -> None:
        super().__init__(num_classes, feature_shape)
        size = channels(self.feature_shape)
        if norm and len(self.feature_shape) != 3:
            raise ValueError(f"`norm` is for maps [C, H, W]; these features are {list(self.feature_shape)}")
        self.norm = nn.BatchNorm2d(size) if norm else None
        self.answer, self.confidence = nn.Linear(size, num_classes), nn.Linear(size, 1)

    def squeeze(self, x: Tensor) -> Tensor:
        return averages(x) if self.norm is None else x

    def outputs(self, squeezed: Tensor) -> tuple[Tensor, ...]:
        """Logits of y [B, K] and of h [B]."""
        x = squeezed if self.norm is None else averages(self.norm(squeezed))
        return self.answer(x), self.confidence(x)[:, 0]

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log y and h."""
        answer, confidence = self.outputs(self.squeeze(x))
        return answer.float().log_softmax(1), confidence.float().sigmoid()

    def config(self) -> dict[str, Any]:
        return super().config() | {"norm": self.norm is not None}


def build(
    model: nn.Module | Stages,
    example_input: Tensor,
    num_classes: int | None = None,
    exits: int | str | Sequence[str] | Sequence[float] = 2,
    placement: str = "fine",
    norm: bool = False,
    *,
    seed: int = 0,
) -> EarlyExit:
    """A network with gated exits, to be trained. exits: how many, where `placement` ("linear", "pareto", "fine",
    "golden") wants them; or anything else that EarlyExit takes, and then `placement` is not asked."""
    if isinstance(exits, int):
        exits = placements(placement, exits)

    def block(classes: int, shape: tuple[int, ...]) -> ExitBlock:
        return ExitBlock(classes, shape, norm=norm)

    with training.seeded(seed):
        return EarlyExit(model, example_input, num_classes, exits, block, "gate")


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    epochs: int = 150,
    joint: bool = True,
    price: float = 1.0,
    over: str = "all",
    warm_up: int = 0,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> list[float]:
    """Trains exits and network (joint=False: the exits alone); sets all thresholds to 0.5; returns the mean loss of
    every epoch.

    price, over: see `loss`. warm_up: so many epochs first on the plain sum of NLL(log y_i); with over="first" and 25 of
    them, the authors' two stages. lr, weight_decay: Adam's. The rest: see training.run.
    """
    if over not in ("all", "first"):
        raise ValueError(f"`over` is {over!r}; wanted 'all' or 'first'")
    costs = ee.costs.fractions.tolist()

    def objective(outputs: training.Outputs, labels: Tensor, epoch: int) -> Tensor:
        *exits, logits = outputs
        log_probs = [each.float().log_softmax(1) for each in (*(answer for answer, _ in exits), logits)]
        if epoch < warm_up:
            return torch.stack([F.nll_loss(each, labels) for each in log_probs]).sum()
        return loss(log_probs, [gate.float() for _, gate in exits], labels, costs, price, over)

    module = training.Joint(ee) if joint else training.Learners(ee)
    losses = training.run(
        module,
        loader,
        objective,
        epochs=epochs,
        optimizer=torch.optim.Adam(module.parameters(), lr, weight_decay=weight_decay),
        prepare=training.same if joint else training.Features(ee),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    ee.thresholds = 0.5
    return losses


# ---- formulas --------------------------------------------------------------------------------------------------------

_PLACEMENTS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda i, count: (i + 1) / (count + 1),
    "pareto": lambda i, _: 1 - 0.8 ** (i + 1),
    "fine": lambda i, _: 1 - 0.95 ** (i + 1),
    "golden": lambda i, count: 1.61803398875 ** (i - count),
}


def placements(kind: str, count: int) -> list[float]:
    """Where `count` exits ought to stand, as fractions of the network's FLOPs."""
    if kind not in _PLACEMENTS:
        raise ValueError(f"`placement` is {kind!r}; wanted one of {', '.join(map(repr, _PLACEMENTS))}")
    if count < 1:
        raise ValueError(f"`exits` is {count}; wanted at least 1")
    return [_PLACEMENTS[kind](i, count) for i in range(count)]


def outcome(values: Sequence[Tensor], gates: Sequence[Tensor], costs: Sequence[float]) -> tuple[Tensor, Tensor]:
    """log Y'_i and C'_i, [M+1, B] each.

    values: M+1 times [B], log-probabilities of one class, such as the true one. gates: M times [B], logits of h. costs:
    M+1 numbers.
    """
    answers, spent = [values[-1]], [torch.full_like(values[-1], costs[-1])]
    for value, gate, cost in zip(reversed(values[:-1]), reversed(gates), reversed(costs[:-1]), strict=True):
        answers.append(torch.logaddexp(F.logsigmoid(gate) + value, F.logsigmoid(-gate) + answers[-1]))
        spent.append(torch.lerp(spent[-1], torch.full_like(spent[-1], cost), gate.sigmoid()))
    return torch.stack(answers[::-1]), torch.stack(spent[::-1])


def loss(
    log_probs: Sequence[Tensor],
    gates: Sequence[Tensor],
    labels: Tensor,
    costs: Sequence[float],
    price: float = 1.0,
    over: str = "all",
) -> Tensor:
    """The sum over i of NLL(log Y'_i) + price * mean C'_i; over="first": for i = 0 alone.

    log_probs: M+1 times [B, K]. gates: M times [B], logits of h. costs: M+1 numbers.
    """
    of_label = [each.gather(1, labels[:, None])[:, 0] for each in log_probs]
    answers, spent = outcome(of_label, gates, costs)
    terms = price * spent.mean(1) - answers.mean(1)
    return terms[0] if over == "first" else terms.sum()
