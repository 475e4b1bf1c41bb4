"""E2CM joined with another scheme (sections 3.2 and 4.1 of E2CM): a learned head decides together with class means.

Class means vote for leaving, or against it:

    agree="decision": if their own confidence is above their own limit;
    agree="class":    if, besides, they would answer with the learned head's class. (The limit is -inf at the start.)

A sample leaves, always with the learned head's answer,

    leave="either": if the learned head is sure enough, or class means vote for it (section 3.2: it goes on only if both
                    approve);
    leave="both":   if the learned head is sure enough, and class means vote for it (section 4.1: if they disagree, it
                    stays).

The paper does not say what "disagree" means; both readings are here. Ours are: the whitened means in place of the raw
ones, where asked for; where limits come from, see `options`; and Blended, which does not consult but multiplies.
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

__all__ = ["Agree", "Blended", "Consulting", "Leave", "Pair", "consult", "join", "limit", "options"]

Leave = Literal["either", "both"]
Agree = Literal["class", "decision"]
_LEVELS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of FLOPs


def consult(
    confidence: Tensor,
    prediction: Tensor,
    means_confidence: Tensor,
    means_prediction: Tensor,
    limit: Tensor | float,
    leave: Leave,
    agree: Agree,
) -> Tensor:
    """How sure both together are, to be compared with the learned head's threshold: its own confidence where that
    decides, 2 (more than any probability) where the sample leaves unless the exit is off, NaN where it stays."""
    vote = means_confidence > limit
    if agree == "class":
        vote = vote & (prediction == means_prediction)
    if leave == "both":
        return torch.where(vote, confidence, math.nan)
    return torch.where(vote & ~confidence.isnan(), 2.0, confidence)


class Pair(Head):
    """A learned head and class means. `fit` is for the means; the learned head must have been trained."""

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
        if hasattr(self, "means"):  # not while it is being made
            self.means.reset()

    def flops(self) -> int:
        return self.learned.flops() + self.means.flops()

    def config(self) -> dict[str, Any]:
        return super().config() | {"learned": self.learned.config(), "means": self.means.config()}


class Consulting(Pair, kind="consulting"):
    """Answers as the learned head does; its gate asks the class means. See the top of this file."""

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
        theirs, class_of_means = self.means.score(x, Confidence())
        certainty = consult(confidence, log_probs.argmax(1), theirs, class_of_means, self.limit, self.leave, self.agree)
        return log_probs, certainty

    def config(self) -> dict[str, Any]:
        return super().config() | {"leave": self.leave, "agree": self.agree}


class Blended(Pair, kind="blended"):
    """Both answer: the product of their probabilities, over its sum. Ours, not the paper's."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.learned(x) + self.means(x)
        return product.log_softmax(1)


def join(
    ee: EarlyExit,
    means: str | type[Head] | Callable[[int, tuple[int, ...]], Head] | EarlyExit = "class_means",
    *,
    leave: Leave = "both",
    agree: Agree = "class",
    blend: bool = False,
    memory: int = 256 << 20,
) -> EarlyExit:
    """A new network with early exits, around the same model: copies of the trained heads of `ee`, each with class means
    beside it. means: "class_means" (the paper's), "whitened_means", ..., which have still to be fitted, by fit(loader);
    or a network with the same exits (and perhaps others) and class means that are fitted already: copies of them.
    blend: Blended in the place of consultation."""
    if isinstance(means, EarlyExit):
        beside = [copy.deepcopy(head) for head in means.at_exits(ee.exit_names).head_list()]
    else:
        beside = build_heads(means, ee.num_classes, [head.feature_shape for head in ee.head_list()], memory)
    heads: list[Head] = []
    for learned, other in zip(ee.head_list(), beside, strict=True):
        arguments = (ee.num_classes, learned.feature_shape, copy.deepcopy(learned), other)
        heads.append(Blended(*arguments) if blend else Consulting(*arguments, leave, agree))
        heads[-1].fitted = learned.fitted and other.fitted
    costs = Costs(ee.costs.stages, tuple(head.flops() for head in heads), ee.costs.names)
    rule = Confidence() if blend else Gate()
    return EarlyExit.from_parts(
        ee.stages, heads, rule, costs, ee.image_shape, ee.image_dtype, combination=ee.combination
    )


def limit(ee: EarlyExit, limits: Tensor | Sequence[float]) -> None:
    """Sets the limits of the class means, one for each exit."""
    for head, value in zip(ee.head_list(), torch.as_tensor(limits, dtype=torch.float32), strict=True):
        if not isinstance(head, Consulting):
            raise TypeError(f"{type(head).__name__} consults nobody; wanted a network that `join` has made")
        head.limit.copy_(value)


# ---- limits ---------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    limits: Tensor  # [M] float32, for `limit`
    record: Record  # what every exit of the joined network would say with these limits


def options(
    learned: Record,
    means: Record,
    costs: Costs,
    leave: Leave,
    agree: Agree,
    levels: Sequence[float] = _LEVELS,
) -> Iterator[Option]:
    """Limits worth trying, and the record of the joined network with each, from records of the two networks apart.

    learned, means: of the same samples at the same exits, with the rule "confidence"; costs: those of the joined
    network. Limits are the thresholds that class means alone would have at FLOPs of so much (`levels`), and for
    agree="class" -inf, too. Ours: the paper does not say how a second threshold is found.
    """
    curve = curves.curve(means)
    vectors = [curve.best_within(level).thresholds for level in levels if level >= curve.flops[0]]
    if agree == "class":
        vectors.insert(0, torch.full((means.exits,), -math.inf))
    for limits in vectors:
        yield Option(limits, record(learned, means, costs, limits, leave, agree))


def record(
    learned: Record, means: Record, costs: Costs, limits: Tensor | Sequence[float], leave: Leave, agree: Agree
) -> Record:
    """The record of the joined network with these limits, from records of the two networks apart."""
    if learned.names != means.names or not torch.equal(learned.label, means.label):
        raise ValueError("`learned` and `means` are records of other exits or other samples; wanted the same ones")
    early = slice(0, learned.exits)
    certainty = learned.confidence.clone()
    certainty[:, early] = consult(
        learned.confidence[:, early],
        learned.prediction[:, early],
        means.confidence[:, early],
        means.prediction[:, early],
        torch.as_tensor(limits, dtype=torch.float32),
        leave,
        agree,
    )
    return Record(certainty, learned.prediction, learned.label, costs, Gate.name)
