"""What an exit answers where earlier exits are not forgotten: the most confident answer so far, an ensemble.

Without a combination every exit answers for itself. With one, the cascade and the record hand it what each exit says,
and the answer, which the rule then judges, is what it makes of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Head
from .rules import Gate, Rule

__all__ = ["Combination", "combined", "from_config"]

_BY_NAME: dict[str, type[Combination]] = {}


@dataclass(frozen=True)
class Combination(ABC):
    """Called at every exit that is on, and at the end for the network itself, with the samples that have come so far.

    Exits that are off (threshold +inf) take no part. Subclasses are frozen dataclasses with a `name`, whose fields JSON
    can hold (lists come back as tuples).
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _BY_NAME[cls.name] = cls

    @abstractmethod
    def __call__(self, log_probs: Tensor, memory: Tensor | None, exit: int, last: bool) -> tuple[Tensor, Tensor]:
        """log_probs: [B, K] float32, what exit number `exit` says by itself; memory: [B, ...] float32, what this
        function returned for the same samples the last time, None at the first exit; last: is it the network itself?
        Returns the answer, log-probabilities [B, K] float32, and the new memory."""

    def at_exits(self, numbers: Sequence[int]) -> Combination:
        """The same for a network with only these exits; the network itself stays."""
        return self

    def config(self) -> dict[str, Any]:
        """Everything, fit for JSON: from_config makes an equal one of it."""
        return {"name": self.name, **asdict(self)}


def from_config(config: dict[str, Any]) -> Combination:
    """The module that defines its class must have been imported."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    name = settings.pop("name")
    if name not in _BY_NAME:
        raise ValueError(
            f"the combination {name!r} is not known; known are {', '.join(map(repr, _BY_NAME)) or 'none'}: one is "
            "known once the module that defines it has been imported"
        )
    return _BY_NAME[name](**settings)


def combined(
    combination: Combination, head: Head, rule: Rule, x: Tensor, memory: Tensor | None, exit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """At an exit: the answer, its certainty, and the new memory. A gate is the head's own and judges for itself."""
    if isinstance(rule, Gate):
        log_probs, certainty = head.gate(x)
        answer, memory = combination(log_probs, memory, exit, False)
        return answer, certainty, memory
    answer, memory = combination(head(x), memory, exit, False)
    return answer, rule.certainty(answer), memory
