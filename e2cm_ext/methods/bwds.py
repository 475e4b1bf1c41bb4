"""BWDS (Bolukbasi, Wang, Dekel, Saligrama: Adaptive Neural Networks for Efficient Inference): decisions, from the back.

The network is frozen; each exit has a classifier, pooled features and one Linear, and a decision function. These are
learned from the last exit to the first, as weighted binary classifiers "leave now or go on": behind an exit everything
is decided already, so it is known what would come of each sample that goes on. It should leave if

    price * (its loss here - its loss where it would leave) <= FLOPs up to there - FLOPs up to here,

and how much that matters, the absolute difference of the two sides, is its weight. The price is the paper's lambda: how
much of the network's FLOPs a loss of 1 is worth. Sweeping it gives a curve.

Ours is how the sweep is kept. Under the best policies, a sample that leaves at a price leaves at every lower one: what
is gained by leaving is a concave function of the price (the least of many linear ones minus one of them), and above 0
at the price 0. So an exit has one decision function per price; a sample leaves at a price if the functions of that and
of all lower prices say so; and how sure an exit is of a sample is the price below which it leaves. So thresholds are
prices: `ee.thresholds = 8.0` takes the decisions that were learned for that price, `curve` is the paper's sweep, and
`ee.calibrate`, which may choose another price at each exit, works as ever.

Ours, too, where the source is silent: the loss is the error, 0 or 1; FLOPs are fractions of the network's; decision
functions are logistic, of what the classifier says (its largest probability, its lead over the second, the lead of its
logarithm, the entropy, all the probabilities) or of the pooled features; L-BFGS finds them, with a small ridge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..calibration.curves import Curve, curve_of_thresholds
from ..calibration.record import Record
from ..calibration.search import default_thresholds
from ..calibration.target import refuse_foreign
from ..data.loader import place_of
from ..early_exit import EarlyExit
from ..stages import Stages
from . import training
from .pooled_linear import PooledLinear

__all__ = ["PRICES", "Decider", "backward", "build", "curve", "decide", "separate", "sweep", "train", "verdicts"]

# That an error may be worth, in FLOPs of the network: what a curve of accuracy over FLOPs rises by, upside down.
PRICES = tuple(2.0 ** (i / 4) for i in range(-4, 25))

_INPUTS = ("scores", "features")
_RIDGE = 1e-4  # on standardised inputs, against weights that average 1
_STEPS, _FLAT = 100, 1e-5  # of L-BFGS: at most so many; the gradient at which it stops
_SURE = 50.0  # a lead of logarithms, of probabilities that float32 can tell from 0

Classify = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, verdicts, weights -> a decision [F+1]


class Decider(PooledLinear, kind="bwds"):
    """A classifier, and a decision function for each of the prices, which rise."""

    decisions: Tensor  # [P, F+1]: linear functions, their constants last, above 0 where one should leave

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        *,
        prices: Sequence[float] = PRICES,
        inputs: str = "scores",
    ) -> None:
        super().__init__(num_classes, feature_shape)
        self.prices = tuple(map(float, prices))
        if not self.prices or not all(a < b for a, b in pairwise((0.0, *self.prices, math.inf))):
            raise ValueError(f"`prices` is {list(prices)}; wanted rising numbers above 0")
        if inputs not in _INPUTS:
            raise ValueError(f"`inputs` is {inputs!r}; wanted one of {', '.join(map(repr, _INPUTS))}")
        self.inputs = inputs
        size = num_classes + 4 if inputs == "scores" else self.linear.in_features
        self.register_buffer("decisions", torch.zeros(len(self.prices), size + 1))

    def look(self, squeezed: Tensor, log_probs: Tensor) -> Tensor:
        """[B, F]: what decisions go by."""
        return scores(log_probs) if self.inputs == "scores" else squeezed.float()

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities, and the price below which a sample leaves: the lowest at which it does not."""
        squeezed = self.squeeze(x)
        log_probs = self.linear(squeezed).float().log_softmax(1)
        seen = self.look(squeezed, log_probs)
        decisions = self.decisions.float()
        leaves = F.linear(seen, decisions[:, :-1], decisions[:, -1]) > 0
        number = leaves.long().cumprod(1).sum(1)
        limits = torch.tensor([*self.prices, 2 * self.prices[-1]], device=seen.device)
        return log_probs, limits[number].masked_fill(log_probs.isnan().any(1), math.nan)

    def flops(self) -> int:
        """The classifier, and all decisions."""
        return super().flops() + 2 * self.decisions.shape[0] * (self.decisions.shape[1] - 1)

    def config(self) -> dict[str, Any]:
        return super().config() | {"prices": list(self.prices), "inputs": self.inputs}


def scores(log_probs: Tensor) -> Tensor:
    """[B, K + 4]: the largest probability, its lead over the second, the lead of its logarithm, the entropy, and all
    probabilities."""
    probabilities = log_probs.exp()
    best = log_probs.topk(min(2, log_probs.shape[1]), 1).values
    first, second = best[:, 0], best[:, -1]
    entropy = -torch.where(probabilities > 0, probabilities * log_probs, probabilities).sum(1)
    lead = (first - second).clamp(max=_SURE)
    return torch.cat([torch.stack([first.exp(), first.exp() - second.exp(), lead, entropy], 1), probabilities], 1)


def build(
    model: nn.Module | Stages,
    example_input: Tensor,
    num_classes: int | None = None,
    exits: int | str | Sequence[str] | Sequence[float] = 6,
    prices: Sequence[float] = PRICES,
    inputs: str = "scores",
    *,
    seed: int = 0,
) -> EarlyExit:
    """A network whose exits are to be trained. prices: that decisions are learned for, rising; inputs: what they see,
    "scores" (what the classifier says) or "features" (averages over the map, as the classifier sees them)."""

    def decider(classes: int, shape: tuple[int, ...]) -> Decider:
        return Decider(classes, shape, prices=prices, inputs=inputs)

    with training.seeded(seed):
        return EarlyExit(model, example_input, num_classes, exits, decider, "gate")


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    decide_on: Iterable[Any] | None = None,
    epochs: int = 25,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> list[float]:
    """Trains the classifiers and then, with `decide`, the decisions on `decide_on` or the same loader; returns the mean
    loss of every epoch. All thresholds are +inf then: calibrate, take a point of `curve`, or set them to a price.

    Adam, with a tenth of the learning rate after 15 of 25 epochs, as for SDN. A loader from training.cache saves
    running the network in every epoch. decide_on: samples that neither the network nor the classifiers have learned, if
    there are any: both err less often on those that they know. checkpoint: of the classifiers. The rest: see
    training.run.
    """

    def objective(outputs: training.Outputs, labels: Tensor, epoch: int) -> Tensor:
        return torch.stack([F.cross_entropy(logits.float(), labels) for logits in outputs[:-1]]).sum()

    module = training.Learners(ee)
    optimizer = torch.optim.Adam(module.parameters(), lr)
    losses = training.run(
        module,
        loader,
        objective,
        epochs=epochs,
        optimizer=optimizer,
        schedule=training.falling(optimizer, epochs, (0.6,)),
        prepare=training.Features(ee),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    decide(ee, loader if decide_on is None else decide_on, progress)
    return losses


@torch.no_grad()
def decide(ee: EarlyExit, loader: Iterable[Any], progress: bool = True) -> None:
    """Learns the decisions of all exits for all prices, their classifiers being what they are.

    Held meanwhile, for every exit and sample: what decisions go by, K + 4 numbers or as many as there are channels.
    """
    heads = _deciders(ee)
    inputs, losses = _seen(ee, heads, loader, progress)
    prices = heads[0].prices
    with tqdm(total=len(prices) * len(heads), desc="decisions", disable=not progress, leave=False) as bar:

        def separate_and_tell(inputs: Tensor, leave: Tensor, weight: Tensor) -> Tensor:
            bar.update(1)
            return separate(inputs, leave, weight)

        found = sweep(inputs, losses, ee.costs.fractions.tolist(), prices, separate_and_tell)
    for head, decisions in zip(heads, found, strict=True):
        head.decisions.copy_(decisions)
    ee.thresholds = math.inf


def curve(ee: EarlyExit, loader: Record | Iterable[Any], progress: bool = True) -> Curve:
    """The paper's: the decisions of each price, the same at all exits, on a loader's samples or on a record of them.

    It begins with everybody leaving at the first exit, as at the price 0, and ends with nobody leaving.
    """
    prices = _deciders(ee)[0].prices
    record = loader if isinstance(loader, Record) else ee.record(loader, progress)
    refuse_foreign(record, ee)
    same = torch.tensor(prices)[:, None].expand(-1, record.exits)
    return curve_of_thresholds(record, torch.cat([default_thresholds(record.exits), same]), progress)


def _deciders(ee: EarlyExit) -> list[Decider]:
    if not all(isinstance(head, Decider) for head in ee.heads):
        raise TypeError("the exits of `ee` learn no decisions: make it with bwds.build")
    return list(ee.heads)  # type: ignore[arg-type]


def _seen(ee: EarlyExit, heads: list[Decider], loader: Iterable[Any], progress: bool) -> tuple[list[Tensor], Tensor]:
    """What the decisions of every exit go by [N, F], and errors [N, M+1] float32."""
    features = training.Features(ee)
    batches = loader if isinstance(loader, training.Cached) else ee.batches(loader, progress).run("answers")
    inputs: list[list[Tensor]] = [[] for _ in heads]
    losses = []
    device, _ = place_of(ee.stages)
    for images, labels in batches:
        *squeezed, logits = (x.to(device) for x in features(images))
        answers = [logits.argmax(1)]
        for j, (head, x) in reversed(list(enumerate(zip(heads, squeezed, strict=True)))):
            log_probs = head.linear(x).float().log_softmax(1)
            inputs[j].append(head.look(x, log_probs))
            answers.insert(0, log_probs.argmax(1))
        losses.append((torch.stack(answers, 1) != labels.to(device)[:, None]).float())
    if not losses:
        raise ValueError("the loader gave no sample: all its batches are empty")
    return [_of_all_processes(torch.cat(each)) for each in inputs], _of_all_processes(torch.cat(losses))


def _of_all_processes(rows: Tensor) -> Tensor:
    """Every process decides from the samples of all, and so the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


# ---- formulas --------------------------------------------------------------------------------------------------------


def verdicts(
    loss_here: Tensor, loss_behind: Tensor, cost_here: float, cost_behind: Tensor, price: float
) -> tuple[Tensor, Tensor]:
    """Who should leave [N] bool, and how much that matters [N]."""
    gain = (cost_behind - cost_here) - price * (loss_here - loss_behind)
    return gain >= 0, gain.abs()


def sweep(
    inputs: Sequence[Tensor],
    losses: Tensor,
    costs: Sequence[float],
    prices: Sequence[float],
    classify: Classify | None = None,
) -> list[Tensor]:
    """Decisions [P, F+1] of the M exits, for prices that rise: who has stayed at a price stays at all higher ones.

    inputs: M times [N, F], what each exit's decisions go by. losses: [N, M+1]. costs: of leaving there, M+1 numbers.
    """
    left = [torch.ones(len(losses), dtype=torch.bool, device=losses.device) for _ in inputs]
    found: list[list[Tensor]] = [[] for _ in inputs]
    for price in prices:
        for decisions, one in zip(
            found, backward(inputs, losses, costs, price, left, classify or separate), strict=True
        ):
            decisions.append(one)
    return [torch.stack(decisions) for decisions in found]


def backward(
    inputs: Sequence[Tensor],
    losses: Tensor,
    costs: Sequence[float],
    price: float,
    left: list[Tensor],
    classify: Classify,
) -> list[Tensor]:
    """Decisions [F+1] of the M exits for one price. left: M times [N] bool, who has left at lower prices, which is
    brought up to date."""
    behind, spent = losses[:, -1], torch.full_like(losses[:, -1], costs[-1])
    found: list[Tensor] = []
    for j in reversed(range(len(inputs))):
        leave, weight = verdicts(losses[:, j], behind, costs[j], spent, price)
        found.insert(0, classify(inputs[j], leave, weight))
        left[j] = left[j] & (opinion(inputs[j], found[0]) > 0)
        behind = losses[:, j].where(left[j], behind)
        spent = spent.masked_fill(left[j], costs[j])
    return found


def opinion(inputs: Tensor, decision: Tensor) -> Tensor:
    """[N]: above 0 means leave."""
    return F.linear(inputs, decision[None, :-1], decision[-1:])[:, 0]


def separate(inputs: Tensor, leave: Tensor, weight: Tensor) -> Tensor:
    """A weighted logistic regression: a linear function [F+1], its constant last, above 0 where one should leave."""
    mean, spread = inputs.double().mean(0), inputs.double().std(0, correction=0)
    spread = spread.where(spread > 1e-6 * (1 + mean.abs()), 1.0)  # of what is the same for all samples: anything
    x = (inputs.double() - mean) / spread
    sign = leave.double().mul(-2).add(1)
    weight = weight.double() / weight.double().mean().clamp(min=1e-30)
    decision = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [decision], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=_FLAT
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = (weight * F.softplus(sign * opinion(x, decision))).mean() + _RIDGE / 2 * decision.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    slope = decision.detach()[:-1] / spread
    return torch.cat([slope, (decision.detach()[-1] - slope @ mean)[None]]).to(inputs.dtype)
