"""How long stages and exits take on this device, and how long a batch takes by that under given thresholds.

FLOPs say little about time: half a batch takes more than half of the time, and an exit step takes time of its own. So
every stage and every exit step is timed at batch sizes 1, 2, 4, ..., all of them in turns, over and over, so that what
else the machine does falls on all alike; the medians count. At sizes in between, time is taken to be linear.

An exit step is timed at the threshold that half of the samples pass: their answers are written down, the others are
moved. What moving alone takes is timed, too: inference goes by it (see compaction.py). Devices that run behind the
program (CUDA, ...) are waited for before every look at the clock. So they are in a cascade too, at every exit that is
on, since the number of survivors must be known; at exits that are off they are not, and that little is counted too
much.

The expected time of a batch of B samples, drawn independently: the number of those that reach a stage is binomial, with
the share of the record's samples that do; the mean of the stage's time over it, summed over the stages, and the same
for the exit steps of those exits that are on. That is exact for the table of times; no sample takes no time.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from ..heads import Head
from ..heads.protocol import Walk
from ..heads.rules import Rule
from ..heads.thresholds import threshold_vector
from ..ops.types import Decisions
from ..runtime import stream
from ..stages.flops import Costs
from ..utils import serialization
from . import binomial, curves
from .curves import Method, OperatingPoint
from .record import Record, Replay

__all__ = ["Profile", "TimedPoint", "fastest", "measure", "drop_unprofitable_exits"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TimedPoint(OperatingPoint):
    """Thresholds, and the time that a batch is expected to take under them."""

    seconds: float
    base_seconds: float  # of the network without any exit
    batch_size: int

    @property
    def latency(self) -> float:
        """The time as a fraction of the base network's."""
        return self.seconds / self.base_seconds

    def __str__(self) -> str:
        return (
            f"{super().__str__()}, {1e3 * self.seconds:.4g} ms per batch of {self.batch_size} "
            f"({self.latency:.4f} of the base network's)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Seconds that every stage and every exit step takes on one device, at some batch sizes."""

    stages: Tensor  # [S, M+1] float64
    heads: Tensor  # [S, M] float64: the whole exit step, survivors moved
    sizes: tuple[int, ...]  # S batch sizes, rising from 1
    names: tuple[str, ...]  # M, of the exits
    device: str = "unknown"  # what it was measured on
    moves: Tensor | None = None  # [S, M] float64: moving so many survivors; None: not known

    def __post_init__(self) -> None:
        if self.sizes[:1] != (1,) or any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"`sizes` is {self.sizes}; wanted batch sizes that rise from 1")
        for name, table, columns in (
            ("stages", self.stages, len(self.names) + 1),
            ("heads", self.heads, len(self.names)),
            ("moves", self.moves, len(self.names)),
        ):
            if table is None:
                continue
            if table.shape != (len(self.sizes), columns):
                raise ValueError(f"`{name}` has shape {list(table.shape)}; wanted [{len(self.sizes)}, {columns}]")
            object.__setattr__(self, name, table.detach().double().cpu())

    def seconds(self, stage: int, samples: float) -> float:
        """What stage number `stage` takes on so many samples."""
        return float(_between(self.sizes, self.stages[:, stage], self._known(samples)))

    def head_seconds(self, exit: int, samples: float) -> float:
        """What the exit step number `exit` takes on so many samples."""
        return float(_between(self.sizes, self.heads[:, exit], self._known(samples)))

    def move_seconds(self, exit: int, samples: float) -> float:
        """What it takes to move so many survivors together at the exit number `exit`; 0 if that was not measured."""
        if self.moves is None:
            return 0.0
        return float(_between(self.sizes, self.moves[:, exit], self._known(samples)))

    def base_seconds(self, batch_size: int) -> float:
        """What the base network takes on a batch, without any exit."""
        return float(_between(self.sizes, self.stages.sum(1), self._known(batch_size)))

    def expected_seconds(self, record: Record, thresholds: Tensor | Sequence[float], batch_size: int) -> float:
        """What a batch of samples like those of the record takes under `thresholds`, on average."""
        self.refuse_foreign(record)
        check_batch_size(batch_size, self)
        limits = threshold_vector(thresholds, record.exits)
        return self._expected(record.replay(limits), limits, batch_size)

    def _expected(self, replay: Replay, limits: Tensor, batch_size: int) -> float:
        counts = np.arange(batch_size + 1)
        stages, heads = (
            torch.from_numpy(
                np.array([_between(self.sizes, column, counts) for column in table.T]).reshape(-1, len(counts))
            )
            for table in (self.stages, self.heads)
        )
        leavers = replay.exit.bincount(minlength=len(stages)).double()
        reach = leavers.flip(0).cumsum(0).flip(0) / leavers.sum()
        weights = binomial.probabilities(batch_size, reach)  # [M+1, batch_size + 1]
        on = limits < math.inf
        return float((weights * stages).sum() + (weights[:-1] * heads)[on].sum())

    def refuse_foreign(self, record: Record) -> None:
        if record.names != self.names:
            raise ValueError(
                f"the profile is of another network, with exits {', '.join(self.names)}; "
                f"wanted {', '.join(record.names)}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file, complete or not there at all."""
        info = {"sizes": self.sizes, "names": self.names, "device": self.device}
        tensors = {"stages": self.stages, "heads": self.heads}
        if self.moves is not None:
            tensors["moves"] = self.moves
        serialization.write(path, "profile", tensors, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """A ValueError says what is wrong with a file that is no profile, not whole, or altered."""
        tensors, info = serialization.read(path, "profile")
        return cls(
            tensors["stages"], tensors["heads"], tuple(info["sizes"]), tuple(info["names"]), info["device"],
            tensors.get("moves"),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Profile({len(self.names)} exits, batches of 1 to {self.sizes[-1]}, {self.device})"

    def __str__(self) -> str:
        names = [text for name in self.names for text in (name, f"{name}, exit step")] + ["(end)"]
        columns = [column for pair in zip(self.stages.T, self.heads.T, strict=False) for column in pair]
        width = max(map(len, ("microseconds per batch of", *names)))
        lines = [f"{'microseconds per batch of':{width}}" + "".join(f"{size:>10}" for size in self.sizes)]
        for name, column in zip(names, [*columns, self.stages[:, -1]], strict=True):
            lines.append(f"{name:{width}}" + "".join(f"{1e6 * seconds:10.1f}" for seconds in column.tolist()))
        return "\n".join([*lines, self.device])

    def _known(self, samples: float) -> float:
        if not 0 <= samples <= self.sizes[-1]:
            raise ValueError(f"{samples} samples are no batch that the profile knows; wanted 0 to {self.sizes[-1]}")
        return samples


def _between(sizes: Sequence[int], seconds: Tensor, samples: Any) -> Any:
    """Linear between the sizes; nothing for no sample."""
    return np.interp(samples, (0, *sizes), (0.0, *seconds.tolist()))


def check_batch_size(batch_size: int, profile: Profile | None = None) -> None:
    stream.check_batch_size(batch_size)
    if profile is not None and batch_size > profile.sizes[-1]:
        raise ValueError(
            f"`batch_size` is {batch_size}; the profile knows batches of up to {profile.sizes[-1]} samples"
        )


# ---- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    heads: Sequence[Head],
    rule: Rule,
    walk: Walk,
    images: Tensor,
    names: Sequence[str],
    *,
    batch_size: int = 128,
    repeats: int = 10,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Times everything `repeats` times, after one round that does not count. Few images are used again and again."""
    check_batch_size(batch_size)
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}; wanted a whole number from 1 on")
    if len(images) == 0:
        raise ValueError(f"`images` has shape {list(images.shape)}; wanted at least one to measure with")
    images = torch.cat([images] * math.ceil(batch_size / len(images)))[:batch_size]
    sizes = (*itertools.takewhile(lambda size: size < batch_size, (1 << k for k in itertools.count())), batch_size)
    batches = [images[:size] for size in sizes]
    limits = [median_thresholds(heads, rule, walk, batch) for batch in batches]
    rounds = []
    for _ in tqdm(range(repeats + 1), desc="profile", disable=not progress, leave=False):
        rounds.append([_once(heads, rule, walk, *pair, clock) for pair in zip(batches, limits, strict=True)])
    seconds = torch.tensor(rounds[1:], dtype=torch.float64, device="cpu").quantile(0.5, dim=0)
    stages, behind = len(heads) + 1, 2 * len(heads) + 1
    tables = seconds[:, :stages], seconds[:, stages:behind], seconds[:, behind:]
    return Profile(*tables[:2], sizes, tuple(names), _described(images.device), tables[2])


def median_thresholds(heads: Sequence[Head], rule: Rule, walk: Walk, images: Tensor) -> list[float]:
    """Thresholds that half of these samples pass, at every exit."""
    limits: list[float] = []
    walk(images, lambda j, x: limits.append(float(heads[j].score(x, rule)[0].nanmedian())), logits=False)
    return [math.inf if math.isnan(limit) else limit for limit in limits]


def _once(
    heads: Sequence[Head], rule: Rule, walk: Walk, images: Tensor, limits: Sequence[float], clock: Callable[[], float]
) -> list[float]:
    """Seconds of M+1 stages, then of M exit steps, then of moving everybody at M exits."""
    rows, device = len(images), images.device
    stages: list[float] = []
    steps: list[float] = []
    moves: list[float] = []
    everybody = torch.ones(rows, dtype=torch.bool, device=device)

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock()

    start = now()

    def visit(j: int, x: Tensor) -> None:
        nonlocal start
        stages.append(now() - start)
        out, ids = Decisions.empty(rows, heads[j].num_classes, device), torch.arange(rows, device=device)
        start = now()
        heads[j].step(x, limits[j], ids, out, rule=rule, exit=j)
        steps.append(now() - start)
        start = now()
        ops.compact(x, everybody)
        moves.append(now() - start)
        start = now()

    start = now()
    walk(images, visit, logits=True)
    stages.append(now() - start)
    return [*stages, *steps, *moves]


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


# ---- thresholds -----------------------------------------------------------------------------------------------------


def fastest(
    record: Record,
    profile: Profile,
    *,
    latency: float | None = None,
    milliseconds: float | None = None,
    batch_size: int = 128,
    method: Method = "auto",
    progress: bool = False,
) -> TimedPoint:
    """The most accurate thresholds whose expected time is within a limit: a fraction of the base network's, or a time.

    Candidates are the front of the curve over FLOPs, and that of a curve over what the stages and exit steps take per
    sample at the full batch size: smaller batches take longer per sample, and that no search along one exit at a time
    can know. So all of them are judged by their expected time at last.
    """
    profile.refuse_foreign(record)
    check_batch_size(batch_size, profile)
    base = profile.base_seconds(batch_size)
    if latency is not None:
        limit = latency * base
    else:
        assert milliseconds is not None
        limit = milliseconds / 1e3
    off = torch.full((1, record.exits), math.inf, dtype=torch.float32, device="cpu")
    found = [
        curves.curve(replace(record, costs=costs), method=method, progress=progress)
        for costs in (record.costs, _nanoseconds(profile, batch_size))
    ]
    best: TimedPoint | None = None
    least = math.inf
    for limits in torch.cat([off, *(curve.front.thresholds for curve in found)]):
        replay = record.replay(limits)
        seconds = profile._expected(replay, limits, batch_size)
        least = min(least, seconds)
        if seconds <= limit and (best is None or (replay.accuracy, -seconds) > (best.accuracy, -best.seconds)):
            best = TimedPoint(
                replay.flops,
                replay.accuracy,
                limits.clone(),
                seconds=seconds,
                base_seconds=base,
                batch_size=batch_size,
            )
    if best is None:
        asked = f"`latency` is {latency}" if latency is not None else f"`milliseconds` is {milliseconds}"
        raise ValueError(
            f"{asked}; the fastest there is takes {1e3 * least:.4g} ms per batch of {batch_size}, {least / base:.4f} "
            f"of the base network's {1e3 * base:.4g} ms"
        )
    return best


def drop_unprofitable_exits(
    record: Record, profile: Profile, thresholds: Tensor | Sequence[float], batch_size: int
) -> TimedPoint:
    """These thresholds without the exits that do not pay: the one without which a batch is expected to take the
    shortest time is switched off, again and again, as long as that makes it shorter."""
    profile.refuse_foreign(record)
    check_batch_size(batch_size, profile)
    limits = threshold_vector(thresholds, record.exits).clone()

    def seconds(limits: Tensor) -> float:
        return profile._expected(record.replay(limits), limits, batch_size)

    now = seconds(limits)
    while True:
        on = (limits < math.inf).nonzero()[:, 0].tolist()
        without = {j: seconds(limits.index_fill(0, torch.tensor(j), math.inf)) for j in on}
        worst = min(without, key=without.__getitem__, default=-1)
        if worst < 0 or without[worst] >= now:
            break
        limits[worst], now = math.inf, without[worst]
    replay = record.replay(limits)
    return TimedPoint(
        replay.flops,
        replay.accuracy,
        limits,
        seconds=now,
        base_seconds=profile.base_seconds(batch_size),
        batch_size=batch_size,
    )


def _nanoseconds(profile: Profile, batch_size: int) -> Costs:
    """Per sample of a full batch."""

    def per_sample(seconds: float) -> int:
        return max(1, round(1e9 * seconds / batch_size))

    exits = range(len(profile.names))
    stages = (profile.seconds(j, batch_size) for j in range(len(profile.names) + 1))
    heads = (profile.head_seconds(j, batch_size) for j in exits)
    return Costs(tuple(map(per_sample, stages)), tuple(map(per_sample, heads)), profile.names)
