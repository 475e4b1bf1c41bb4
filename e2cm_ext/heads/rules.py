"""When a sample may leave: a rule makes one number of its log-probabilities, and a threshold cuts there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["Confidence", "Entropy", "Gate", "Rule", "rule"]

Threshold = TypeVar("Threshold", float, Tensor, float | Tensor)


@dataclass(frozen=True)
class Rule(ABC):
    """A sample leaves if its certainty is above the threshold, strictly: +inf is never passed, and NaN never passes.

    A rule of your own needs a name and `certainty`. Rules of one class are equal; those with settings are dataclasses:

        @dataclass(frozen=True)
        class Margin(Rule):
            name = "margin"

            def certainty(self, log_probs):
                first, second = log_probs.exp().topk(2, dim=1).values.unbind(1)
                return first - second
    """

    name: ClassVar[str]

    @abstractmethod
    def certainty(self, log_probs: Tensor) -> Tensor:
        """One float32 number per row of log_probs [B, K]: the higher, the surer. NaN for a row that must not leave."""

    def limit(self, threshold: Threshold) -> Threshold:
        """The threshold as the ops want it, whose rules may count the other way round."""
        return threshold


@dataclass(frozen=True)
class Confidence(Rule):
    """The largest probability."""

    name = "confidence"

    def certainty(self, log_probs: Tensor) -> Tensor:
        return log_probs.float().amax(1).exp()


@dataclass(frozen=True)
class Entropy(Rule):
    """Minus the entropy of the probabilities (natural logarithm): from -log K, for no idea at all, up to 0."""

    name = "entropy"

    def certainty(self, log_probs: Tensor) -> Tensor:
        log_probs = log_probs.float()
        probabilities = log_probs.exp()
        # p log p is 0 where p is, not 0 * -inf.
        return torch.where(probabilities > 0, probabilities * log_probs, probabilities).sum(1)

    def limit(self, threshold: Threshold) -> Threshold:
        """The ops compare the entropy itself, and from below."""
        return -threshold


@dataclass(frozen=True)
class Gate(Rule):
    """What the head says of itself, see Head.gate: a gate that was learned, two heads that consult each other.

    Of heads that have no gate, and of the network itself, the largest probability.
    """

    name = "gate"

    def certainty(self, log_probs: Tensor) -> Tensor:
        return Confidence().certainty(log_probs)


_BY_NAME: dict[str, Rule] = {known.name: known for known in (Confidence(), Entropy(), Gate())}


def rule(name_or_rule: str | Rule) -> Rule:
    """The rule of that name: "confidence", "entropy" or "gate"; a Rule is handed back as it is."""
    if isinstance(name_or_rule, Rule):
        return name_or_rule
    if isinstance(name_or_rule, str) and name_or_rule in _BY_NAME:
        return _BY_NAME[name_or_rule]
    wanted = f"wanted {', '.join(map(repr, _BY_NAME))} or an object of a Rule class"
    kind = ValueError if isinstance(name_or_rule, str) else TypeError
    raise kind(f"`rule` is {name_or_rule!r}; {wanted}")
