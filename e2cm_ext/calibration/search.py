"""Threshold vectors of a record: the native search for them, what they cost and get right, and which are worth having.

csrc/search.h has the search itself; `curves.py` describes it.
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

__all__ = [
    "Points",
    "Search",
    "best_at_prices",
    "concatenate",
    "default_thresholds",
    "hull",
    "pareto_front",
    "progress_bar",
]

_CALL_SECONDS = 0.2  # that a native call should take: Ctrl-C and the progress bar are served between two of them


class Points(NamedTuple):
    """P threshold vectors, with their cost and accuracy on a record.

    Attributes:
        flops: [P] float64: mean FLOPs per sample, as fractions of the base network's.
        accuracy: [P] float64.
        thresholds: [P, M] float32.
    """

    flops: Tensor
    accuracy: Tensor
    thresholds: Tensor

    def pick(self, which: Tensor | Sequence[int] | slice) -> Points:
        """Some of the points: by number, mask or slice."""
        return Points(*(column[which] for column in self))


def default_thresholds(exits: int) -> Tensor:
    """[1 or 2, M]: all exits off; and, if there is an exit, all samples leave at the first."""
    thresholds = torch.full((min(2, exits + 1), exits), math.inf, dtype=torch.float32, device="cpu")
    thresholds[1:, :1] = -math.inf
    return thresholds


def best_at_prices(points: Points, prices: int) -> Tensor:
    """[prices + 1, M]: the thresholds of the best point at each price of FLOPs in accuracy, from 0 to infinity."""
    price = torch.arange(prices + 1, dtype=torch.float64, device="cpu")[:, None]
    best = ((prices - price) * points.accuracy - price * points.flops).argmax(1)
    return points.thresholds[best]


def concatenate(pieces: Sequence[Points]) -> Points:
    """The points of all pieces, in order."""
    return Points(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def pareto_front(points: Points) -> list[int]:
    """The numbers of the points that are more accurate than all cheaper ones, by rising FLOPs."""
    flops, accuracy = points.flops.tolist(), points.accuracy.tolist()
    found: list[int] = []
    for i in sorted(range(len(flops)), key=lambda i: (flops[i], -accuracy[i])):
        if not found or accuracy[i] > accuracy[found[-1]]:
            found.append(i)
    return found


def hull(front: Points) -> list[int]:
    """The numbers of the corners of the upper convex hull of a Pareto front."""
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
    """The native search on one record. Call `sort` first.

    Args:
        record: At least one sample. The native side reads its memory, which is kept here as long as that lives.
    """

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
        """Sort the certainties of every exit, which everything else needs."""
        threads = torch.get_num_threads()
        for first in range(0, self._exits, threads):
            count = min(threads, self._exits - first)
            self._native.sort(first, count, threads)
            bar.update(count)

    def search(self, targets: int, seed: int, bar: tqdm[Any]) -> Points:
        """The paper's search: [targets + 1] points for FLOPs targets evenly from 0 to 1."""

        def run_piece(first: int, count: int) -> Points:
            points = self._empty(count)
            self._native.search(first, count, targets, seed, *_addresses(points), torch.get_num_threads())
            return points

        return concatenate(_in_pieces(targets + 1, run_piece, bar))

    def ascend(self, starts: Tensor, bar: tqdm[Any]) -> Points:
        """Coordinate ascent from each of `starts` [prices + 1, M], at prices of FLOPs from 0 to infinity."""

        def run_piece(first: int, count: int) -> Points:
            points = self._empty(count)
            points.thresholds.copy_(starts[first : first + count])
            self._native.ascend(first, count, len(starts) - 1, *_addresses(points), torch.get_num_threads())
            return points

        return concatenate(_in_pieces(len(starts), run_piece, bar))

    def replay(self, thresholds: Tensor) -> Points:
        """Evaluate thresholds [P, M]."""
        points = self._empty(len(thresholds))
        points.thresholds.copy_(thresholds)
        self._native.replay(len(thresholds), *_addresses(points), torch.get_num_threads())
        return points

    def _empty(self, count: int) -> Points:
        flops, accuracy = torch.empty(2, count, dtype=torch.float64, device="cpu")
        return Points(flops, accuracy, torch.empty(count, self._exits, dtype=torch.float32, device="cpu"))


def _in_pieces(total: int, run_piece: Callable[[int, int], Points], bar: tqdm[Any]) -> list[Points]:
    """run_piece(first, count) for pieces of `total`, of such sizes that a call takes a fraction of a second."""
    found, first, threads = [], 0, torch.get_num_threads()
    count = threads
    while first < total:
        count = min(count, total - first)
        start = time.perf_counter()
        found.append(run_piece(first, count))
        seconds = time.perf_counter() - start
        bar.update(count)
        first += count
        count = max(threads, int(count * min(4.0, _CALL_SECONDS / max(seconds, 1e-9))))
    return found


def _addresses(points: Points) -> tuple[int, int, int]:
    return points.thresholds.data_ptr(), points.flops.data_ptr(), points.accuracy.data_ptr()


def progress_bar(progress: bool, what: str, total: int) -> tqdm[Any]:
    """A bar that is shown if `progress` is true, and goes when it is done."""
    return tqdm(total=total, desc=what, disable=not progress, leave=False)
