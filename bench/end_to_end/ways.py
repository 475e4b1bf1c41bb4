"""Ways to run a network with exits: this package, plain torch, and the package earlyon."""

from __future__ import annotations

import copy
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import e2cm_ext as e2cm

from ..map_statistics import statistics_in_torch

HOOKS = {"relu": ("bn1", torch.relu)}  # of exits that are no modules, in the networks of torchvision and ResNets alike
MEBIBYTE = 1 << 20

Run = Callable[[Tensor], Any]
Way = Callable[[Sequence[Tensor]], Sequence[float]]  # batches to seconds of each, or of all of them together


# ---- cascades -------------------------------------------------------------------------------------------------------


class Plain:
    """The same stages, heads, thresholds and answers, in plain torch."""

    def __init__(self, ee: e2cm.EarlyExit, thresholds: Tensor, head: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.stages = list(ee._compiled or ee.stages)
        self.heads = list(ee.heads)
        self.limits = thresholds.tolist()
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


def head_in_torch(head: nn.Module, x: Tensor) -> Tensor:
    wanted = getattr(head, "statistics", None)
    features = x.flatten(1) if wanted is None else statistics_in_torch(x, wanted)
    if isinstance(head, e2cm.WhitenedMeans):
        return nn.functional.linear(features, head.weight, head.bias).log_softmax(1)
    return (-torch.cdist(features, head.means.flatten(1)) / head.scale).log_softmax(1)


def our_head(head: nn.Module, x: Tensor) -> Tensor:
    return head(x)


def earlyon_around(model: nn.Module, ee: e2cm.EarlyExit, thresholds: Tensor, images: Tensor) -> nn.Module:
    from earlyon.models import custom_ee

    model = copy.deepcopy(model)  # it leaves hooks
    known = dict(model.named_modules())
    layers = [name if name in known else HOOKS[name][0] for name in ee.exit_names]
    extractors = {HOOKS[name][0]: HOOKS[name][1] for name in ee.exit_names if name not in known}
    limits = thresholds.tolist()
    wrapped = custom_ee(
        model, layers, ee.num_classes, input_shape=(1, *images.shape[1:]), feature_extractors=extractors,
        confidence_thresholds=[min(limit, 1.0) for limit in limits],
    ).eval()  # fmt: skip
    wrapped.config.enabled_exits = [limit < math.inf for limit in limits]
    wrapped.exit_heads = nn.ModuleDict(dict(zip(wrapped.exit_heads, ee.heads, strict=True)))  # softmax undoes the log
    return wrapped


def one_by_one(run: Run) -> Run:
    return lambda batch: [run(image) for image in batch.split(1)]


# ---- timed ----------------------------------------------------------------------------------------------------------


def batch_by_batch(run: Run, device: torch.device, prepare: Callable[[], None] | None = None) -> Way:
    """prepare: what is done first, such as setting thresholds."""

    def way(batches: Sequence[Tensor]) -> list[float]:
        if prepare is not None:
            prepare()
        seconds = []
        for x in batches:
            start = _now(device)
            run(x)
            seconds.append(_now(device) - start)
        return seconds

    return way


def all_together(
    run: Callable[[Sequence[Tensor]], Iterable[Any]], device: torch.device, prepare: Callable[[], None]
) -> Way:
    def way(batches: Sequence[Tensor]) -> list[float]:
        prepare()
        start = _now(device)
        for _ in run(batches):
            pass
        return [_now(device) - start]

    return way


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(work: Callable[[], Any], device: torch.device) -> float | None:
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
