"""Segments of a network: the stages between two active exits, which run without a decision in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from ..heads import Head

__all__ = ["Segment", "Stage", "next_active_exits", "segments"]

Stage = Callable[[Tensor], Tensor]
S = TypeVar("S", bound=Stage)


@dataclass(frozen=True)
class Segment(Generic[S]):
    """The stages up to the next active exit, and that exit; or the stages up to the end of the network.

    Attributes:
        stages: At least one.
        exit: The number of the exit behind the stages; M, the number of exits, at the end of the network.
        head: The head of that exit; None at the end of the network, where the stages return logits.
        threshold: The threshold of that exit, below +inf; +inf at the end of the network.
    """

    stages: tuple[S, ...]
    exit: int
    head: Head | None = None
    threshold: float = math.inf


def segments(stages: Iterable[S], heads: Iterable[Head], thresholds: Sequence[float]) -> list[Segment[S]]:
    """Group the stages of a network by its active exits: those whose threshold is below +inf.

    Args:
        stages: The M+1 stages.
        heads: The M heads.
        thresholds: [M].

    Returns:
        One segment per active exit, and one for the end of the network.

    Raises:
        ValueError: The numbers of stages, heads and thresholds do not fit.
    """
    found: list[Segment[S]] = []
    pending: list[S] = []
    *early, last = stages
    for exit, (stage, head, threshold) in enumerate(zip(early, heads, thresholds, strict=True)):
        pending.append(stage)
        if threshold < math.inf:
            found.append(Segment(tuple(pending), exit, head, threshold))
            pending = []
    return [*found, Segment((*pending, last), len(early))]


def next_active_exits(thresholds: Sequence[float]) -> list[int]:
    """For every exit, the number of the next active exit behind it; M, the number of exits, if there is none."""
    end = len(thresholds)
    following = [end] * end
    for exit in range(end - 1, 0, -1):
        following[exit - 1] = exit if thresholds[exit] < math.inf else following[exit]
    return following
