"""The exit step on a GPU, against its copy bandwidth and against what can be written in torch.

    python bench/kernels.py --device cuda

Every call sees features that are not in the second level of cache: copies of them take turns. Times are between two
events on the stream, ways in another order in every round, medians [10th, 90th percentile] over the rounds. Bandwidth
counts the features and the class means once, and is held against that of a copy of a GiB, which reads and writes.

- scores: distances to confidence, prediction and log-probabilities (`ops.class_scores`); rivals do the same: `cdist`,
  and norms with a matrix product (`mm`), both eager and under torch.compile.
- step: `ops.exit_step`, half of the samples leaving; the host waits to be told how many. gather: `ops.compact` of half.
"""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import e2cm_ext as e2cm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(10, 256, 4096), (10, 256, 16384), (10, 256, 65536), (10, 256, 802816), (100, 256, 16384), (1000, 1024, 2048)]
CACHE = 256 << 20  # bytes: more than the second level of any GPU's cache holds
COPIED = 1 << 30
Way = Callable[[Tensor], object]


class Head(NamedTuple):
    means: Tensor
    scale: Tensor
    center: Tensor
    norms: Tensor  # what a rival may prepare


def problem(classes: int, batch: int, features: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Head]:
    """Copies of the features, and the head: as behind a ReLU, samples around their means."""
    g = torch.Generator(device).manual_seed(0)
    means = torch.randn(classes, features, generator=g, device=device).abs_()
    own = torch.arange(batch, device=device) % classes
    x = (means[own] + (0.05 + torch.rand(batch, 1, generator=g, device=device)) * _normal(batch, features, g)).to(dtype)
    scale = torch.full((classes,), math.sqrt(features) / 2, device=device)
    size = x.numel() * x.element_size()
    copies = [x] + [x.clone() for _ in range(max(1, math.ceil(CACHE / size)))]
    return copies, Head(means, scale, means.mean(0), means.square().sum(1))


def _normal(batch: int, features: int, g: torch.Generator) -> Tensor:
    return torch.randn(batch, features, generator=g, device=g.device)


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


def ways(copies: list[Tensor], head: Head) -> dict[str, Way]:
    x = copies[0]
    batch, classes = x.shape[0], head.means.shape[0]
    ids, out = torch.arange(batch, device=x.device), e2cm.Decisions.empty(batch, classes, x.device)
    threshold = float(e2cm.ops.class_scores(x, head.means, head.scale, head.center).confidence.median())
    keep = torch.arange(batch, device=x.device) % 2 == 0
    found: dict[str, Way] = {
        "scores": lambda x: e2cm.ops.class_scores(x, head.means, head.scale, head.center),
        "step": lambda x: e2cm.ops.exit_step(x, head.means, head.scale, threshold, ids, out, head.center),
        "gather": lambda x: e2cm.ops.compact(x, keep),
    }
    for name, function in (("cdist", by_cdist), ("mm", by_mm)):
        found[name] = lambda x, f=function: f(x, head)  # type: ignore[misc]
        compiled = torch.compile(function, dynamic=False, backend="inductor" if x.is_cuda else "eager")
        try:
            compiled(x, head)
        except Exception as error:  # no compiler on this machine: then it is no rival
            print(f"no compiled {name}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            continue
        found[f"{name} compiled"] = lambda x, f=compiled: f(x, head)  # type: ignore[misc]
    return found


def check(x: Tensor, head: Head) -> float:
    """The largest error of a distance of the first samples, relative to float64."""
    few = x[:8].double()
    true = torch.stack([(few - mean.double()).square().sum(1).sqrt() for mean in head.means], 1)
    error = (e2cm.ops.class_distances(x, head.means, head.center)[:8].double() / true - 1).abs().max()
    assert error < 1e-5, f"distances are off by {error:.1e}"
    return float(error)


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


def in_turn(copies: list[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from copies


def spread(values: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def rounds_of(found: dict[str, Way], copies: list[Tensor], seconds: float) -> dict[str, dict[str, float]]:
    inputs, order, shuffle = in_turn(copies), list(found), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in found}
    for way in found.values():
        for _ in range(3):
            way(next(inputs))
    calls = {name: max(1, min(50, int(2e4 / microseconds(way, inputs, 2)))) for name, way in found.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[order[0]]) < 5:
        shuffle(order)
        for name in order:
            samples[name].append(microseconds(found[name], inputs, calls[name]))
    return {name: spread(values) for name, values in samples.items()}


def copy_bandwidth(device: str, size: int) -> dict[str, float]:
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = [microseconds(lambda x: target.copy_(x), in_turn([source]), 3) for _ in range(12)][2:]
    return spread([2 * size / t / 1e3 for t in times])  # GB/s


def measure(shape: tuple[int, int, int], dtype: str, seconds: float, device: str, copy: float) -> dict[str, Any]:
    copies, head = problem(*shape, DTYPES[dtype], device)
    x = copies[0]
    error = check(x, head)
    times = rounds_of(ways(copies, head), copies, seconds)
    read = x.numel() * x.element_size() + head.means.numel() * 4
    rivals = {name: t["median"] for name, t in times.items() if name.startswith(("cdist", "mm"))}
    best = min(rivals, key=rivals.__getitem__)
    ours = times["scores"]["median"]
    return {
        "classes": shape[0],
        "batch": shape[1],
        "features": shape[2],
        "dtype": dtype,
        "microseconds": times,
        "distance_error": error,
        "share_of_copy": read / ours / 1e3 / copy,
        "best_rival": best,
        "ratio": rivals[best] / ours,
        # Half of the features, read and written.
        "gather_share_of_copy": x.numel() * x.element_size() / times["gather"]["median"] / 1e3 / copy,
    }


def report(result: dict[str, Any]) -> str:
    copy = result["copy_gigabytes_per_second"]
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date'][:10]}, copy {copy['median']:.0f} GB/s: "
        f"`{result['command']}`",
        "",
        "| shape | scores µs | of copy bandwidth | best rival | µs | ratio | step µs | gather, of copy |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for p in result["points"]:
        t = {name: f"{v['median']:.1f} [{v['p10']:.1f}, {v['p90']:.1f}]" for name, v in p["microseconds"].items()}
        lines.append(
            f"| K={p['classes']}, B={p['batch']}, D={p['features']}, {p['dtype']} | {t['scores']} | "
            f"{p['share_of_copy']:.0%} | {p['best_rival']} | {t[p['best_rival']]} | {p['ratio']:.2f} | {t['step']} | "
            f"{p['gather_share_of_copy']:.0%} |"
        )
    return "\n".join(lines)


def run(json_path: Path | None, seconds: float, dtypes: list[str], dry_run: bool) -> None:
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; --dry-run goes through the motions on the CPU")
    if not dry_run and not e2cm.build_info()["cuda_archs"]:
        raise SystemExit("--device cuda: e2cm_ext was built without CUDA; put nvcc on the PATH and install it again")
    device = "cpu" if dry_run else "cuda"
    shapes = [(10, 4, 64), (40, 4, 64)] if dry_run else SHAPES
    global CACHE
    CACHE = 1 << 12 if dry_run else CACHE
    with torch.inference_mode():
        copy = copy_bandwidth(device, 1 << 16 if dry_run else COPIED)
        points = []
        for shape in shapes:
            for dtype in dtypes:
                torch.compiler.reset()
                points.append(measure(shape, dtype, seconds, device, copy["median"]))
                print(f"{shape} {dtype}: done", file=sys.stderr)
    result = {
        "command": " ".join(["python bench/kernels.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "no GPU: these numbers mean nothing" if dry_run else torch.cuda.get_device_name(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "build": e2cm.build_info(),
        "copy_gigabytes_per_second": copy,
        "points": points,
    }
    print(report(result))
    if json_path:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
