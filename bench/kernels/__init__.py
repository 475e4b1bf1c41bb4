"""exit_step against the best that can be written in torch.

    python -m bench kernels                         # tables; all ways in every round, so that noise hits all alike
    pytest bench/kernels/pytest_benchmark.py        # the same ways one after the other, under pytest-benchmark

Every way does the whole exit step: distances to the class means, divided by the scales, log-softmax, the decision
which samples leave, their answers (confidence, prediction, log-probabilities) written into their rows of the output,
and the survivors' features and ids moved together. About half of a batch leaves, and a batch of one leaves. With
--leave all, all samples exit: then nothing is moved, which at large sizes is most of the time in every way. What
depends on the class means alone (their norms, centring, compilation, packing) is done once, before the clock runs.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import common, limits
from .measure import call_overhead, geometric_means, measure_point
from .report import format_report
from .rivals import ways_for
from .shapes import SHAPES, Shape, make_problem

ALL_THREADS = torch.get_num_threads()


def thread_count(text: str) -> int:
    count = ALL_THREADS if text == "all" else int(text)
    if count < 1:
        raise ValueError(text)
    return count


def shape_of(text: str) -> Shape:
    shape = Shape(*map(int, text.split("x")))
    if min(shape) < 1:
        raise ValueError(text)
    return shape


def arguments() -> argparse.ArgumentParser:
    parser = common.argument_parser("kernels", __doc__, threads=False, seed=False)
    parser.epilog = "Without --json, the file is bench/results/kernels-PROCESSOR.json if all shapes are measured."
    add = parser.add_argument
    add("--threads", nargs="+", type=thread_count, default=[1, ALL_THREADS], metavar="N|all", help="default: 1 all")
    add("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="KxBxD", help="default: those of the docs")
    add("--seconds", type=float, default=4, help="of timing per shape and number of threads (default: 4)")
    add("--dtype", choices=common.DTYPES, default="float32", help="of the features; class means stay float32")
    add("--leave", choices=["half", "all"], default="half", help="how many of a batch leave (default: half)")
    add("--max-autotune", action="store_true", help="compile with max-autotune, too: about 10 s more per shape")
    return parser


def measure_all(options: argparse.Namespace, threads: Sequence[int]) -> list[dict[str, Any]]:
    started, points = time.perf_counter(), []
    for shape in options.shapes:
        problem = make_problem(shape, common.DTYPES[options.dtype], options.leave)
        for count in threads:
            points.append(measure_point(problem, count, ways_for(shape, options.max_autotune), options.seconds))
            took = time.perf_counter() - started
            print(f"[{took:4.0f} s] {shape}, threads {count}: {points[-1]['rounds']} rounds", file=sys.stderr)
    return points


def default_path(options: argparse.Namespace) -> Path:
    """bench/results/kernels-PROCESSOR.json"""
    name = re.sub(r"\((r|tm)\)", "", common.processor().lower())
    parts = ["kernels", *re.findall(r"[a-z0-9.]+", name)]
    parts += [] if options.dtype == "float32" else [options.dtype]
    parts += ["all-leave"] if options.leave == "all" else []
    return common.RESULTS / f"{'-'.join(parts)}.json"


def main(argv: Sequence[str] | None = None) -> None:
    options = common.parse(arguments(), argv)
    threads = sorted(set(options.threads))
    points = measure_all(options, threads)
    result = {
        "limits_by": limits.method(),
        "dtype": options.dtype,
        "leave": options.leave,
        "threads": threads,
        "seconds_per_point": options.seconds,
        "summary": geometric_means(points),
        "call_overhead_microseconds": call_overhead(common.DTYPES[options.dtype]),
        "points": points,
    }
    print(format_report({"provenance": options.provenance} | result))
    complete = set(options.shapes) >= set(SHAPES) and set(threads) >= {1, ALL_THREADS}
    options.json = options.json or (default_path(options) if complete else None)
    if options.json is None:
        print("not all shapes and threads: saved nowhere (--json says where)", file=sys.stderr)
    common.save(options, result)
