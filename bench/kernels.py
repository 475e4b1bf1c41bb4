"""exit_step against the best that can be written in torch.

    python bench/kernels.py       the table: the ways of a shape take turns, round by round, so noise hits all alike
    pytest bench/kernels.py       the same ways one after the other, under pytest-benchmark
    python bench/kernels.py --device cuda       on a GPU: see gpu_kernels.py

Every way does the whole exit step: distances to the class means, divided by the scales, log-softmax, who leaves, the
leavers' answers (confidence, prediction, log-probabilities) written into their rows of the output, and the survivors'
features and ids moved together. About half of a batch leaves and a batch of one leaves or, with --leave all, everybody:
then nothing is moved, which at large sizes is most of the time in every way. What depends on the class means
alone (their norms, centring, compilation, packing) is done once, before the clock runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import limits
import numpy as np
import torch
from torch import Tensor

import e2cm_ext as e2cm


class Shape(NamedTuple):
    classes: int
    batch: int
    features: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = [
    *(Shape(10, *s) for s in [(1, 64), (1, 16384), (8, 4096), (128, 4096), (128, 16384), (32, 200704), (256, 64)]),
    Shape(10, 64, 802816),
    *(Shape(100, 128, features) for features in (64, 4096, 16384)),
    *(Shape(1000, *s) for s in [(64, 2048), (256, 1280), (64, 50176)]),
    *(Shape(*s) for s in [(100, 1, 4096), (100, 8, 512), (1000, 1, 2048), (1000, 8, 512)]),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES: dict[str, Callable[[], None]] = {"cpu": lambda: None}  # device: what waits until its work is done
ALL_THREADS = torch.get_num_threads()

Step = Callable[[], tuple[Tensor, Tensor]]  # one whole exit step: survivors and their ids


# ---- the problem -----------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    shape: Shape
    x: Tensor
    means: Tensor
    scale: Tensor
    center: Tensor
    ids: Tensor
    out: e2cm.Decisions
    log_probs: Tensor  # the truth, from float64
    threshold: float
    layouts: dict[int, Layout] = field(default_factory=dict)  # number of threads: the fastest

    @property
    def confidence(self) -> Tensor:
        return self.log_probs.amax(1).exp()

    @property
    def bytes(self) -> int:
        """What must be read at least: the features and the class means, each once."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.means))

    @property
    def operations(self) -> int:
        return 2 * math.prod(self.shape)


def make_problem(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", leave: str = "half") -> Problem:
    """Features as behind a ReLU: positive class means, and noise of another strength for every sample."""
    random_numbers = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=random_numbers)
    uniform = functools.partial(torch.rand, generator=random_numbers)
    means = normal(shape.classes, shape.features).abs_()
    own = torch.arange(shape.batch) % shape.classes
    strength = 0.05 + uniform(shape.batch, 1)
    x = normal(shape.batch, shape.features).mul_(strength).add_(means[own]).to(dtype)
    scale = (0.5 + 0.1 * uniform(shape.classes)) * math.sqrt(shape.features)
    log_probs = true_log_probs(x, means, scale)
    ids = torch.randperm(shape.batch, generator=random_numbers)
    out = e2cm.Decisions.empty(shape.batch, shape.classes, device)
    threshold = -math.inf if leave == "all" else threshold_between(log_probs.amax(1).exp())
    x, means, scale, center, ids = (t.to(device) for t in (x, means, scale, means.mean(0), ids))
    return Problem(shape, x, means, scale, center, ids, out, log_probs, threshold)


def true_log_probs(x: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    squares = torch.zeros(x.shape[0], means.shape[0], dtype=torch.float64)
    for a, c in zip(x.split(1 << 16, dim=1), means.split(1 << 16, dim=1), strict=True):
        center = c.double().mean(0)
        a, c = a.double() - center, c.double() - center
        squares += a.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * a @ c.T
    return (squares.clamp_min(0).sqrt() / -scale.double()).log_softmax(1)


def threshold_between(confidence: Tensor) -> float:
    """In the widest gap near the middle, so that rounding moves nobody across."""
    count = len(confidence)
    if count == 1:
        return float(confidence) / 2
    values = confidence.sort().values[math.floor(0.45 * count) : math.ceil(0.55 * count) + 1].tolist()
    low, high = max(itertools.pairwise(values), key=lambda pair: pair[1] / pair[0])
    return (low + high) / 2


def check(problem: Problem, step: Step) -> None:
    """One step must do all that it should, or its time means nothing."""
    for tensor in problem.out:
        tensor.fill_(-1)
    survivors, ids = step()
    leaving = problem.confidence > problem.threshold
    at, out = problem.ids[leaving], problem.out
    want = problem.log_probs[leaving]
    assert torch.equal(ids, problem.ids[~leaving]), "other samples leave"
    assert torch.equal(survivors, problem.x[~leaving]), "wrong survivors"
    assert torch.equal(out.prediction[at], want.argmax(1)), "wrong predictions"
    assert (out.exit[at] == 0).all() and (out.exit[ids] == -1).all(), "wrong exits"
    torch.testing.assert_close(out.confidence[at].double(), problem.confidence[leaving], rtol=1e-3, atol=0)
    torch.testing.assert_close(out.log_probs[at].double(), want, rtol=1e-3, atol=1e-3)


# ---- the ways --------------------------------------------------------------------------------------------------------


def ours(p: Problem) -> Step:
    means = e2cm.ops.pack(p.means, p.center)
    return lambda: e2cm.ops.exit_step(p.x, means, p.scale, p.threshold, p.ids, p.out)


def unpacked(p: Problem) -> Step:
    return lambda: e2cm.ops.exit_step(p.x, p.means, p.scale, p.threshold, p.ids, p.out, p.center)


class Layout(NamedTuple):
    """What a torch user can choose without changing a result; which is fastest depends on the shape and the threads."""

    classes_dim: int  # 1: distances [B, K]; 0: distances [K, B], whose softmax runs over contiguous samples
    transposed: bool = False  # class means stored as [D, K]

    def spread(self, per_class: Tensor) -> Tensor:
        return per_class if self.classes_dim == 1 else per_class[:, None]


ROWS, COLUMNS = Layout(classes_dim=1), Layout(classes_dim=0)
ROWS_TRANSPOSED, COLUMNS_TRANSPOSED = ROWS._replace(transposed=True), COLUMNS._replace(transposed=True)


def cdist_way(p: Problem) -> Step:
    def scores(layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        distances = torch.cdist(x, p.means) if layout is ROWS else torch.cdist(p.means, x)
        return confidences(distances.mul_(layout.spread(-1 / p.scale)), layout.classes_dim)

    steps = [whole_step(p, functools.partial(scores, layout), layout) for layout in (ROWS, COLUMNS)]
    return steps[fastest(steps)]


def mm_way(p: Problem) -> Step:
    return mm_step(p, mm_layout(p))


def mm_centered_way(p: Problem) -> Step:
    return mm_step(p, mm_layout(p), p.center)


def compiled_way(p: Problem) -> Step:
    return mm_step(p, mm_layout(p), transform=functools.partial(torch.compile, dynamic=False, fullgraph=True))


def frozen_way(p: Problem, **options: bool) -> Step:
    """Compiled with constant weights, which inductor may pack for the matrix product; it does so for F.linear alone."""

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(-2 * p.means, requires_grad=False)
            self.bias = torch.nn.Parameter(p.means.square().sum(1), requires_grad=False)
            self.register_buffer("slope", -1 / p.scale)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.float()
            squares = torch.nn.functional.linear(x, self.weight, self.bias) + x.square().sum(1, keepdim=True)
            return confidences(squares.clamp_min(0).sqrt() * self.slope, 1)

    compiled = torch.compile(Head().eval(), dynamic=False, fullgraph=True, options={"freezing": True, **options})
    return whole_step(p, compiled, ROWS)


def mm_step(
    p: Problem, layout: Layout, center: Tensor | None = None, transform: Callable[[Any], Any] = lambda f: f
) -> Step:
    """||x - c||^2 = ||x||^2 - 2 x c + ||c||^2: one matrix product, with all that follows in place."""
    means = p.means if center is None else p.means - center
    norms, slope = layout.spread(means.square().sum(1)), layout.spread(-1 / p.scale)
    if layout.transposed:
        means = means.T.contiguous().T

    def scores(x: Tensor, means: Tensor, norms: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float() if center is None else x.float() - center
        x_norms = torch.linalg.vector_norm(x, dim=1).square_()  # the fastest of torch's ways to this sum
        if layout.classes_dim == 1:
            squares = torch.addmm(norms, x, means.T, alpha=-2).add_(x_norms[:, None])
        else:
            squares = torch.addmm(norms, means, x.T, alpha=-2).add_(x_norms)
        return confidences(squares.clamp_min_(0).sqrt_().mul_(slope), layout.classes_dim)

    scores = transform(scores)
    return whole_step(p, lambda x: scores(x, means, norms, slope), layout)


def mm_layout(p: Problem) -> Layout:
    """The fastest for this problem at this number of threads."""
    threads = torch.get_num_threads()
    if threads not in p.layouts:
        layouts = [ROWS, ROWS_TRANSPOSED, COLUMNS, COLUMNS_TRANSPOSED]
        p.layouts[threads] = layouts[fastest([mm_step(p, layout) for layout in layouts])]
    return p.layouts[threads]


def confidences(logits: Tensor, classes_dim: int) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(classes_dim)
    return log_probs.amax(classes_dim).exp(), log_probs


def whole_step(p: Problem, scores: Callable[[Tensor], tuple[Tensor, Tensor]], layout: Layout) -> Step:
    """scores(x) -> confidence and log-probabilities, and what follows from them; the prediction for leavers alone."""
    x, ids, out, classes_dim = p.x, p.ids, p.out, layout.classes_dim
    threshold = torch.tensor(p.threshold, device=x.device)  # compares faster than a float

    def step() -> tuple[Tensor, Tensor]:
        confidence, log_probs = scores(x)
        leaving = confidence > threshold
        gone = leaving.nonzero().squeeze(1)
        count = gone.shape[0]
        if count == 0:
            return x, ids
        at = ids.index_select(0, gone)
        answers = log_probs.index_select(1 - classes_dim, gone)
        out.prediction.scatter_(0, at, answers.argmax(classes_dim))
        out.confidence.scatter_(0, at, confidence.index_select(0, gone))
        out.exit.index_fill_(0, at, 0)
        out.log_probs.index_copy_(0, at, answers if classes_dim == 1 else answers.T)
        if count == x.shape[0]:
            return x[:0], ids[:0]
        stay = leaving.logical_not_().nonzero().squeeze(1)
        return x.index_select(0, stay), ids.index_select(0, stay)

    return step


def bare_product(p: Problem) -> Callable[[], Tensor]:
    means = p.means.to(p.x.dtype)
    steps = [lambda: p.x @ means.T, lambda: means @ p.x.T]
    return steps[fastest(steps)]


def bare_read(p: Problem) -> Callable[[], Tensor]:
    flat = p.x.flatten()
    steps = [flat.sum, lambda: torch.dot(flat, flat), flat.amax]
    return steps[fastest(steps)]


RIVALS: dict[str, Callable[[Problem], Step]] = {
    "cdist": cdist_way,
    "mm": mm_way,
    "mm centered": mm_centered_way,
    "compile": compiled_way,
    "compile frozen": frozen_way,
    "max-autotune": functools.partial(frozen_way, max_autotune=True),
}
YARDSTICKS: dict[str, Callable[[Problem], Callable[[], Any]]] = {"product": bare_product, "read": bare_read}
WAYS = {"ours": ours, "unpacked": unpacked, **RIVALS, **YARDSTICKS}
NOTES = """\
- ours: `e2cm_ext.ops.exit_step` with class means that `e2cm_ext.ops.pack` has packed with a center. unpacked (from 100
  classes on): with means as they are. Every way does the whole exit step, moving the survivors included.
- cdist: `torch.cdist`. mm: `torch.addmm` with the norms of the means. mm centered: the same after subtracting the
  center from x, as accuracy demands where features share an offset. For these the fastest layout ([B, K] or [K, B];
  means stored [K, D] or [D, K]) is found for every shape and number of threads before the clock runs.
- compile: `torch.compile` of what mm does up to the confidences. compile frozen (from 100 classes on): the same with
  constant weights, which inductor packs.
- product: x @ means.T alone. read: the fastest of `torch.sum`, `torch.dot(x, x)` and `torch.amax`. Neither is a rival.
- ratio: time of the best rival / ours, within one round: median [10th, 90th percentile] over the rounds.
- GB/s counts the features and the class means, each once; GFLOP/s counts 2 B K D.
- limit: max(bytes / read bandwidth of a working set of that size, operations / peak of multiply-add), both probed in
  every round; share: limit / time of ours, median over the rounds. Moving the survivors is in the time, not in the
  limit."""


def ways_for(shape: Shape, max_autotune: bool = False) -> list[str]:
    """Packing constant weights pays with many classes only; autotuning takes 10 s a shape and seldom finds anything."""
    few = ["unpacked", "compile frozen"] if shape.classes < 100 else []
    left_out = {*few, *([] if max_autotune else ["max-autotune"])}
    return [way for way in WAYS if way not in left_out]


# ---- measuring -------------------------------------------------------------------------------------------------------

SAMPLE_SECONDS = 0.004  # short calls are repeated within one sample
LONG_CALL_SECONDS = 0.01  # longer ones get no call to warm the caches before a sample: their data do not stay there
MIN_ROUNDS = 5


def seconds_of(step: Callable[[], Any], calls: int, wait: Callable[[], None] = DEVICES["cpu"]) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return (time.perf_counter() - start) / calls


def estimated_seconds(step: Callable[[], Any]) -> float:
    step()
    runs = [seconds_of(step, 1)]
    while len(runs) < 2 or (sum(runs) < SAMPLE_SECONDS and len(runs) < 20):
        runs.append(seconds_of(step, 1))
    return min(runs)


def fastest(steps: list[Callable[[], Any]]) -> int:
    return int(np.argmin([estimated_seconds(step) for step in steps]))


@contextlib.contextmanager
def quiet(threads: int) -> Iterator[None]:
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


def take_turns(
    steps: dict[str, Callable[[], Any]], probes: dict[str, limits.Probe], seconds: float, wait: Callable[[], None]
) -> dict[str, np.ndarray]:
    """One number per round: seconds a call for steps, a rate for probes. In another order every round."""

    def sampled(step: Callable[[], Any]) -> Callable[[], float]:
        estimate = estimated_seconds(step)
        calls = max(1, round(SAMPLE_SECONDS / estimate))

        def sample() -> float:
            if estimate < LONG_CALL_SECONDS:
                step()
            return seconds_of(step, calls, wait)

        return sample

    samplers = {name: sampled(step) for name, step in steps.items()} | probes
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples["ours"]) < MIN_ROUNDS:
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return {name: np.array(values) for name, values in samples.items()}


def built(problem: Problem, ways: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """The steps of these ways, each checked. torch.compile may lack a compiler or a platform: then it is no rival."""
    torch.compiler.reset()
    steps: dict[str, Callable[[], Any]] = {}
    for name in ways:
        try:
            step = WAYS[name](problem)
            step()
        except Exception as error:
            if name not in ("compile", "compile frozen", "max-autotune"):
                raise
            print(f"{problem.shape}: no {name}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            continue
        if name not in YARDSTICKS:
            check(problem, step)
        steps[name] = step
    return steps


def measure(problem: Problem, threads: int, ways: Iterable[str], seconds: float) -> dict[str, Any]:
    """All there is to say about one shape at one number of threads."""
    with quiet(threads), limits.Limits(threads) as machine:
        probes = {"bandwidth": machine.read(problem.bytes), "peak": machine.multiply_add()}
        samples = take_turns(built(problem, ways), probes, seconds, DEVICES[problem.x.device.type])
    bandwidth, peak = samples.pop("bandwidth"), samples.pop("peak")
    rival = min((name for name in samples if name in RIVALS), key=lambda name: np.median(samples[name]))
    reading, computing = problem.bytes / bandwidth, problem.operations / peak
    time_of_ours = samples["ours"]
    return {
        **problem.shape._asdict(),
        "threads": threads,
        "rounds": len(time_of_ours),
        "microseconds": {name: spread(values * 1e6) for name, values in samples.items()},
        "mm_layout": problem.layouts[threads]._asdict(),
        "best_rival": rival,
        "ratio": spread(samples[rival] / time_of_ours),
        "gigabytes_per_second": float(problem.bytes / np.median(time_of_ours) / 1e9),
        "gigaflops": float(problem.operations / np.median(time_of_ours) / 1e9),
        "limit": {
            "gigabytes_per_second": spread(bandwidth / 1e9),
            "gigaflops": spread(peak / 1e9),
            "by": "reading" if np.median(reading) > np.median(computing) else "arithmetic",
        },
        "share_of_limit": spread(np.maximum(reading, computing) / time_of_ours),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def call_overhead(dtype: torch.dtype, device: str) -> dict[str, dict[str, float]]:
    """Microseconds of exit_step on one sample of 64 features, 10 classes, one thread: it is nearly all call."""
    problem = make_problem(Shape(10, 1, 64), dtype, device)
    result = {}
    with quiet(1):
        for what, threshold in (("leaves", problem.threshold), ("stays", 2.0)):
            problem.threshold = threshold
            step = ours(problem)
            step()
            result[what] = spread(np.array([seconds_of(step, 20, DEVICES[device]) * 1e6 for _ in range(1000)]))
    return result


def geometric_means(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for threads, classes in sorted({(point["threads"], point["classes"]) for point in points}):
        ratios = [p["ratio"]["median"] for p in points if (p["threads"], p["classes"]) == (threads, classes)]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        result.append(
            {"threads": threads, "classes": classes, "shapes": len(ratios), "mean": mean, "least": min(ratios)}
        )
    return result


# ---- the report ------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """Three digits, and no more zeros than needed."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def point_row(point: dict[str, Any]) -> list[str]:
    ratio, limit = point["ratio"], point["limit"]
    bound = f"{short(limit['gigabytes_per_second']['median'])} GB/s"
    if limit["by"] == "arithmetic":
        bound = f"{short(limit['gigaflops']['median'])} GFLOP/s"
    return [
        shape_name(point),
        short(point["microseconds"]["ours"]["median"]),
        short(point["microseconds"][point["best_rival"]]["median"]),
        point["best_rival"],
        f"{ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]",
        short(point["gigabytes_per_second"]),
        short(point["gigaflops"]),
        bound,
        f"{point['share_of_limit']['median']:.0%}",
    ]


def shape_name(point: dict[str, Any]) -> str:
    return f"K={point['classes']}, B={point['batch']}, D={point['features']}"


def report(result: dict[str, Any]) -> str:
    machine, points = result["machine"], result["points"]
    parts = [
        f"{machine['cpu']}, {result['dtype']} features, kernels for {result['build']['isa']}, torch {result['torch']}, "
        f"{result['date'][:10]}: `{result['command']}`"
    ]
    head = ["shape", "ours µs", "best rival µs", "which", "ratio", "GB/s", "GFLOP/s", "limit", "share"]
    for threads in sorted({point["threads"] for point in points}):
        chosen = [point for point in points if point["threads"] == threads]
        ways = [way for way in WAYS if any(way in point["microseconds"] for point in chosen)]
        every = ([shape_name(p), *(_time(p["microseconds"].get(way)) for way in ways)] for p in chosen)
        title = f"{threads} thread" + "s" * (threads > 1)
        parts += [f"### {title}", table(head, map(point_row, chosen))]
        parts += [f"All ways, {title}, microseconds:", table(["shape", *ways], every)]
    parts += ["\n".join(summary_lines(result)), NOTES]
    return "\n\n".join(parts)


def _time(spread_of_way: dict[str, float] | None) -> str:
    return "" if spread_of_way is None else short(spread_of_way["median"])


def summary_lines(result: dict[str, Any]) -> Iterator[str]:
    for s in result["summary"]:
        yield (
            f"- K={s['classes']}, {s['threads']} thread{'s' * (s['threads'] > 1)}: against the best rival "
            f"{s['mean']:.2f}x (geometric mean of {s['shapes']} shapes), at least {s['least']:.2f}x"
        )
    for point in result["points"]:
        if (point["classes"], point["batch"], point["features"]) == (10, 128, 16384):
            share, limit = point["share_of_limit"], point["limit"]
            yield (
                f"- share of the machine's limit ({limit['by']}) at {shape_name(point)}, threads {point['threads']}: "
                f"{share['median']:.0%} [{share['p10']:.0%}, {share['p90']:.0%}]"
            )
    call = ", ".join(
        f"{time_['median']:.1f} µs [{time_['p10']:.1f}, {time_['p90']:.1f}] if it {what}"
        for what, time_ in result["call_overhead_microseconds"].items()
    )
    yield f"- one call of `exit_step` on a single sample (K=10, D=64, one thread): {call}"
    yield f"- limits measured by {result['machine']['limits_by']}"


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def default_path(dtype: str, leave: str) -> Path:
    cpu = re.sub(r"\((r|tm)\)", "", cpu_name().lower())
    name = "-".join(["kernels", *re.findall(r"[a-z0-9.]+", cpu), *([] if dtype == "float32" else [dtype])])
    name += "-all-leave" if leave == "all" else ""
    return Path(__file__).with_name("results") / f"{name}.json"


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")


# ---- python bench/kernels.py -----------------------------------------------------------------------------------------


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


def parse_arguments() -> argparse.Namespace:
    about, formatter = __doc__ or "", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter)
    add = parser.add_argument
    add("--threads", nargs="+", type=thread_count, default=[1, ALL_THREADS], metavar="N|all", help="default: 1 all")
    add("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="KxBxD", help="default: those of the README")
    add("--seconds", type=float, default=4, help="of timing per shape and number of threads (default: 4)")
    add("--dtype", choices=DTYPES, default="float32", help="of the features; class means stay float32")
    add("--leave", choices=["half", "all"], default="half", help="how many of a batch leave (default: half)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dry-run", action="store_true", help="with --device cuda: a small problem on the CPU, to try the script")
    add("--max-autotune", action="store_true", help="compile with max-autotune, too: about 10 s more per shape")
    add("--json", type=Path, help="default: bench/results/kernels-<cpu>.json, if all shapes and threads are measured")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda":
        import gpu_kernels

        gpu_kernels.run(arguments.json, min(arguments.seconds, 1.0), ["float32", "bfloat16"], arguments.dry_run)
        return
    threads = sorted(set(arguments.threads))
    started, points = time.perf_counter(), []
    for shape in arguments.shapes:
        problem = make_problem(shape, DTYPES[arguments.dtype], arguments.device, arguments.leave)
        for count in threads:
            points.append(measure(problem, count, ways_for(shape, arguments.max_autotune), arguments.seconds))
            took = time.perf_counter() - started
            print(f"[{took:4.0f} s] {shape}, threads {count}: {points[-1]['rounds']} rounds", file=sys.stderr)
    result = {
        "command": " ".join(["python bench/kernels.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "limits_by": limits.method()},
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "build": e2cm.build_info(),
        "dtype": arguments.dtype,
        "leave": arguments.leave,
        "threads": threads,
        "seconds_per_point": arguments.seconds,
        "summary": geometric_means(points),
        "call_overhead_microseconds": call_overhead(DTYPES[arguments.dtype], arguments.device),
        "points": points,
    }
    print(report(result))
    complete = set(arguments.shapes) >= set(SHAPES) and set(threads) >= {1, ALL_THREADS}
    if path := arguments.json or (default_path(arguments.dtype, arguments.leave) if complete else None):
        save(result, path)
        print(f"saved {path}", file=sys.stderr)
    else:
        print("not all shapes and threads: saved nowhere (--json says where)", file=sys.stderr)


# ---- pytest bench/kernels.py -----------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: Any) -> None:
    cases = [(s, t, way) for s in SHAPES for t in sorted({1, ALL_THREADS}) for way in ways_for(s)]
    names = [f"{shape}-{threads}-{way.replace(' ', '_')}" for shape, threads, way in cases]
    metafunc.parametrize(("shape", "threads", "way"), cases, ids=names)


same_problem = functools.lru_cache(maxsize=1)(make_problem)


def test_exit_step(benchmark: Any, shape: Shape, threads: int, way: str) -> None:
    problem = same_problem(shape)
    benchmark.group = f"K={shape.classes} B={shape.batch} D={shape.features} threads={threads}"
    benchmark.extra_info.update(shape._asdict(), threads=threads, way=way, bytes=problem.bytes)
    benchmark.extra_info.update(operations=problem.operations, cpu=cpu_name(), torch=torch.__version__)
    benchmark.extra_info.update(isa=e2cm.build_info()["isa"], rival=way in RIVALS)
    with quiet(threads):
        benchmark(built(problem, [way])[way])


if __name__ == "__main__":
    main()
