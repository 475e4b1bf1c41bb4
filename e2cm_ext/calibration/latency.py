"""Thresholds by time: the most accurate ones within a time limit, and exits that cost more time than they save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..heads.thresholds import threshold_vector
from ..stages.flops import Costs
from .curves import Method, OperatingPoint, curve
from .profile import Profile, check_batch_size
from .record import Record

__all__ = ["TimedPoint", "drop_unprofitable_exits", "fastest"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TimedPoint(OperatingPoint):
    """Thresholds, and the time that a batch is expected to take under them.

    Attributes:
        seconds: Expected time of a batch.
        base_seconds: Time of the network without any exit.
        batch_size: Samples of the batch.

    Example:
        >>> point = ee.calibrate(held_out, latency=0.5, batch_size=128)
        >>> point.latency                               # 0.5 or less
        >>> print(point)
    """

    seconds: float
    base_seconds: float
    batch_size: int

    @property
    def latency(self) -> float:
        """Expected time, as a fraction of the base network's."""
        return self.seconds / self.base_seconds

    def __str__(self) -> str:
        return (
            f"{super().__str__()}, {1e3 * self.seconds:.4g} ms per batch of {self.batch_size} "
            f"({self.latency:.4f} of the base network's)"
        )


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
    """Find the most accurate thresholds whose expected time per batch is within a limit.

    Candidates are the front of the curve over FLOPs, and the front of a curve over the time that stages and exit steps
    take per sample at the full batch size. Smaller batches take longer per sample, which a search along one exit at a
    time cannot know: so all candidates are compared by their expected time at the end.

    Args:
        record: Calibration samples.
        profile: Times of stages and exit steps.
        latency: The limit, as a fraction of the base network's time.
        milliseconds: The limit, if `latency` is None.
        batch_size: Samples per batch.
        method: Of the threshold search, see `curve`.
        progress: Show a progress bar.

    Raises:
        ValueError: No thresholds are so fast, or the profile does not fit.
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
    curves = [
        curve(replace(record, costs=costs), method=method, progress=progress)
        for costs in (record.costs, _nanoseconds(profile, batch_size))
    ]
    best: TimedPoint | None = None
    least = math.inf
    for limits in torch.cat([off, *(each.front.thresholds for each in curves)]):
        point = _timed_point(record, profile, limits, batch_size)
        least = min(least, point.seconds)
        better = best is None or (point.accuracy, -point.seconds) > (best.accuracy, -best.seconds)
        if point.seconds <= limit and better:
            best = point
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
    """Switch off the exits that cost more time than they save.

    The exit without which a batch is expected to take the shortest time is switched off, again and again, as long as
    that makes it shorter.

    Args:
        record: Calibration samples.
        profile: Times of stages and exit steps.
        thresholds: [M].
        batch_size: Samples per batch.

    Returns:
        The thresholds, with +inf at the exits that were switched off.

    Raises:
        ValueError: The profile does not fit.
    """
    profile.refuse_foreign(record)
    check_batch_size(batch_size, profile)
    limits = threshold_vector(thresholds, record.exits).clone()
    point = _timed_point(record, profile, limits, batch_size)
    while True:
        active = (limits < math.inf).nonzero()[:, 0].tolist()
        if not active:
            return point
        fewer = (limits.index_fill(0, torch.tensor(j), math.inf) for j in active)
        best = min((_timed_point(record, profile, each, batch_size) for each in fewer), key=lambda p: p.seconds)
        if best.seconds >= point.seconds:
            return point
        point, limits = best, best.thresholds


def _timed_point(record: Record, profile: Profile, thresholds: Tensor, batch_size: int) -> TimedPoint:
    replay = record.replay(thresholds)
    return TimedPoint(
        replay.flops,
        replay.accuracy,
        thresholds.clone(),
        seconds=profile.expected_seconds_of(replay, thresholds, batch_size),
        base_seconds=profile.base_seconds(batch_size),
        batch_size=batch_size,
    )


def _nanoseconds(profile: Profile, batch_size: int) -> Costs:
    """Times per sample of a full batch, as costs for the threshold search."""

    def per_sample(seconds: float) -> int:
        return max(1, round(1e9 * seconds / batch_size))

    exits = range(len(profile.names))
    stages = (profile.seconds(j, batch_size) for j in range(len(profile.names) + 1))
    heads = (profile.head_seconds(j, batch_size) for j in exits)
    return Costs(tuple(map(per_sample, stages)), tuple(map(per_sample, heads)), profile.names)
