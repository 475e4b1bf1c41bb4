"""E2CM joined with another method (sections 3.2 and 4.1 of the E2CM paper): learned heads with class means beside them.

From the paper: A sample that leaves always gets the prediction of the learned head. Class means vote on whether it
leaves. They vote for leaving

    agree="decision": if their own confidence is above their own limit;
    agree="class":    if, besides, they predict the same class as the learned head. (The limit is -inf at the start.)

A sample leaves

    leave="either": if the learned head is confident enough, or class means vote for it (section 3.2: it continues only
                    if both say so);
    leave="both":   if the learned head is confident enough, and class means vote for it (section 4.1: if they disagree,
                    it stays).

The paper does not say what "disagree" means; `agree` has both readings.

Ours:

- Whitened means in place of the raw ones, where asked for.
- How limits are found: see `options`.
- `ProductHead`, which multiplies the probabilities of both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..calibration import curves
from ..calibration.record import Record
from ..early_exit import EarlyExit
from ..heads import build as build_heads
from ..heads import from_config
from ..heads.base import Head
from ..heads.rules import Confidence, Gate
from ..stages.flops import Costs

__all__ = [
    "Agree",
    "JoinedHead",
    "Leave",
    "Option",
    "ProductHead",
    "VotingHead",
    "join",
    "joint_certainty",
    "options",
    "record",
    "set_limits",
]

Leave = Literal["either", "both"]
Agree = Literal["class", "decision"]
_BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # FLOPs


def joint_certainty(
    confidence: Tensor,
    prediction: Tensor,
    means_confidence: Tensor,
    means_prediction: Tensor,
    limit: Tensor | float,
    leave: Leave,
    agree: Agree,
) -> Tensor:
    """Compute the certainty of a joined exit, to be compared with the threshold of the learned head.

    Args:
        confidence: [B], of the learned head.
        prediction: [B], of the learned head.
        means_confidence: [B], of the class means.
        means_prediction: [B], of the class means.
        limit: Above which the class means vote for leaving.
        leave: "either" or "both".
        agree: "class" or "decision".

    Returns:
        [B]: the learned head's confidence where it decides; 2 (more than any probability) where the sample leaves
        unless the exit is off; NaN where it stays.
    """
    vote = means_confidence > limit
    if agree == "class":
        vote = vote & (prediction == means_prediction)
    if leave == "both":
        return torch.where(vote, confidence, math.nan)
    return torch.where(vote & ~confidence.isnan(), 2.0, confidence)


class JoinedHead(Head):
    """Base class of heads that hold a learned head and class means.

    `fit` fits the class means. The learned head must have been trained; it stays as it is.

    Args:
        num_classes: K.
        feature_shape: Of the features at the exit.
        learned: The learned head, or its configuration.
        means: The class means, or their configuration.
    """

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        learned: Head | dict[str, Any],
        means: Head | dict[str, Any],
    ) -> None:
        super().__init__(num_classes, feature_shape)
        self.learned = from_config(learned) if isinstance(learned, dict) else learned
        self.means = from_config(means) if isinstance(means, dict) else means
        self.passes = self.means.passes

    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        self.means.update(x, labels, pass_index)

    def merge(self, other: Any) -> None:
        self.means.merge(other.means)

    def finish(self, pass_index: int) -> None:
        self.means.finish(pass_index)
        self.counts.copy_(self.means.counts)
        self.fitted = self.means.fitted and self.learned.fitted

    def reset(self) -> None:
        super().reset()
        if hasattr(self, "means"):  # the base class calls it before they exist
            self.means.reset()

    def flops(self) -> int:
        return self.learned.flops() + self.means.flops()

    def config(self) -> dict[str, Any]:
        return super().config() | {"learned": self.learned.config(), "means": self.means.config()}


class VotingHead(JoinedHead, kind="voting"):
    """A learned head that predicts, and class means that vote on whether the sample leaves.

    Args:
        num_classes: K.
        feature_shape: Of the features at the exit.
        learned: The learned head, or its configuration.
        means: The class means, or their configuration.
        leave: "either" (section 3.2) or "both" (section 4.1): see the module.
        agree: "class" or "decision": see the module.

    Raises:
        ValueError: `leave` or `agree` is unknown.
    """

    limit: Tensor  # of the class means, float32

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        learned: Head | dict[str, Any],
        means: Head | dict[str, Any],
        leave: Leave = "both",
        agree: Agree = "class",
    ) -> None:
        super().__init__(num_classes, feature_shape, learned, means)
        if leave not in ("either", "both"):
            raise ValueError(f"`leave` is {leave!r}; wanted 'either' (section 3.2) or 'both' (section 4.1)")
        if agree not in ("class", "decision"):
            raise ValueError(f"`agree` is {agree!r}; wanted 'class' or 'decision'")
        self.leave, self.agree = leave, agree
        self.register_buffer("limit", torch.tensor(-math.inf))

    def forward(self, x: Tensor) -> Tensor:
        log_probs: Tensor = self.learned(x)
        return log_probs

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self(x)
        confidence = Confidence().certainty(log_probs)
        means = self.means.score(x, Confidence())
        certainty = joint_certainty(confidence, log_probs.argmax(1), *means, self.limit, self.leave, self.agree)
        return log_probs, certainty

    def config(self) -> dict[str, Any]:
        return super().config() | {"leave": self.leave, "agree": self.agree}


class ProductHead(JoinedHead, kind="product"):
    """The product of the probabilities of a learned head and class means, scaled to sum to 1. Ours, not the paper's."""

    def forward(self, x: Tensor) -> Tensor:
        log_product: Tensor = self.learned(x) + self.means(x)
        return log_product.log_softmax(1)


def join(
    ee: EarlyExit,
    means: str | type[Head] | Callable[[int, tuple[int, ...]], Head] | EarlyExit = "class_means",
    *,
    leave: Leave = "both",
    agree: Agree = "class",
    multiply: bool = False,
    memory: int = 256 << 20,
) -> EarlyExit:
    """Build a network with class means beside the learned heads of another one.

    Args:
        ee: A network with trained heads. It stays as it is; the new network has copies of the heads.
        means: "class_means" (the paper's), "whitened_means", ..., as `head` of EarlyExit: to be fitted by fit(loader).
            Or a network with class means that are fitted already, at the same exits and perhaps others: copies of them.
        leave: "either" or "both": see the module.
        agree: "class" or "decision": see the module.
        multiply: Multiply the probabilities of both (`ProductHead`). `leave` and `agree` have no meaning then.
        memory: Bytes that means="auto" may take.

    Returns:
        A network around the same model, with all thresholds +inf.

    Raises:
        ValueError: `leave` or `agree` is unknown, or the other network lacks an exit.

    Example:
        trained = sdn.build(model, images[:1], exits=2)
        sdn.train(trained, loader, epochs=2, progress=False)
        ee = joined.join(trained, "whitened_means", leave="both", agree="class")
        ee.fit(loader, progress=False)  # fits the class means
    """
    if isinstance(means, EarlyExit):
        beside = [copy.deepcopy(head) for head in means.at_exits(ee.exit_names).head_list()]
    else:
        beside = build_heads(means, ee.num_classes, [head.feature_shape for head in ee.head_list()], memory)
    heads: list[Head] = []
    for learned, other in zip(ee.head_list(), beside, strict=True):
        arguments = (ee.num_classes, learned.feature_shape, copy.deepcopy(learned), other)
        heads.append(ProductHead(*arguments) if multiply else VotingHead(*arguments, leave, agree))
        heads[-1].fitted = learned.fitted and other.fitted
    costs = Costs(ee.costs.stages, tuple(head.flops() for head in heads), ee.costs.names)
    rule = Confidence() if multiply else Gate()
    return EarlyExit.from_parts(
        ee.stages, heads, rule, costs, ee.image_shape, ee.image_dtype, combination=ee.combination
    )


def set_limits(ee: EarlyExit, limits: Tensor | Sequence[float]) -> None:
    """Set the limits above which class means vote for leaving.

    Args:
        ee: What `join` returned; it is changed in place.
        limits: One number per exit.

    Raises:
        TypeError: A head is not a VotingHead.

    Example:
        ee = joined.join(trained, "class_means").fit(loader, progress=False)
        joined.set_limits(ee, [0.2] * len(ee.exit_names))
    """
    for head, value in zip(ee.head_list(), torch.as_tensor(limits, dtype=torch.float32), strict=True):
        if not isinstance(head, VotingHead):
            raise TypeError(f"a {type(head).__name__} has no limit; wanted a network that `join` has made")
        head.limit.copy_(value)


# ---- limits ---------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """Limits of the class means, and the record of the joined network with them."""

    limits: Tensor  # [M] float32, for `set_limits`
    record: Record


def options(
    learned: Record,
    means: Record,
    costs: Costs,
    leave: Leave,
    agree: Agree,
    budgets: Sequence[float] = _BUDGETS,
) -> Iterator[Option]:
    """Propose limits of the class means, from records of the two networks apart.

    Proposed are the thresholds that class means alone would have at several FLOPs budgets, and for agree="class" -inf.
    This is ours: the paper does not say how the second threshold is found.

    Args:
        learned: The record of the network with learned heads.
        means: The record of a network with class means, of the same samples at the same exits, with the rule
            "confidence".
        costs: Those of the joined network.
        leave: "either" or "both".
        agree: "class" or "decision".
        budgets: FLOPs.

    Yields:
        Limits, and the record of the joined network with them.

    Raises:
        ValueError: The records are of other samples or other exits.

    Example:
        means = e2cm.EarlyExit(trained.stages, images[:1], head="class_means").fit(loader, progress=False)
        records = [network.record(held_out, progress=False) for network in (trained, means)]
        ee = joined.join(trained, means)
        for limits, record in joined.options(*records, ee.costs, "both", "class", budgets=(0.9,)):
            curve = e2cm.curve(record, progress=False)
    """
    curve = curves.curve(means)
    vectors = [curve.best_within(budget).thresholds for budget in budgets if budget >= curve.flops[0]]
    if agree == "class":
        vectors.insert(0, torch.full((means.exits,), -math.inf))
    for limits in vectors:
        yield Option(limits, record(learned, means, costs, limits, leave, agree))


def record(
    learned: Record, means: Record, costs: Costs, limits: Tensor | Sequence[float], leave: Leave, agree: Agree
) -> Record:
    """Compute the record of the joined network from records of the two networks apart.

    Args:
        learned: The record of the network with learned heads.
        means: The record of a network with class means, of the same samples at the same exits, with the rule
            "confidence".
        costs: Those of the joined network.
        limits: Of the class means, one per exit.
        leave: "either" or "both".
        agree: "class" or "decision".

    Returns:
        What `EarlyExit.record` of the joined network would return.

    Raises:
        ValueError: The records are of other samples or other exits.

    Example:
        means = e2cm.EarlyExit(trained.stages, images[:1], head="class_means").fit(loader, progress=False)
        records = [network.record(held_out, progress=False) for network in (trained, means)]
        costs = joined.join(trained, means).costs
        record = joined.record(*records, costs, [0.2, 0.2], "both", "class")
    """
    if learned.names != means.names or not torch.equal(learned.label, means.label):
        raise ValueError("`learned` and `means` are records of other exits or other samples; wanted the same ones")
    early = slice(0, learned.exits)
    certainty = learned.confidence.clone()
    certainty[:, early] = joint_certainty(
        learned.confidence[:, early],
        learned.prediction[:, early],
        means.confidence[:, early],
        means.prediction[:, early],
        torch.as_tensor(limits, dtype=torch.float32),
        leave,
        agree,
    )
    return Record(certainty, learned.prediction, learned.label, costs, Gate.name)
