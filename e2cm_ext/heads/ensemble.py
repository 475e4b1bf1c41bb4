"""Exits that answer together: the most confident answer so far, or an ensemble of all exits so far.

Without a combination every exit answers on its own. With one, the cascade and the record pass it the log-probabilities
of each exit, and the rule judges the answer that it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Head
from .rules import Gate, Rule

__all__ = ["Combination", "combine_at_exit", "from_config"]

_COMBINATIONS: dict[str, type[Combination]] = {}


@dataclass(frozen=True)
class Combination(ABC):
    """Base class of functions that combine the answer of an exit with those of the exits before it.

    It is called at every active exit, and at the end for the network itself, with the samples that have not left.
    Exits that are off (threshold +inf) take no part.

    Subclasses are frozen dataclasses with a `name`, by which saved files know them, and with fields that JSON can hold
    (lists come back as tuples).
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _COMBINATIONS[cls.name] = cls

    @abstractmethod
    def __call__(self, log_probs: Tensor, memory: Tensor | None, exit: int, last: bool) -> tuple[Tensor, Tensor]:
        """Combine the answers so far.

        Args:
            log_probs: [B, K] float32, the answer of this exit alone.
            memory: [B, ...] float32, what this function has returned for the same samples at the active exit before;
                None at the first.
            exit: The number of the exit; M for the network itself.
            last: Whether it is the network itself.

        Returns:
            The combined answer, log-probabilities [B, K] float32, and the new memory.
        """

    def at_exits(self, numbers: Sequence[int]) -> Combination:
        """Return the combination for a network that keeps only the exits with these numbers."""
        return self

    def config(self) -> dict[str, Any]:
        """Return all settings, as JSON can hold them; `from_config` makes an equal combination of it."""
        return {"name": self.name, **asdict(self)}


def from_config(config: dict[str, Any]) -> Combination:
    """Make the combination whose `config` this is. The module that defines its class must have been imported."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    name = settings.pop("name")
    if name not in _COMBINATIONS:
        raise ValueError(
            f"the combination {name!r} is not known; known are {', '.join(map(repr, _COMBINATIONS)) or 'none'}: one is "
            "known once the module that defines it has been imported"
        )
    return _COMBINATIONS[name](**settings)


def combine_at_exit(
    combination: Combination, head: Head, rule: Rule, x: Tensor, memory: Tensor | None, exit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the head of an exit and combine its answer with those before.

    Args:
        combination: How.
        head: The exit's head.
        rule: Judges the combined answer; a gate judges the head's own answer.
        x: Features [B, ...].
        memory: Of the same samples, from the active exit before.
        exit: Its number.

    Returns:
        The combined answer [B, K], its certainty [B], and the new memory.
    """
    if isinstance(rule, Gate):
        log_probs, certainty = head.gate(x)
        answer, memory = combination(log_probs, memory, exit, False)
        return answer, certainty, memory
    answer, memory = combination(head(x), memory, exit, False)
    return answer, rule.certainty(answer), memory
