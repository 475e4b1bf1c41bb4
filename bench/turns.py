"""What benches share that let ways of doing a thing take turns."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from curves import arguments

BUDGETS = (0.25, 0.5, 0.75)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        start = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(ours: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Of neighbours in time, so that a machine that changes its speed changes both."""
    low, middle, high = np.percentile(ours / base, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def timing_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = arguments(description)
    parser.add_argument("--fit", type=int, default=2000, help="training images to fit on: time does not depend on it")
    parser.add_argument("--found", type=int, default=2048, help="test images to find thresholds on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser
