"""Times of all ways to run one network, interleaved."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import e2cm_ext as e2cm
from e2cm_ext.stages.compiled import Compiled
from e2cm_ext.utils.timing import ratio, time_interleaved

from .. import markdown
from . import ways
from .subjects import Subject
from .ways import Run, Way, batch_by_batch

NETWORK = "the network"
NEVER = 1e30  # a threshold: the exit is on, and no confidence is above it
HEADER = ["network", "batch", "way", "exits", "FLOPs", "time / the network's own", "/ in large batches"]
HEADER += ["images/s", "ms: p50, p95, p99", "MiB"]


class Measurement:
    """One network with its exits, all ways to run it, and what is known of each way."""

    def __init__(self, subject: Subject, options: argparse.Namespace) -> None:
        self.subject, self.options = subject, options
        self.device = subject.images.device
        self.base = self.compiled() if options.compiled else subject.model
        self.in_large = f"the network in batches of {options.stream}"
        self.ways: dict[str, Way] = {NETWORK: batch_by_batch(self.base, self.device)}
        self.facts: dict[str, dict[str, Any]] = {NETWORK: {"flops": 1.0}, self.in_large: {"flops": 1.0}}
        for ee in subject.exits.values():
            ee.profile(subject.images, min(128, *options.sizes[-1:]), repeats=2, progress=False)
        for (exits, budget), thresholds in subject.thresholds.items():
            self.add_ours(exits, budget, thresholds)
            if budget == options.rivals:
                self.add_rivals(exits, budget, thresholds)
        for exits, ee in subject.exits.items():
            self.add(f"none fires, {exits}", self.own(ee, NEVER), exits=exits, flops=1.0, way="ours, none fires")

    def compiled(self) -> Run:
        """Everything; returns the network without exits."""
        options = self.options
        for ee in self.subject.exits.values():
            ee.compile(fold=options.fold, **options.compile_options)
        whole = e2cm.Stages([self.subject.model, nn.Identity()])
        return next(iter(Compiled(whole, fold=options.fold, channels_last=False, options=options.compile_options)))

    def add(self, name: str, run: Way, **facts: Any) -> None:
        self.ways[name], self.facts[name] = run, facts

    def own(self, ee: e2cm.EarlyExit, thresholds: Tensor | float, compaction: Any = "as profiled") -> Way:
        """The exits at these thresholds, batch by batch."""
        return batch_by_batch(ee, self.device, setting(ee, thresholds, compaction))

    def add_ours(self, exits: str, budget: float, thresholds: Tensor) -> None:
        ee, facts = self.subject.exits[exits], {"exits": exits, "asked": budget}
        self.add(f"ours, {exits}, {budget}", self.own(ee, thresholds), **facts, way="ours")
        run = partial(ee.predict_stream, batch_size=self.options.stream)
        stream = ways.all_together(run, self.device, setting(ee, thresholds))
        self.add(f"stream, {exits}, {budget}", stream, **facts, way="predict_stream")

    def add_rivals(self, exits: str, budget: float, thresholds: Tensor) -> None:
        ee, device, facts = self.subject.exits[exits], self.device, {"exits": exits, "asked": budget}
        moving = self.own(ee, thresholds, compaction=None)
        self.add(f"moving, {exits}", moving, **facts, way="ours, survivors moved at every exit")
        if exits != next(iter(self.subject.exits)):
            return
        for name, head in (("plain torch", ways.head_in_torch), ("plain torch, our heads", ways.our_head)):
            self.add(name, batch_by_batch(ways.Plain(ee, thresholds, head), device), **facts, way=name)
        if not importlib.util.find_spec("earlyon"):
            print("earlyon is not installed, and left out: pip install --no-deps earlyon", file=sys.stderr)
        elif not self.options.compiled:  # it refuses to be compiled
            wrapped = ways.earlyon_around(self.subject.model, ee, thresholds, self.subject.images)
            self.add("earlyon", batch_by_batch(ways.one_by_one(wrapped), device), **facts, way="earlyon")
            batched = batch_by_batch(wrapped.forward_inference_batched, device)
            self.add("earlyon, batches", batched, way="earlyon, batches", exits=exits)

    def flops(self, images: Tensor) -> dict[tuple[str, float], float]:
        """Of these images: it differs from image to image which exit is taken."""
        labels, found = torch.zeros(len(images), dtype=torch.int64), {}
        for (exits, budget), thresholds in self.subject.thresholds.items():
            ee = self.subject.exits[exits]
            setting(ee, thresholds)()
            found[exits, budget] = ee.evaluate([(images, labels)], progress=False).flops
        return found

    def at_size(self, size: int) -> list[dict[str, Any]]:
        """A row for every way, in batches of this size."""
        count = self.options.singles if size == 1 else 32 * size
        images = self.subject.images[: max(size, min(len(self.subject.images), count))]
        batches = images.split(size)
        chosen = {name: way for name, way in self.ways.items() if not (size == 1 and name == "earlyon, batches")}
        large = batch_by_batch(self.base, self.device)
        chosen[self.in_large] = lambda _: large(images.split(self.options.stream))
        flops = self.flops(images)
        with torch.inference_mode():
            totals, each = interleaved(chosen, batches, self.options.rounds, self.device)
            memory = {name: ways.peak_memory(partial(way, batches), self.device) for name, way in chosen.items()}
        rows = []
        for name, seconds in each.items():
            facts = self.facts[name]
            if "asked" in facts:
                facts = facts | {"flops": flops[facts["exits"], facts["asked"]]}
            row = {"network": self.subject.name, "size": size, "way": name, **facts}
            row["time"] = asdict(ratio(totals[name], totals[NETWORK]))
            row["time, large"] = asdict(ratio(totals[name], totals[self.in_large]))
            row |= {"images/s": len(images) / float(totals[name].median()), "peak MiB": memory[name]}
            if seconds.shape[1] >= len(batches):
                p50, p95, p99 = (1e3 * np.percentile(seconds, [50, 95, 99])).tolist()
                row["ms per batch"] = {"p50": p50, "p95": p95, "p99": p99}
            rows.append(row)
            print(markdown.row(cells(row)), flush=True)
        return rows


def setting(ee: e2cm.EarlyExit, thresholds: Tensor | float, compaction: Any = "as profiled") -> Callable[[], None]:
    """A function that sets them: all ways share one EarlyExit, with its compiled stages and its profile."""

    def prepare() -> None:
        ee.thresholds = thresholds
        ee.compaction = profiled if compaction == "as profiled" else compaction

    profiled = ee.compaction
    return prepare


def interleaved(
    chosen: dict[str, Way], batches: Sequence[Tensor], rounds: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Seconds of each way [rounds], and of its batches, or of all of them together [rounds, batches]."""
    each: dict[str, list[Sequence[float]]] = {name: [] for name in chosen}

    def run(name: str) -> None:
        each[name].append(chosen[name](batches))

    totals = time_interleaved({name: partial(run, name) for name in chosen}, rounds, device=device)
    return totals, {name: np.array(found[1:]) for name, found in each.items()}  # the first round does not count


def measure(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    this = Measurement(subject, options)
    return [row for size in options.sizes for row in this.at_size(size)]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        row["network"],
        str(row["size"]),
        row["way"],
        row.get("exits", ""),
        f"{row['flops']:.3f}" if "flops" in row else "",
        markdown.with_spread(row["time"], 3),
        f"{row['time, large']['median']:.3f}",
        f"{row['images/s']:.4g}",
        ", ".join(f"{ms:.4g}" for ms in row.get("ms per batch", {}).values()),
        "" if row["peak MiB"] is None else f"{row['peak MiB']:.0f}",
    ]
