"""Times of several ways to do the same work, measured in turns, so that a change of the machine's speed meets all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["Ratio", "time_interleaved", "ratio"]


@dataclass(frozen=True)
class Ratio:
    """Of two times, round by round: the median, and what 10% and 90% of the rounds are below."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.p10:.3f}, {self.p90:.3f}]"


def time_interleaved(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    device: torch.device | None = None,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Tensor]:
    """Seconds [rounds] of every way, after one round that does not count. A `device` that runs behind is waited for."""
    if rounds < 1:
        raise ValueError(f"`rounds` is {rounds}; wanted a whole number from 1 on")

    def now() -> float:
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock()

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns = itertools.product(range(rounds + 1), ways.items())
    for number, (name, way) in tqdm(
        turns, total=(rounds + 1) * len(ways), desc="in turns", disable=not progress, leave=False
    ):
        start = now()
        way()
        if number:
            seconds[name].append(now() - start)
    return {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in seconds.items()}


def ratio(seconds: Tensor, base: Tensor) -> Ratio:
    """Of neighbours in time."""
    low, middle, high = (seconds / base).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Ratio(middle, low, high)
