"""The exit step on a GPU, against its copy bandwidth and against what can be written in torch.

    python -m bench gpu_kernels
    python -m bench gpu_kernels --dry-run       # a small problem on the CPU, to try the script

Every call sees features that are not in the second level of cache: copies of them are used in a cycle. Times are
between two events on the stream, ways in another order in every round, medians [10th, 90th percentile] over the rounds.
Bandwidth counts the features and the class means once, and is compared with that of a copy of a GiB, which reads and
writes.

- scores: distances to confidence, prediction and log-probabilities (`ops.class_scores`); rivals do the same: `cdist`,
  and norms with a matrix product (`mm`), both eager and under torch.compile.
- step: `ops.exit_step`, half of the samples leaving; the host waits for the number of survivors. gather: `ops.compact`
  of half.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import e2cm_ext as e2cm

from . import common, markdown

SHAPES = [(10, 256, 4096), (10, 256, 16384), (10, 256, 65536), (10, 256, 802816), (100, 256, 16384), (1000, 1024, 2048)]
SMALL_SHAPES = [(10, 4, 64), (40, 4, 64)]  # of a dry run
CACHE = 256 << 20  # bytes: more than the second level of any GPU's cache holds
COPIED = 1 << 30
RIVALS = ("cdist", "mm")
Way = Callable[[Tensor], object]


class Head(NamedTuple):
    means: Tensor
    scale: Tensor
    center: Tensor
    norms: Tensor  # what a rival may prepare


# ---- the problem, and the ways to solve it --------------------------------------------------------------------------


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str, cache: int) -> tuple[list[Tensor], Head]:
    """Copies of the features, together larger than `cache`, and the head: as behind a ReLU, samples around means."""
    classes, batch, features = shape
    random_numbers = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random_numbers, device=device)

    means = normal(classes, features).abs_()
    labels = torch.arange(batch, device=device) % classes
    strength = 0.05 + torch.rand(batch, 1, generator=random_numbers, device=device)
    x = (means[labels] + strength * normal(batch, features)).to(dtype)
    scale = torch.full((classes,), math.sqrt(features) / 2, device=device)
    size = x.numel() * x.element_size()
    copies = [x] + [x.clone() for _ in range(max(1, math.ceil(cache / size)))]
    return copies, Head(means, scale, means.mean(0), means.square().sum(1))


def answers(distances: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = (distances * (-1 / head.scale)).log_softmax(1)
    best = log_probs.max(1)
    return best.values.exp(), best.indices, log_probs


def by_cdist(x: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    return answers(torch.cdist(x.float(), head.means), head)


def by_mm(x: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float()
    squares = torch.addmm(head.norms, x, head.means.T, alpha=-2) + x.square().sum(1, keepdim=True)
    return answers(squares.clamp_min(0).sqrt(), head)


def ways_for(x: Tensor, head: Head) -> dict[str, Way]:
    batch, classes = x.shape[0], head.means.shape[0]
    ids, out = torch.arange(batch, device=x.device), e2cm.Decisions.empty(batch, classes, x.device)
    threshold = float(e2cm.ops.class_scores(x, head.means, head.scale, head.center).confidence.median())
    keep = torch.arange(batch, device=x.device) % 2 == 0
    ways: dict[str, Way] = {
        "scores": lambda x: e2cm.ops.class_scores(x, head.means, head.scale, head.center),
        "step": lambda x: e2cm.ops.exit_step(x, head.means, head.scale, threshold, ids, out, head.center),
        "gather": lambda x: e2cm.ops.compact(x, keep),
    }
    for name, function in zip(RIVALS, (by_cdist, by_mm), strict=True):
        ways[name] = lambda x, f=function: f(x, head)  # type: ignore[misc]
        compiled = torch.compile(function, dynamic=False, backend="inductor" if x.is_cuda else "eager")
        try:
            compiled(x, head)
        except Exception as error:  # no compiler on this machine: then it is no rival
            print(f"no compiled {name}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            continue
        ways[f"{name} compiled"] = lambda x, f=compiled: f(x, head)  # type: ignore[misc]
    return ways


def check(x: Tensor, head: Head) -> float:
    """The largest error of a distance of the first samples, relative to float64."""
    few = x[:8].double()
    true = torch.stack([(few - mean.double()).square().sum(1).sqrt() for mean in head.means], 1)
    error = (e2cm.ops.class_distances(x, head.means, head.center)[:8].double() / true - 1).abs().max()
    assert error < 1e-5, f"distances are off by {error:.1e}"
    return float(error)


# ---- measuring ------------------------------------------------------------------------------------------------------


def microseconds(way: Way, inputs: Iterator[Tensor], calls: int) -> float:
    if not torch.cuda.is_available():  # --dry-run
        start = time.perf_counter()
        for _ in range(calls):
            way(next(inputs))
        return (time.perf_counter() - start) * 1e6 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        way(next(inputs))
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / calls


def measure_ways(ways: dict[str, Way], copies: list[Tensor], seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of every way."""
    inputs = itertools.cycle(copies)

    def sampler(way: Way) -> Callable[[], float]:
        for _ in range(3):
            way(next(inputs))
        calls = max(1, min(50, int(2e4 / microseconds(way, inputs, 2))))
        return lambda: microseconds(way, inputs, calls)

    samples = common.shuffled_rounds({name: sampler(way) for name, way in ways.items()}, seconds)
    return {name: common.spread(values) for name, values in samples.items()}


def copy_bandwidth(device: str, size: int) -> dict[str, float]:
    """GB/s, of reading and writing."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = [microseconds(lambda x: target.copy_(x), itertools.cycle([source]), 3) for _ in range(12)][2:]
    return common.spread([2 * size / t / 1e3 for t in times])


def measure_point(shape: tuple[int, int, int], dtype: str, options: argparse.Namespace, copy: float) -> dict[str, Any]:
    copies, head = make_problem(shape, common.DTYPES[dtype], options.device, 1 << 12 if options.dry_run else CACHE)
    x = copies[0]
    error = check(x, head)
    times = measure_ways(ways_for(x, head), copies, options.seconds)
    features = x.numel() * x.element_size()
    rivals = {name: t["median"] for name, t in times.items() if name.startswith(RIVALS)}
    best = min(rivals, key=rivals.__getitem__)
    ours = times["scores"]["median"]
    return {
        "classes": shape[0],
        "batch": shape[1],
        "features": shape[2],
        "dtype": dtype,
        "microseconds": times,
        "distance_error": error,
        "share_of_copy": (features + head.means.numel() * 4) / ours / 1e3 / copy,
        "best_rival": best,
        "ratio": rivals[best] / ours,
        # Half of the features, read and written.
        "gather_share_of_copy": features / times["gather"]["median"] / 1e3 / copy,
    }


def measure_all(options: argparse.Namespace, copy: float) -> list[dict[str, Any]]:
    points = []
    for shape in SMALL_SHAPES if options.dry_run else SHAPES:
        for dtype in options.dtypes:
            torch.compiler.reset()
            points.append(measure_point(shape, dtype, options, copy))
            print(f"{shape} {dtype}: done", file=sys.stderr)
    return points


# ---- the report -----------------------------------------------------------------------------------------------------


def format_report(result: dict[str, Any]) -> str:
    about, copy = result["provenance"], result["copy_gigabytes_per_second"]["median"]
    device = about["gpu"] or "no GPU: these numbers mean nothing"
    header = ["shape", "scores µs", "of copy bandwidth", "best rival", "µs", "ratio", "step µs", "gather, of copy"]
    return (
        f"{device}, torch {about['versions']['torch']}, {about['date'][:10]}, copy {copy:.0f} GB/s: "
        f"`{about['command']}`\n\n{markdown.table(header, map(point_row, result['points']))}"
    )


def point_row(point: dict[str, Any]) -> list[str]:
    times = {name: markdown.with_spread(found, 1) for name, found in point["microseconds"].items()}
    return [
        f"K={point['classes']}, B={point['batch']}, D={point['features']}, {point['dtype']}",
        times["scores"],
        f"{point['share_of_copy']:.0%}",
        point["best_rival"],
        times[point["best_rival"]],
        f"{point['ratio']:.2f}",
        times["step"],
        f"{point['gather_share_of_copy']:.0%}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("gpu_kernels", __doc__, threads=False, seed=False)
    parser.add_argument("--seconds", type=float, default=1, help="of timing per shape and dtype (default: 1)")
    parser.add_argument("--dtypes", nargs="+", choices=common.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--dry-run", action="store_true", help="a small problem on the CPU, to try the script")
    wanted = parser.parse_args(argv)
    if not wanted.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry-run runs a small problem on the CPU")
    if not wanted.dry_run and not e2cm.build_info()["cuda_archs"]:
        raise SystemExit("e2cm_ext was built without CUDA; put nvcc on the PATH and install it again")
    parser.set_defaults(device="cpu" if wanted.dry_run else "cuda")
    options = common.parse(parser, argv)
    with torch.inference_mode():
        copy = copy_bandwidth(options.device, 1 << 16 if options.dry_run else COPIED)
        points = measure_all(options, copy["median"])
    result = {"copy_gigabytes_per_second": copy, "points": points}
    print(format_report({"provenance": options.provenance} | result))
    common.save(options, result)
