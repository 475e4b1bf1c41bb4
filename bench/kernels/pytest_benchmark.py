"""The same ways one after the other, under pytest-benchmark: pytest bench/kernels/pytest_benchmark.py"""

from __future__ import annotations

import functools
from typing import Any

import torch

import e2cm_ext as e2cm
from bench.common import processor
from bench.kernels import ALL_THREADS
from bench.kernels.measure import build
from bench.kernels.rivals import RIVALS, ways_for
from bench.kernels.shapes import SHAPES, Shape, make_problem
from bench.kernels.timing import quiet


def pytest_generate_tests(metafunc: Any) -> None:
    cases = [(s, t, way) for s in SHAPES for t in sorted({1, ALL_THREADS}) for way in ways_for(s)]
    names = [f"{shape}-{threads}-{way.replace(' ', '_')}" for shape, threads, way in cases]
    metafunc.parametrize(("shape", "threads", "way"), cases, ids=names)


same_problem = functools.lru_cache(maxsize=1)(make_problem)


def test_exit_step(benchmark: Any, shape: Shape, threads: int, way: str) -> None:
    problem = same_problem(shape)
    benchmark.group = f"K={shape.classes} B={shape.batch} D={shape.features} threads={threads}"
    benchmark.extra_info.update(shape._asdict(), threads=threads, way=way, bytes=problem.bytes)
    benchmark.extra_info.update(operations=problem.operations, cpu=processor(), torch=torch.__version__)
    benchmark.extra_info.update(isa=e2cm.build_info()["isa"], rival=way in RIVALS)
    with quiet(threads):
        benchmark(build(problem, [way])[way])
