"""Seconds of short calls on the CPU."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

SAMPLE_SECONDS = 0.004  # short calls are repeated within one sample
LONG_CALL_SECONDS = 0.01  # longer ones get no call to warm the caches before a sample: their data do not stay there


def seconds_per_call(step: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def estimated_seconds(step: Callable[[], Any]) -> float:
    step()
    runs = [seconds_per_call(step, 1)]
    while len(runs) < 2 or (sum(runs) < SAMPLE_SECONDS and len(runs) < 20):
        runs.append(seconds_per_call(step, 1))
    return min(runs)


def fastest(steps: Sequence[Callable[[], Any]]) -> int:
    """The number of the fastest step."""
    return int(np.argmin([estimated_seconds(step) for step in steps]))


def sampler(step: Callable[[], Any]) -> Callable[[], float]:
    """A function that times `step`, with as many calls as a sample of SAMPLE_SECONDS holds."""
    estimate = estimated_seconds(step)
    calls = max(1, round(SAMPLE_SECONDS / estimate))

    def sample() -> float:
        if estimate < LONG_CALL_SECONDS:
            step()
        return seconds_per_call(step, calls)

    return sample


@contextlib.contextmanager
def quiet(threads: int) -> Iterator[None]:
    """Inference mode at a number of threads, without garbage collection."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        gc.enable()
        torch.set_num_threads(before)
