"""Wall-clock of a network with early exits, against the network itself and against other ways to run exits.

    python bench/end_to_end.py networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225
    python bench/end_to_end.py --torchvision resnet50 mobilenet_v3_large efficientnet_b0

With --compiled everything is compiled, the network too; with --fold all have their batch normalisations folded first.

All ways take turns on the same images, round by round, and a ratio is one of neighbours in time. Exits are those that
ee.select keeps of the first images of the test split, and all; thresholds come from there, too, time is measured on
other images. The networks of torchvision have random weights, since no others are at hand, and see noise: so do their
exits, and thresholds are set so that the same share of who is left leaves at each of six exits. What that says about
time holds for any weights with which as many leave there.

The other ways, with the same exits and thresholds:
- "plain torch": the same stages, and what a user would write between them: mask, nonzero, index_select;
- "plain torch, our heads": the same with the scores of our kernels;
- "earlyon": its wrapper around the network, with the scores of our kernels. It lets single images leave, not those of
  a batch; so a batch is given to it one by one. An exit behind a function and not a module, such as the ReLU of a stem,
  is hooked to the module before it.
- "earlyon, batches": its mode for batches, in which nobody leaves before everybody can. Its decisions are others.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from curves import arguments, network, write
from e2cm_ext.compiled import Compiled
from e2cm_ext.turns import in_turns, ratio
from e2cm_ext.whitened import WhitenedMeans
from map_statistics import by_torch
from torch import Tensor, nn

import e2cm_ext as e2cm

BUDGETS = (0.3, 0.5, 0.7)
SIZES = (1, 8, 32, 128, 256)
HOOKS = {"relu": ("bn1", torch.relu)}  # of exits that are no modules, in the networks of torchvision and ResNets alike
MEBIBYTE = 1 << 20

Run = Callable[[Tensor], Any]
Way = Callable[[Sequence[Tensor]], Sequence[float]]


class Subject(NamedTuple):
    name: str
    model: nn.Module
    images: Tensor
    exits: dict[str, e2cm.EarlyExit]
    thresholds: dict[tuple[str, float], Tensor]  # for which exits and FLOPs


# ---- what is measured ------------------------------------------------------------------------------------------------


def trained(options: argparse.Namespace) -> Subject:
    def images(split: str, part: slice) -> e2cm.data.Batches:
        return e2cm.data.load(
            options.data, split=split, normalise=(options.mean, options.std), part=part, batch_size=128,
            channels_last=True,
        )  # fmt: skip

    model = network(options.networks, options.call).to(options.device, memory_format=torch.channels_last)
    others = torch.cat([x for x, _ in images("test", slice(options.found, options.found + options.images))])
    ee = e2cm.EarlyExit(model, others[:1].to(options.device), head=options.head)
    ee.fit(images("train", slice(options.fit)), progress=False)
    record = ee.record(images("test", slice(options.found)), progress=False)
    few = ee.select(record, options.count, progress=False)
    assert few.selection is not None
    exits, thresholds = {}, {}
    found = [(f"{options.count} selected", few, few.selection.curve)]
    if not options.selected:
        found.append((f"all {len(ee.heads)}", ee, ee.curve(record, progress=False)))
    for name, some, curve in found:
        exits[name] = some
        thresholds |= {(name, budget): curve.best_within(budget).thresholds for budget in options.budgets}
    return Subject(options.call, model, _placed(others, options), exits, thresholds)


def untrained(name: str, options: argparse.Namespace) -> Subject:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    model = model.to(options.device, memory_format=torch.channels_last)
    images = _placed(torch.randn(options.images, 3, 224, 224), options)
    ee = e2cm.EarlyExit(model, images[:1], exits=6, head=options.head)

    def make(j: int, x: Tensor) -> None:
        """Logits that differ from image to image by much more than rounding does, so that all ways decide alike."""
        head = ee.heads[j]
        seen = e2cm.ops.statistics(x, head.statistics)
        deviation, mean = torch.std_mean(seen, 0)
        head.weight.normal_().div_(deviation.clamp(min=1e-3 * deviation.max()) * len(mean) ** 0.5 / 3)
        head.bias.copy_(-head.weight @ mean)
        head.fitted = True

    with torch.no_grad():
        ee._walk(images[:32], make, logits=False)
    record = ee.record([(x, torch.zeros(len(x), dtype=torch.int64)) for x in images.split(32)], progress=False)
    thresholds = {("6", budget): _evenly(record, budget) for budget in options.budgets}
    return Subject(name, model, images, {"6": ee}, thresholds)


def _placed(images: Tensor, options: argparse.Namespace) -> Tensor:
    return images.to(options.device).contiguous(memory_format=torch.channels_last)


def _evenly(record: e2cm.Record, flops: float) -> Tensor:
    """Thresholds at which the same share of who is left leaves at every exit."""
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        left = torch.ones(len(record), dtype=torch.bool)
        limits = []
        for certainty in record.confidence.T[:-1]:
            limits.append(certainty[left].quantile(1 - share).item() if left.any() else math.inf)
            left &= certainty <= limits[-1]
        low, high = (share, high) if record.replay(limits).flops > flops else (low, share)
    return torch.tensor(limits)


# ---- ways to run it --------------------------------------------------------------------------------------------------


class Plain:
    """The same stages, heads, thresholds and answers, in plain torch."""

    def __init__(self, ee: e2cm.EarlyExit, head: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.stages = list(ee._compiled or ee.stages)
        self.heads = list(ee.heads)
        self.limits = ee.thresholds.tolist()
        self.head = head

    def __call__(self, x: Tensor) -> Tensor:
        answers: Tensor | None = None
        ids = torch.arange(len(x), device=x.device)
        for stage, head, limit in zip(self.stages, self.heads, self.limits, strict=False):
            x = stage(x)
            if limit == math.inf:
                continue
            log_probs = self.head(head, x)
            if answers is None:
                answers = log_probs.new_empty(log_probs.shape)
            leaves = log_probs.exp().max(1).values > limit
            if leaves.any():
                answers[ids[leaves]] = log_probs[leaves]
                stays = (~leaves).nonzero()[:, 0]
                x, ids = x.index_select(0, stays), ids[stays]
                if not len(ids):
                    return answers
        log_probs = self.stages[-1](x).log_softmax(1)
        if answers is None:
            return log_probs
        answers[ids] = log_probs
        return answers


def in_torch(head: nn.Module, x: Tensor) -> Tensor:
    wanted = getattr(head, "statistics", None)
    seen = x.flatten(1) if wanted is None else by_torch(x, wanted)
    if isinstance(head, WhitenedMeans):
        return nn.functional.linear(seen, head.weight, head.bias).log_softmax(1)
    return (-torch.cdist(seen, head.means.flatten(1)) / head.scale).log_softmax(1)


def ours(head: nn.Module, x: Tensor) -> Tensor:
    return head(x)


def earlyon_around(model: nn.Module, ee: e2cm.EarlyExit, images: Tensor) -> nn.Module:
    from earlyon.models import custom_ee

    model = copy.deepcopy(model)  # it leaves hooks
    known = dict(model.named_modules())
    layers = [name if name in known else HOOKS[name][0] for name in ee.exit_names]
    extractors = {HOOKS[name][0]: HOOKS[name][1] for name in ee.exit_names if name not in known}
    wrapped = custom_ee(
        model, layers, ee.num_classes, input_shape=(1, *images.shape[1:]), feature_extractors=extractors,
        confidence_thresholds=[min(limit, 1.0) for limit in ee.thresholds.tolist()],
    ).eval()  # fmt: skip
    wrapped.config.enabled_exits = [limit < math.inf for limit in ee.thresholds.tolist()]
    wrapped.exit_heads = nn.ModuleDict(dict(zip(wrapped.exit_heads, ee.heads, strict=True)))  # softmax undoes the log
    return wrapped


def batch_by_batch(run: Run, device: torch.device) -> Way:
    def way(batches: Sequence[Tensor]) -> list[float]:
        seconds = []
        for x in batches:
            start = _now(device)
            run(x)
            seconds.append(_now(device) - start)
        return seconds

    return way


def at_once(run: Callable[[Sequence[Tensor]], Iterable[Any]], device: torch.device) -> Way:
    def way(batches: Sequence[Tensor]) -> list[float]:
        start = _now(device)
        for _ in run(batches):
            pass
        return [_now(device) - start]

    return way


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(work: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a pass takes at most beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _kibibytes("VmRSS")
    work()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    model, device = subject.model, subject.images.device
    base: Run = model
    if options.compiled:
        for ee in subject.exits.values():
            ee.compile(fold=options.fold, **options.compile_options)
        whole = e2cm.Stages([model, nn.Identity()])
        base = next(iter(Compiled(whole, fold=options.fold, channels_last=False, options=options.compile_options)))
    ways: dict[str, Way] = {"the network": batch_by_batch(base, device)}
    in_large = f"the network in batches of {options.stream}"
    about: dict[str, dict[str, Any]] = {"the network": {"flops": 1.0}, in_large: {"flops": 1.0}}
    wrapped_as: dict[tuple[str, float], e2cm.EarlyExit] = {}

    def add(name: str, run: Way, **facts: Any) -> None:
        ways[name], about[name] = run, facts

    for ee in subject.exits.values():
        ee.profile(subject.images, min(128, *options.sizes[-1:]), repeats=2, progress=False)
    for (exits, budget), thresholds in subject.thresholds.items():
        ee = _at(subject.exits[exits], thresholds)
        facts = {"exits": exits, "asked": budget}
        wrapped_as[exits, budget] = ee
        add(f"ours, {exits}, {budget}", batch_by_batch(ee, device), **facts, way="ours")
        stream = at_once(lambda batches, ee=ee: ee.predict_stream(batches, batch_size=options.stream), device)
        add(f"stream, {exits}, {budget}", stream, **facts, way="predict_stream")
        if budget != options.rivals:
            continue
        moving = _at(ee, thresholds)
        moving.compaction = None
        add(f"moving, {exits}", batch_by_batch(moving, device), **facts, way="ours, survivors moved at every exit")
        if exits != next(iter(subject.exits)):
            continue
        add("plain torch", batch_by_batch(Plain(ee, in_torch), device), **facts, way="plain torch")
        add("plain, our heads", batch_by_batch(Plain(ee, ours), device), **facts, way="plain torch, our heads")
        if not options.compiled:  # earlyon refuses to be compiled
            wrapped = earlyon_around(model, ee, subject.images)
            singly = batch_by_batch(lambda x, run=wrapped: [run(one) for one in x.split(1)], device)
            add("earlyon", singly, **facts, way="earlyon")
            batched = batch_by_batch(wrapped.forward_inference_batched, device)
            add("earlyon, batches", batched, way="earlyon, batches", exits=exits)
    for exits, ee in subject.exits.items():
        idle = _at(ee, 1e30)  # on, and never above it
        add(f"none fires, {exits}", batch_by_batch(idle, device), exits=exits, flops=1.0, way="ours, none fires")

    rows = []
    for size in options.sizes:
        images = subject.images[: max(size, min(len(subject.images), options.singles if size == 1 else 32 * size))]
        batches = images.split(size)
        ways[in_large] = partial(_instead, batch_by_batch(base, device), images.split(options.stream))
        labels = torch.zeros(len(images), dtype=torch.int64)
        flops = {
            key: ee.evaluate([(images, labels)], progress=False).flops for key, ee in wrapped_as.items()
        }  # who leaves where differs from image to image
        some = {name: way for name, way in ways.items() if not (size == 1 and name == "earlyon, batches")}
        with torch.inference_mode():
            seconds, each = taken(some, batches, options.rounds, device)
            most = {name: peak(partial(way, batches), device) for name, way in some.items()}
        for name, took in each.items():
            p50, p95, p99 = (1e3 * np.percentile(took, [50, 95, 99])).tolist()
            facts = about[name]
            if "asked" in facts:
                facts["flops"] = flops[facts["exits"], facts["asked"]]
            rows.append(
                {"network": subject.name, "size": size, "way": name, **facts}
                | {
                    "time": asdict(ratio(seconds[name], seconds["the network"])),
                    "time, large": asdict(ratio(seconds[name], seconds[in_large])),
                }
                | {"images/s": len(images) / float(seconds[name].median()), "peak MiB": most[name]}
                | ({} if took.shape[1] < len(batches) else {"ms per batch": {"p50": p50, "p95": p95, "p99": p99}})
            )
            print(line(rows[-1]), flush=True)
    return rows


def taken(
    ways: dict[str, Way], batches: Sequence[Tensor], rounds: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Seconds of each way [rounds], and of its batches, or of all of them together [rounds, batches]."""
    each: dict[str, list[Sequence[float]]] = {name: [] for name in ways}

    def turn(name: str) -> None:
        each[name].append(ways[name](batches))

    seconds = in_turns({name: partial(turn, name) for name in ways}, rounds, device=device)
    return seconds, {name: np.array(found[1:]) for name, found in each.items()}  # the first round does not count


def _instead(way: Way, batches: Sequence[Tensor], _: Sequence[Tensor]) -> Sequence[float]:
    return way(batches)


def _at(ee: e2cm.EarlyExit, thresholds: Tensor | float) -> e2cm.EarlyExit:
    """Shares everything else, compiled stages included."""
    other = type(ee).__new__(type(ee))
    other.__dict__ = ee.__dict__ | {"_buffers": dict(ee._buffers)}
    other.thresholds = thresholds
    return other


HEADER = (
    "| network | batch | way | exits | FLOPs | time / the network's own | / in large batches | images/s | "
    "ms: p50, p95, p99 | MiB |\n"
    "| :-- | --: | :-- | :-- | --: | --: | --: | --: | --: | --: |"
)


def line(row: dict[str, Any]) -> str:
    t = row["time"]
    spread = f"{t['median']:.3f} [{t['p10']:.3f}, {t['p90']:.3f}]"
    each = ", ".join(f"{ms:.4g}" for ms in row.get("ms per batch", {}).values())
    flops = f"{row['flops']:.3f}" if "flops" in row else ""
    memory = "" if row["peak MiB"] is None else f"{row['peak MiB']:.0f}"
    return (
        f"| {row['network']} | {row['size']} | {row['way']} | {row.get('exits', '')} | {flops} | {spread} | "
        f"{row['time, large']['median']:.3f} | "
        f"{row['images/s']:.4g} | {each} | {memory} |"
    )


def main() -> None:
    parser = arguments(__doc__, optional=True)
    parser.add_argument("--torchvision", nargs="+", default=[], help="networks of it, in place of a file and data")
    parser.add_argument("--head", default="whitened_means")
    parser.add_argument("--count", type=int, default=6, help="exits to select")
    parser.add_argument("--selected", action="store_true", help="these alone")
    parser.add_argument("--fit", type=int, default=2000, help="training images to fit on: time does not depend on it")
    parser.add_argument("--found", type=int, default=2048, help="test images to find exits and thresholds on")
    parser.add_argument("--images", type=int, default=256, help="to measure with")
    parser.add_argument("--singles", type=int, default=96, help="of them, in batches of one")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--rivals", type=float, default=0.5, help="the budget at which the other ways are measured")
    parser.add_argument("--stream", type=int, default=128, help="batch_size of predict_stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--freezing", action="store_true", help="with --compiled: weights become constants")
    parser.add_argument("--fold", action="store_true", help="with --compiled: batch normalisation is folded")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if not options.torchvision and options.data is None:
        parser.error("wanted a file that makes a network, what to call in it and data; or --torchvision NAME ...")
    options.compile_options = {"options": {"freezing": True}} if options.freezing else {}
    torch.set_num_threads(options.threads)
    print(HEADER, flush=True)
    subjects = (untrained(name, options) for name in options.torchvision) if options.torchvision else [trained(options)]
    rows = [row for subject in subjects for row in measure(subject, options)]
    if options.json:
        how = {"compiled": options.compiled, "freezing": options.freezing, "folded": options.fold}
        write(options.json, {"device": str(options.device), **how, "rows": rows})


if __name__ == "__main__":
    main()
