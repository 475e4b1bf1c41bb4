"""EENets (Demir and Akbas, "Early-exit Convolutional Neural Networks"): exits with a learned gate.

From the paper: An exit has two branches on its pooled features (with `norm`, they are normalised over the batch
before). y = softmax(Linear) are its class probabilities, and h = sigmoid(Linear), one number, is its gate. In training
h is the probability of leaving. So the expected probabilities and the expected cost from exit i on are

    Y_i = h_i y_i + (1 - h_i) Y_{i+1},  Y_M = y_M        C_i = h_i c_i + (1 - h_i) C_{i+1},  C_M = c_M

with c_i the FLOPs of leaving at exit i, and M the network's own classifier. The loss is the sum over i of NLL(log Y_i)
+ price * mean C_i. At inference a sample leaves at the first exit with h > 0.5.

From the authors' public code: the loss over all i with price 1 (the default), or over i = 0 alone; before the latter,
25 epochs of the plain sum of NLL(log y_i) (two stages); Adam with a learning rate of 1e-3 and a weight decay of 1e-4,
for 150 epochs; the rules of placement, "fine" with two exits by default.

Ours:

- An exit stands at the cut point nearest to the FLOPs that the rule asks for. In the authors' code it stands behind
  the first block that has spent them.
- The cost of leaving contains all exits before, and not only the one that is taken.
- Sums are computed in log space.
- The exits can be trained alone, on a finished network, and other thresholds than 0.5 can be calibrated.
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
from .pooled_linear import average_pool, num_channels

__all__ = ["ExitBlock", "build", "expectation", "loss", "placements", "train"]


class ExitBlock(LearnedHead, kind="eenets"):
    """An exit of EENets: a classifier and a gate on pooled features.

    Args:
        num_classes: K.
        feature_shape: Of maps [C, H, W], tokens [N, C] or vectors [C].
        norm: Normalise maps over the batch before they are pooled.

    Raises:
        ValueError: `norm` is set for features that are not maps.
    """

    def __init__(self, num_classes: int, feature_shape: Sequence[int], *, norm: bool = False) -> None:
        super().__init__(num_classes, feature_shape)
        size = num_channels(self.feature_shape)
        if norm and len(self.feature_shape) != 3:
            raise ValueError(f"`norm` is for maps [C, H, W]; these features are {list(self.feature_shape)}")
        self.norm = nn.BatchNorm2d(size) if norm else None
        self.classifier, self.confidence = nn.Linear(size, num_classes), nn.Linear(size, 1)

    def squeeze(self, x: Tensor) -> Tensor:
        return average_pool(x) if self.norm is None else x

    def outputs(self, squeezed: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits of y [B, K] and of h [B]."""
        x = squeezed if self.norm is None else average_pool(self.norm(squeezed))
        return self.classifier(x), self.confidence(x)[:, 0]

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log y [B, K] and h [B]."""
        logits, gate = self.outputs(self.squeeze(x))
        return logits.float().log_softmax(1), gate.float().sigmoid()

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
    """Build a network with gated exits. They are not trained yet.

    Args:
        model: The network, in eval mode, or Stages of it. Joint training changes it.
        example_input: A batch as the model takes it.
        num_classes: Checked against the model's logits, if given.
        exits: How many, to be placed by `placement`; or where they stand, as in EarlyExit.
        placement: "linear", "pareto", "fine" or "golden", see `placements`. Only used if `exits` is a number.
        norm: Normalise feature maps over the batch before they are pooled.
        seed: Of the heads' initial weights.

    Returns:
        The network, with the rule "gate". `train` it.

    Raises:
        ValueError: `placement` is unknown, or an argument does not fit the model.

    Example:
        ee = eenets.build(model, images[:1], exits=2, placement="linear")
    """
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
    """Train the exits, and the network with them. All thresholds are 0.5 afterwards.

    Args:
        ee: What `build` returned; it is trained in place.
        loader: Yields (images, labels); for joint=False also what `training.cache` returns.
        epochs: How many, those of `warm_up` among them.
        joint: Train the network, too: the model's own weights change. False: the exits alone.
        price: Of FLOPs in the loss, see `loss`.
        over: "all" exits or the "first" one, see `loss`.
        warm_up: So many epochs on the plain sum of cross-entropies first. over="first" and warm_up=25 are the authors'
            two stages.
        lr: The learning rate of Adam.
        weight_decay: Of Adam.
        seed: Of the random numbers in training.
        checkpoint: A file to continue from after an interruption, see `training.run`.
        precision: Of the forward pass, see `training.run`.
        progress: Show a progress bar.

    Returns:
        The mean loss of every epoch.

    Raises:
        ValueError: `over` is unknown.

    Example:
        ee = eenets.build(model, images[:1], exits=2, placement="linear")
        eenets.train(ee, loader, epochs=2, lr=0.01, progress=False)
    """
    if over not in ("all", "first"):
        raise ValueError(f"`over` is {over!r}; wanted 'all' or 'first'")
    costs = ee.costs.fractions.tolist()

    def objective(outputs: training.Outputs, labels: Tensor, epoch: int) -> Tensor:
        *exits, network_logits = outputs
        log_probs = [each.float().log_softmax(1) for each in (*(logits for logits, _ in exits), network_logits)]
        if epoch < warm_up:
            return torch.stack([F.nll_loss(each, labels) for each in log_probs]).sum()
        return loss(log_probs, [gate.float() for _, gate in exits], labels, costs, price, over)

    module = training.Joint(ee) if joint else training.ExitHeads(ee)
    losses = training.run(
        module,
        loader,
        objective,
        epochs=epochs,
        optimizer=torch.optim.Adam(module.parameters(), lr, weight_decay=weight_decay),
        prepare=training.identity if joint else training.Features(ee),
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
    """Compute where exits should stand, by a rule of the authors' code.

    Args:
        kind: "linear", "pareto", "fine" or "golden".
        count: How many exits.

    Returns:
        Fractions of the network's FLOPs.

    Raises:
        ValueError: The rule is unknown, or there is no exit.

    Example:
        fractions = eenets.placements("linear", 3)  # [0.25, 0.5, 0.75]
    """
    if kind not in _PLACEMENTS:
        raise ValueError(f"`placement` is {kind!r}; wanted one of {', '.join(map(repr, _PLACEMENTS))}")
    if count < 1:
        raise ValueError(f"`exits` is {count}; wanted at least 1")
    return [_PLACEMENTS[kind](i, count) for i in range(count)]


def expectation(values: Sequence[Tensor], gates: Sequence[Tensor], costs: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Compute log Y_i of one class, and C_i: what is expected from exit i on.

    Args:
        values: M+1 times [B], log-probabilities of one class, such as the true one.
        gates: M times [B], logits of h.
        costs: M+1 numbers.

    Returns:
        Log-probabilities [M+1, B], and costs [M+1, B].
    """
    log_probs, spent = [values[-1]], [torch.full_like(values[-1], costs[-1])]
    for value, gate, cost in zip(reversed(values[:-1]), reversed(gates), reversed(costs[:-1]), strict=True):
        log_probs.append(torch.logaddexp(F.logsigmoid(gate) + value, F.logsigmoid(-gate) + log_probs[-1]))
        spent.append(torch.lerp(spent[-1], torch.full_like(spent[-1], cost), gate.sigmoid()))
    return torch.stack(log_probs[::-1]), torch.stack(spent[::-1])


def loss(
    log_probs: Sequence[Tensor],
    gates: Sequence[Tensor],
    labels: Tensor,
    costs: Sequence[float],
    price: float = 1.0,
    over: str = "all",
) -> Tensor:
    """Compute the sum over i of NLL(log Y_i) + price * mean C_i.

    Args:
        log_probs: M+1 times [B, K], of the exits and the network.
        gates: M times [B], logits of h.
        labels: [B].
        costs: M+1 numbers, FLOPs of leaving there.
        price: Of FLOPs.
        over: "all", or "first" for the term i = 0 alone.

    Returns:
        A scalar.

    Example:
        log_probs = [torch.randn(4, 10).log_softmax(1) for _ in range(2)]
        loss = eenets.loss(log_probs, [torch.randn(4)], torch.tensor([0, 1, 2, 3]), costs=[0.3, 1.0])
    """
    of_label = [each.gather(1, labels[:, None])[:, 0] for each in log_probs]
    expected, spent = expectation(of_label, gates, costs)
    terms = price * spent.mean(1) - expected.mean(1)
    return terms[0] if over == "first" else terms.sum()
