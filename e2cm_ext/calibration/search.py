"""Threshold vectors of a record: the native search for them, what they cost and get right, and which are worth having.

See csrc/search.h for the search, calibration.py for what it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import native
from .record import Record

__all__ = ["Points", "Search", "always_there", "best_at", "hull", "joined", "progress_bar", "pareto_front"]

_SECONDS = 0.2  # that a native call should take: between two of them Ctrl-C is heard and the progress bar moves


class Points(NamedTuple):
    """P threshold vectors."""

    flops: Tensor  # [P] float64
    accuracy: Tensor  # [P] float64
    thresholds: Tensor  # [P, M] float32

    def pick(self, which: Tensor | Sequence[int] | slice) -> Points:
        return Points(*(column[which] for column in self))


def always_there(exits: int) -> Tensor:
    """[1 or 2, M]: nobody leaves early; everybody leaves at the first exit."""
    off = torch.full((min(2, exits + 1), exits), math.inf, dtype=torch.float32, device="cpu")
    off[1:, :1] = -math.inf
    return off


def best_at(points: Points, prices: int) -> Tensor:
    """[prices + 1, M]: the thresholds of the best point at each price."""
    price = torch.arange(prices + 1, dtype=torch.float64, device="cpu")[:, None]
    best = ((prices - price) * points.accuracy - price * points.flops).argmax(1)
    return points.thresholds[best]


def joined(pieces: Sequence[Points]) -> Points:
    return Points(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def pareto_front(points: Points) -> list[int]:
    """The points that are more accurate than all cheaper ones, by rising FLOPs."""
    flops, accuracy = points.flops.tolist(), points.accuracy.tolist()
    found: list[int] = []
    for i in sorted(range(len(flops)), key=lambda i: (flops[i], -accuracy[i])):
        if not found or accuracy[i] > accuracy[found[-1]]:
            found.append(i)
    return found


def hull(front: Points) -> list[int]:
    """The corners of the upper convex hull of points that rise in both."""
    x, y = front.flops.tolist(), front.accuracy.tolist()
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (x[b] - x[a]) * (y[i] - y[a]) < (y[b] - y[a]) * (x[i] - x[a]):
                break
            corners.pop()  # b lies on or below the line from a to i
        corners.append(i)
    return corners


# ---- the native search, in pieces -----------------------------------------------------------------------------------


class Search:
    """A record on its way through the native search, which sees it as addresses: it must not be freed."""

    def __init__(self, record: Record) -> None:
        if len(record) == 0:
            raise ValueError("`record` holds no samples; wanted at least one, better some thousand")
        self._rows, self._exits = len(record), record.exits
        self._confidence = record.confidence
        self._correct = record.correct.to(torch.uint8)
        self._stages = torch.tensor(record.costs.stages, dtype=torch.float64, device="cpu")
        self._heads = torch.tensor(record.costs.heads, dtype=torch.float64, device="cpu")
        self._native = native.ThresholdSearch(
            self._confidence.data_ptr(),
            self._correct.data_ptr(),
            self._rows,
            self._exits,
            self._stages.data_ptr(),
            self._heads.data_ptr(),
        )

    def sort(self, bar: tqdm[Any]) -> None:
        """What everything else needs first."""
        threads = torch.get_num_threads()
        for first in range(0, self._exits, threads):
            count = min(threads, self._exits - first)
            self._native.sort(first, count, threads)
            bar.update(count)

    def search(self, targets: int, seed: int, bar: tqdm[Any]) -> Points:
        """The paper's search for every target."""

        def some(first: int, count: int) -> Points:
            points = self._room(count)
            self._native.search(first, count, targets, seed, *_addresses(points), torch.get_num_threads())
            return points

        return joined(_in_pieces(targets + 1, some, bar))

    def ascend(self, starts: Tensor, bar: tqdm[Any]) -> Points:
        """Coordinate ascent from each of `starts`, at prices from nothing to everything."""

        def some(first: int, count: int) -> Points:
            points = self._room(count)
            points.thresholds.copy_(starts[first : first + count])
            self._native.ascend(first, count, len(starts) - 1, *_addresses(points), torch.get_num_threads())
            return points

        return joined(_in_pieces(len(starts), some, bar))

    def replay(self, thresholds: Tensor) -> Points:
        points = self._room(len(thresholds))
        points.thresholds.copy_(thresholds)
        self._native.replay(len(thresholds), *_addresses(points), torch.get_num_threads())
        return points

    def _room(self, count: int) -> Points:
        flops, accuracy = torch.empty(2, count, dtype=torch.float64, device="cpu")
        return Points(flops, accuracy, torch.empty(count, self._exits, dtype=torch.float32, device="cpu"))


def _in_pieces(total: int, some: Callable[[int, int], Points], bar: tqdm[Any]) -> list[Points]:
    """some(first, count) for pieces of `total`, each of so many that a call takes a fraction of a second."""
    found, first, threads = [], 0, torch.get_num_threads()
    count = threads
    while first < total:
        count = min(count, total - first)
        start = time.perf_counter()
        found.append(some(first, count))
        took = time.perf_counter() - start
        bar.update(count)
        first += count
        count = max(threads, int(count * min(4.0, _SECONDS / max(took, 1e-9))))
    return found


def _addresses(points: Points) -> tuple[int, int, int]:
    return points.thresholds.data_ptr(), points.flops.data_ptr(), points.accuracy.data_ptr()


def progress_bar(progress: bool, what: str, total: int) -> tqdm[Any]:
    return tqdm(total=total, desc=what, disable=not progress, leave=False)
