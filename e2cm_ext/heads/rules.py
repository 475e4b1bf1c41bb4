"""Rules: the certainty of a prediction, which is compared with a threshold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["Confidence", "Entropy", "Gate", "Rule", "as_rule"]

Threshold = TypeVar("Threshold", float, Tensor, float | Tensor)


@dataclass(frozen=True)
class Rule(ABC):
    """Base class of rules: a sample leaves if its certainty is above the threshold.

    The comparison is strict: +inf is never exceeded, and NaN exceeds nothing.

    A rule of your own needs a `name`, by which saved files know it, and `certainty`. Two rules of one class without
    settings are equal; a rule with settings is a frozen dataclass with fields.

    Example:
        from dataclasses import dataclass
        from e2cm_ext import Rule

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
        """Compute how certain the predictions are.

        Args:
            log_probs: [B, K].

        Returns:
            [B] float32, higher for more certain predictions; NaN for a sample that must not leave.
        """

    def limit(self, threshold: Threshold) -> Threshold:
        """Convert a threshold to what the ops compare with: some of their rules count the other way round."""
        return threshold


@dataclass(frozen=True)
class Confidence(Rule):
    """The largest probability."""

    name = "confidence"

    def certainty(self, log_probs: Tensor) -> Tensor:
        return log_probs.float().amax(1).exp()


@dataclass(frozen=True)
class Entropy(Rule):
    """Minus the entropy of the probabilities, in nats: -log K if all classes are equally likely, at most 0."""

    name = "entropy"

    def certainty(self, log_probs: Tensor) -> Tensor:
        log_probs = log_probs.float()
        probabilities = log_probs.exp()
        # p log p is 0 for p = 0, and not 0 * -inf.
        return torch.where(probabilities > 0, probabilities * log_probs, probabilities).sum(1)

    def limit(self, threshold: Threshold) -> Threshold:
        """The ops compare the entropy itself, and samples below the limit leave."""
        return -threshold


@dataclass(frozen=True)
class Gate(Rule):
    """The certainty that the head itself computes, see `Head.gate`: a learned gate, or the agreement of two heads.

    For heads without a gate, and for the network itself, it is the largest probability.
    """

    name = "gate"

    def certainty(self, log_probs: Tensor) -> Tensor:
        return Confidence().certainty(log_probs)


_RULES: dict[str, Rule] = {rule.name: rule for rule in (Confidence(), Entropy(), Gate())}


def as_rule(rule: str | Rule) -> Rule:
    """Return the rule of a name: "confidence", "entropy" or "gate". A Rule is returned as it is.

    Raises:
        ValueError: No rule has this name.
        TypeError: `rule` is neither a name nor a Rule.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str) and rule in _RULES:
        return _RULES[rule]
    wanted = f"wanted {', '.join(map(repr, _RULES))} or an object of a Rule class"
    error = ValueError if isinstance(rule, str) else TypeError
    raise error(f"`rule` is {rule!r}; {wanted}")
