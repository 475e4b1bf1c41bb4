"""Which exits are worth keeping: a head behind every block is rarely best.

An exit whose threshold is +inf costs nothing at inference; but its head is fitted, stored and loaded with the others.
Selection is for the network that is shipped: fewer heads, and the stages between them joined.

A set of exits is scored by the mean, over all FLOPs budgets in a range (by default from nothing to the base network's),
of the accuracy that thresholds reach within the budget, heads counted: the area under the upper convex hull of its
points, as a fraction of the range. Budgets below the cheapest point are met by time sharing with no answer at all,
which costs nothing and is never right: the hull begins at (0, 0). So having no cheap exit is no advantage, nor is a
cheap exit that is never right, and more exits never score lower.

The search is backward elimination: it drops one exit after the other, the one without which the rest score best.
Candidates are ranked first with the thresholds as they are, the exit switched off; the best few by coordinate ascent
(see curves.py) at 21 prices, from the thresholds found before. At the end exits are swapped, one for one, as long as
that helps. The search uses at most 4,000 samples, and its result is the same every time.

Half of the record chooses the exits, and finds the thresholds of the curves that are compared in the end, each by the
whole coordinate search and from the thresholds of the chosen exits. What is reported is measured on the other half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from . import curves
from .curves import Curve
from .record import Record
from .search import (
    Points,
    Search,
    best_at_prices,
    concatenate,
    default_thresholds,
    hull,
    pareto_front,
    progress_bar,
)

__all__ = ["Selection", "mean_accuracy", "select"]

_PRICES = 20
_SEARCH_SAMPLES = 4000  # at most, for the search; the gain is measured on all samples
_TARGETS = 200  # of the paper's search, from which the first ascent starts
_REFINED = 4  # candidates to be dropped that get thresholds of their own before one is chosen
_TOLERANCE = 0.001  # of mean accuracy: a smaller set may score lower by that
_ROUNDING = 1e-12  # of a difference between two mean accuracies


@dataclass(frozen=True, eq=False)
class Selection:
    """The exits that were chosen, and what they give on samples that did not choose them.

    Attributes:
        names: Names of the chosen exits, in the order of the network.
        exits: Their numbers.
        flops: The range of budgets.
        mean_accuracy: Of the chosen exits, over these budgets.
        mean_accuracy_of_all: Of all exits.
        curve: Of the chosen exits. Calibrate with it: its thresholds may be better than those of a new search.
        curve_of_all: Of all exits.
        record: Of the chosen exits, on the samples that did not choose.

    Example:
        >>> few = ee.select(held_out, 4)
        >>> print(few.selection)                                # the exits, and mean accuracy before and after
        >>> few.calibrate(few.selection.curve, flops=0.5)
    """

    names: tuple[str, ...]
    exits: tuple[int, ...]
    flops: tuple[float, float]
    mean_accuracy: float
    mean_accuracy_of_all: float
    curve: Curve
    curve_of_all: Curve
    record: Record

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.names, "(end)"))
        lines = [
            f"{len(self.names)} of {len(self.curve_of_all.names)} exits",
            f"{'':{width}}{'FLOPs':>9}{'accuracy':>10}",
        ]
        alone = zip((*self.names, "(end)"), self.record.flops.tolist(), self.record.accuracy.tolist(), strict=True)
        lines += [f"{name:{width}}{flops:9.4f}{accuracy:10.4f}" for name, flops, accuracy in alone]
        low, high = self.flops
        return "\n".join(
            [
                *lines,
                f"mean accuracy over FLOPs {low:g} to {high:g}: {self.mean_accuracy:.4f}, with all exits "
                f"{self.mean_accuracy_of_all:.4f}",
                f"(on {len(self.record)} samples; exits and thresholds are from as many others)",
            ]
        )


def select(
    record: Record,
    count: int | None = None,
    *,
    flops: tuple[float, float] = (0.0, 1.0),
    progress: bool = False,
) -> Selection:
    """Choose the exits of a record that are worth keeping. The top of `calibration/selection.py` describes the search.

    For a network with FastExit layers the names say which layers to keep; remove the others from its forward().

    Args:
        record: Samples that the heads were not fitted on.
        count: How many exits; None: as few as come within 0.001 of the best mean accuracy that is found.
        flops: The range of budgets that matter, as fractions of the base network's FLOPs.
        progress: Show a progress bar.

    Returns:
        The exits, and curves with and without the others.

    Raises:
        ValueError: An argument is out of range, or the record has no exits or fewer than 2 samples.
    """
    if record.exits < 1 or len(record) < 2:
        raise ValueError(
            f"`record` holds {len(record)} samples at {record.exits} exits; wanted at least 2, better some thousand, "
            "and an exit to choose"
        )
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= record.exits):
        raise ValueError(f"`count` is {count!r}; wanted a number of exits, 1 to {record.exits}, or None")
    low, high = flops
    if not 0 <= low < high < math.inf:
        raise ValueError(f"`flops` is {flops!r}; wanted a range of budgets, such as (0.0, 1.0)")
    # Shuffled, since many data sets come class after class.
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(0), device="cpu")
    search_half, test_half = (record.part(half.sort().values) for half in order.tensor_split(2))
    with tqdm(desc="exit selection", unit="set", disable=not progress, leave=False) as bar:
        subsets = _SubsetSearch(record.part(order[: min(len(search_half), _SEARCH_SAMPLES)]), (low, high), bar)
        exits = subsets.search(count)
    starts = subsets.thresholds(exits)
    curve = _curve(search_half.at_exits(exits), starts[:, list(exits)], progress)
    curve_of_all = _curve(search_half, starts, progress)
    kept = test_half.at_exits(exits)
    curve, curve_of_all = curve.on(kept), curve_of_all.on(test_half)
    score, score_of_all = (mean_accuracy(each.front, low, high) for each in (curve, curve_of_all))
    return Selection(kept.names, exits, (low, high), score, score_of_all, curve, curve_of_all, kept)


def mean_accuracy(points: Points, low: float = 0.0, high: float = 1.0) -> float:
    """The mean over FLOPs budgets from `low` to `high`, by time sharing between the points, and with no answer."""
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    no_answer = Points(zero, zero, torch.empty_like(points.thresholds[:1]))
    points = concatenate([no_answer, points])
    front = points.pick(pareto_front(points))
    flops, accuracy, _ = front.pick(hull(front))
    x = numpy.array([low, *(value for value in flops.tolist() if low < value < high), high])
    y = numpy.interp(x, flops.numpy(), accuracy.numpy())
    return float(((y[1:] + y[:-1]) / 2 * (x[1:] - x[:-1])).sum() / (high - low))


def _curve(record: Record, starts: Tensor, progress: bool) -> Curve:
    """By the whole coordinate search, and by ascent from `starts` [P, M]: either may end below the other."""
    found = curves.curve(record, method="coordinate", progress=progress)
    with progress_bar(False, "", 0) as no_bar:
        search = Search(record)
        search.sort(no_bar)
        points = concatenate([found.front, search.replay(starts)])
        points = concatenate([points, search.ascend(best_at_prices(points, _PRICES), no_bar)])
    return curves.curve_of_points(record, points)


class _Evaluated(NamedTuple):
    score: float  # mean accuracy
    thresholds: Tensor  # [prices + 1, M]: the best found at each price; +inf at exits that are not in the set


Exits = tuple[int, ...]  # a set of them, by rising numbers


class _SubsetSearch:
    """The search among the sets of exits of one record, with all sets that were evaluated."""

    def __init__(self, record: Record, budgets: tuple[float, float], bar: tqdm[Any]) -> None:
        self._record, self._budgets, self._bar = record, budgets, bar
        self._evaluated: dict[Exits, _Evaluated] = {}
        with progress_bar(False, "", 0) as no_bar:
            self._search = Search(record)
            self._search.sort(no_bar)
            first = self._search.search(_TARGETS, 0, no_bar)
        self._all_exits = tuple(range(record.exits))
        self._evaluate(self._all_exits, first.thresholds)

    def search(self, count: int | None) -> Exits:
        """The best set of so many exits; None: the smallest that is close to the best."""
        exits = self._all_exits
        while len(exits) > (count or 1):
            fewer = self._drop_one(exits)
            if count is None and not self._close_to_best(fewer):
                fewer = self._swap(fewer)
                if not self._close_to_best(fewer):
                    break
            exits = fewer
        return self._swap(exits)

    def thresholds(self, exits: Exits) -> Tensor:
        """[prices + 1, M]: the best that were found at each price."""
        return self._evaluated[exits].thresholds

    def _close_to_best(self, exits: Exits) -> bool:
        return self._score(exits) >= max(each.score for each in self._evaluated.values()) - _TOLERANCE

    def _drop_one(self, exits: Exits) -> Exits:
        """The best of the sets with one exit fewer."""
        thresholds = self.thresholds(exits)
        off = thresholds.repeat(len(exits), 1, 1)
        for i, j in enumerate(exits):
            off[i, :, j] = math.inf
        points = self._search.replay(off.flatten(0, 1))
        size = len(thresholds)
        pieces = [points.pick(slice(first, first + size)) for first in range(0, len(points.flops), size)]
        estimates = [mean_accuracy(piece, *self._budgets) for piece in pieces]
        refined = sorted(range(len(exits)), key=lambda i: -estimates[i])[:_REFINED]
        candidates = [exits[:i] + exits[i + 1 :] for i in refined]
        for candidate in candidates:
            self._evaluate(candidate, thresholds)
        return max(candidates, key=self._score)

    def _swap(self, exits: Exits) -> Exits:
        """The set, or a better one of the same size, after swapping exits one for one as long as that helps."""
        improved = True
        while improved:
            improved = False
            for more in self._with_one_more(exits):
                if self._score(more) <= self._score(exits) + _ROUNDING:
                    break  # a subset does not score higher than its set, and the next ones score lower
                other = self._drop_one(more)
                if self._score(other) > self._score(exits) + _ROUNDING:
                    exits, improved = other, True
                    break
        return exits

    def _with_one_more(self, exits: Exits) -> list[Exits]:
        """The sets with one exit more, by falling score."""
        candidates = [tuple(sorted((*exits, j))) for j in self._all_exits if j not in exits]
        for candidate in candidates:
            self._evaluate(candidate, self.thresholds(exits))
        return sorted(candidates, key=self._score, reverse=True)

    def _score(self, exits: Exits) -> float:
        return self._evaluated[exits].score

    def _evaluate(self, exits: Exits, starts: Tensor) -> None:
        """By coordinate ascent from `starts` [P, M], once for each set."""
        if exits in self._evaluated:
            return
        columns = list(exits)
        search = Search(self._record.at_exits(exits))
        with progress_bar(False, "", 0) as no_bar:
            search.sort(no_bar)
            points = search.replay(torch.cat([default_thresholds(len(exits)), starts[:, columns]]))
            points = concatenate([points, search.ascend(best_at_prices(points, _PRICES), no_bar)])
        thresholds = torch.full((_PRICES + 1, self._record.exits), math.inf, dtype=torch.float32, device="cpu")
        thresholds[:, columns] = best_at_prices(points, _PRICES)
        self._evaluated[exits] = _Evaluated(mean_accuracy(points, *self._budgets), thresholds)
        self._bar.update(1)
