"""Times of several functions, measured in alternation, so that a change of the machine's speed affects them alike."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["Ratio", "ratio", "time_interleaved"]


@dataclass(frozen=True)
class Ratio:
    """The ratio of two times over many rounds: the median, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.p10:.3f}, {self.p90:.3f}]"


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    device: torch.device | None = None,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Tensor]:
    """Measure functions in rounds, in each of which every function is called once.

    Args:
        functions: By name.
        rounds: How many; one more goes before them and is not measured.
        device: Waited for after every call, if it runs asynchronously.
        progress: Show a progress bar.
        clock: Returns seconds.

    Returns:
        Seconds [rounds] float64 of every function, by name.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` is {rounds}; wanted a whole number from 1 on")

    def now() -> float:
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock()

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    calls = itertools.product(range(rounds + 1), functions.items())
    for number, (name, function) in tqdm(
        calls, total=(rounds + 1) * len(functions), desc="measure", disable=not progress, leave=False
    ):
        start = now()
        function()
        if number:
            seconds[name].append(now() - start)
    return {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in seconds.items()}


def ratio(seconds: Tensor, base: Tensor) -> Ratio:
    """Compare the times of one function with those of another, round by round."""
    low, middle, high = (seconds / base).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Ratio(middle, low, high)
