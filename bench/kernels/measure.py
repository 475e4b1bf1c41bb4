"""Times of all ways to do one exit step, beside the limits of the machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from .. import limits
from ..common import shuffled_rounds, spread
from . import rivals
from .shapes import Problem, Shape, check, make_problem
from .timing import quiet, sampler, seconds_per_call


def build(problem: Problem, ways: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """The steps of these ways, each checked. Where torch.compile fails for want of a compiler, it is no rival."""
    torch.compiler.reset()
    steps: dict[str, Callable[[], Any]] = {}
    for name in ways:
        try:
            step = rivals.WAYS[name](problem)
            step()
        except Exception as error:
            if name not in rivals.COMPILED:
                raise
            print(f"{problem.shape}: no {name}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            continue
        if name not in rivals.YARDSTICKS:
            check(problem, step)
        steps[name] = step
    return steps


def measure_point(problem: Problem, threads: int, ways: Iterable[str], seconds: float) -> dict[str, Any]:
    """All that is reported of one shape at one number of threads."""
    with quiet(threads), limits.Limits(threads) as machine:
        probes = {"bandwidth": machine.read(problem.bytes), "peak": machine.multiply_add()}
        samplers = {name: sampler(step) for name, step in build(problem, ways).items()}
        samples = shuffled_rounds(samplers | probes, seconds)
        layout = rivals.mm_layout(problem)
    bandwidth, peak = samples.pop("bandwidth"), samples.pop("peak")
    rival = min((name for name in samples if name in rivals.RIVALS), key=lambda name: np.median(samples[name]))
    ours = samples["ours"]
    return {
        **problem.shape._asdict(),
        "threads": threads,
        "rounds": len(ours),
        "microseconds": {name: spread(values * 1e6) for name, values in samples.items()},
        "mm_layout": layout._asdict(),
        "best_rival": rival,
        "ratio": spread(samples[rival] / ours),
        "gigabytes_per_second": float(problem.bytes / np.median(ours) / 1e9),
        "gigaflops": float(problem.operations / np.median(ours) / 1e9),
        **against_limit(problem, ours, bandwidth, peak),
    }


def against_limit(problem: Problem, ours: np.ndarray, bandwidth: np.ndarray, peak: np.ndarray) -> dict[str, Any]:
    reading, computing = problem.bytes / bandwidth, problem.operations / peak
    return {
        "limit": {
            "gigabytes_per_second": spread(bandwidth / 1e9),
            "gigaflops": spread(peak / 1e9),
            "by": "reading" if np.median(reading) > np.median(computing) else "arithmetic",
        },
        "share_of_limit": spread(np.maximum(reading, computing) / ours),
    }


def call_overhead(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Microseconds of exit_step on one sample of 64 features, 10 classes, one thread: it is nearly all call."""
    problem = make_problem(Shape(10, 1, 64), dtype)
    result = {}
    with quiet(1):
        for outcome, threshold in (("leaves", problem.threshold), ("stays", 2.0)):
            problem.threshold = threshold
            step = rivals.ours(problem)
            step()
            result[outcome] = spread([seconds_per_call(step, 20) * 1e6 for _ in range(1000)])
    return result


def geometric_means(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the ratios to the best rival, over all shapes with the same number of classes."""
    result = []
    for threads, classes in sorted({(point["threads"], point["classes"]) for point in points}):
        ratios = [p["ratio"]["median"] for p in points if (p["threads"], p["classes"]) == (threads, classes)]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found = {"shapes": len(ratios), "mean": mean, "least": min(ratios)}
        result.append({"threads": threads, "classes": classes} | found)
    return result
