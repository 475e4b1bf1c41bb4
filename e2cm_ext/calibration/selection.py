"""Which exits are worth having: a head behind every block is rarely best.

An exit whose threshold is +inf costs nothing where a network runs; but its head is fitted, stored and loaded with the
others. Selection is for the network that is shipped: fewer heads, and stages between them joined.

A set of exits is as good as the mean, over all budgets of FLOPs in a range (from nothing to the base network's), of the
accuracy that thresholds reach within the budget, heads counted: the area under the upper convex hull of its points, as
a fraction of the range. Budgets below the cheapest answer are met by time sharing with no answer at all, which costs
nothing and is never right: the hull begins at (0, 0). So a set is not favoured for having no cheap exit, nor for having
a cheap one that knows nothing, and more exits are never worse.

The search goes backwards: from all exits it drops one after the other, that one without which the rest are best.
Candidates are judged first with the thresholds as they are, the exit switched off; the best few by coordinate ascent
(see calibration.py) at 21 prices, from the thresholds found before. At the end exits are exchanged, one for one, as
long as that helps. It runs on at most 4,000 samples, and comes out the same every time.

Half of the record chooses the exits, and finds the thresholds of the curves that are compared in the end, each from the
whole coordinate search and from the thresholds of the chosen exits; what is reported is measured on the other half.
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
from .search import Points, Search, always_there, best_at, hull, joined, pareto_front, progress_bar

__all__ = ["Selection", "mean_accuracy", "select"]

_PRICES = 20
_SAMPLES = 4000  # that the search looks at; the gain is measured on as many as there are
_TARGETS = 200  # of the paper's search, from which the first ascent starts
_CLOSE = 4  # of the candidates to be dropped, how many get thresholds of their own before one is chosen
_ENOUGH = 0.001  # of mean accuracy: a smaller set may be worse by that
_ROUNDING = 1e-12  # of a difference between two mean accuracies


@dataclass(frozen=True, eq=False)
class Selection:
    """The exits that were chosen, and what they give, on samples that did not choose them."""

    names: tuple[str, ...]  # of the exits that stay, in the order of the network
    exits: tuple[int, ...]  # their numbers
    flops: tuple[float, float]  # the range of budgets
    mean_accuracy: float  # over these budgets, of the exits that stay
    mean_accuracy_of_all: float
    curve: Curve  # of the exits that stay: calibrate with it, it may know better thresholds than a search of its own
    curve_of_all: Curve
    record: Record  # of the exits that stay, on the samples that did not choose

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
    """Chooses among the exits of a record: see the top of this file.

    count: how many are to stay; without it, as few as come within 0.001 of the best mean accuracy that is found.
    flops: the range of budgets that matter, of the base network's.

    For a network with FastExit layers the names say which of the layers to keep; to take the others out of its
    forward() is up to you.
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
    # Mixed, since many data sets come class after class.
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(0), device="cpu")
    choosing, judging = (record.part(half.sort().values) for half in order.tensor_split(2))
    with tqdm(desc="exit selection", unit="set", disable=not progress, leave=False) as bar:
        choice = _Choice(record.part(order[: min(len(choosing), _SAMPLES)]), (low, high), bar)
        exits = choice.search(count)
    starts = choice.thresholds(exits)
    of_few = _curve(choosing.at_exits(exits), starts[:, list(exits)], progress)
    of_all = _curve(choosing, starts, progress)
    kept = judging.at_exits(exits)
    of_all, of_few = of_all.on(judging), of_few.on(kept)
    worth, worth_of_all = (mean_accuracy(curve.front, low, high) for curve in (of_few, of_all))
    return Selection(kept.names, exits, (low, high), worth, worth_of_all, of_few, of_all, kept)


def mean_accuracy(points: Points, low: float = 0.0, high: float = 1.0) -> float:
    """Over budgets of FLOPs from `low` to `high`, by time sharing between the points, and with no answer at all."""
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    nothing = Points(zero, zero, torch.empty_like(points.thresholds[:1]))
    every = joined([nothing, points])
    front = every.pick(pareto_front(every))
    flops, accuracy, _ = front.pick(hull(front))
    x = numpy.array([low, *(value for value in flops.tolist() if low < value < high), high])
    y = numpy.interp(x, flops.numpy(), accuracy.numpy())
    return float(((y[1:] + y[:-1]) / 2 * (x[1:] - x[:-1])).sum() / (high - low))


def _curve(record: Record, starts: Tensor, progress: bool) -> Curve:
    """By the whole coordinate search, and from `starts` [P, M]: an ascent can end below what others have reached."""
    found = curves.curve(record, method="coordinate", progress=progress)
    with progress_bar(False, "", 0) as quiet:
        search = Search(record)
        search.sort(quiet)
        points = joined([found.front, search.replay(starts)])
        points = joined([points, search.ascend(best_at(points, _PRICES), quiet)])
    front = points.pick(pareto_front(points))
    return Curve(*front.pick(hull(front)), found.base_accuracy, found.names, found.rule, front=front)


class _Tried(NamedTuple):
    worth: float  # mean accuracy
    thresholds: Tensor  # [prices + 1, M]: the best found at each price; +inf at exits that are not in the set


Exits = tuple[int, ...]  # a set of them, by rising numbers


class _Choice:
    """The search among the sets of exits of one record, and all that it has tried."""

    def __init__(self, record: Record, budgets: tuple[float, float], bar: tqdm[Any]) -> None:
        self._record, self._budgets, self._bar = record, budgets, bar
        self._tried: dict[Exits, _Tried] = {}
        with progress_bar(False, "", 0) as quiet:
            self._all = Search(record)
            self._all.sort(quiet)
            first = self._all.search(_TARGETS, 0, quiet)
        self._everything = tuple(range(record.exits))
        self._try(self._everything, first.thresholds)

    def search(self, count: int | None) -> Exits:
        """The best set of so many exits, or the smallest that is good enough."""
        exits = self._everything
        while len(exits) > (count or 1):
            fewer = self._without_one(exits)
            if count is None and not self._good_enough(fewer):
                fewer = self._exchanged(fewer)
                if not self._good_enough(fewer):
                    break
            exits = fewer
        return self._exchanged(exits)

    def thresholds(self, exits: Exits) -> Tensor:
        """[prices + 1, M]: the best that were found at each price."""
        return self._tried[exits].thresholds

    def _good_enough(self, exits: Exits) -> bool:
        return self._worth(exits) >= max(tried.worth for tried in self._tried.values()) - _ENOUGH

    def _without_one(self, exits: Exits) -> Exits:
        """The best of the sets with one exit fewer."""
        thresholds = self.thresholds(exits)
        off = thresholds.repeat(len(exits), 1, 1)
        for i, j in enumerate(exits):
            off[i, :, j] = math.inf
        points = self._all.replay(off.flatten(0, 1))
        size = len(thresholds)
        pieces = [points.pick(slice(first, first + size)) for first in range(0, len(points.flops), size)]
        guesses = [mean_accuracy(piece, *self._budgets) for piece in pieces]
        likely = sorted(range(len(exits)), key=lambda i: -guesses[i])[:_CLOSE]
        fewer = [exits[:i] + exits[i + 1 :] for i in likely]
        for each in fewer:
            self._try(each, thresholds)
        return max(fewer, key=self._worth)

    def _exchanged(self, exits: Exits) -> Exits:
        """The set, or one that is better, after exchanging exits one for one as long as that helps."""
        improved = True
        while improved:
            improved = False
            for more in self._with_one_more(exits):
                if self._worth(more) <= self._worth(exits) + _ROUNDING:
                    break  # fewer exits are not better than more, and the others come behind
                other = self._without_one(more)
                if self._worth(other) > self._worth(exits) + _ROUNDING:
                    exits, improved = other, True
                    break
        return exits

    def _with_one_more(self, exits: Exits) -> list[Exits]:
        """The best of them first."""
        more = [tuple(sorted((*exits, j))) for j in self._everything if j not in exits]
        for each in more:
            self._try(each, self.thresholds(exits))
        return sorted(more, key=self._worth, reverse=True)

    def _worth(self, exits: Exits) -> float:
        return self._tried[exits].worth

    def _try(self, exits: Exits, starts: Tensor) -> None:
        if exits in self._tried:
            return
        columns = list(exits)
        search = Search(self._record.at_exits(exits))
        with progress_bar(False, "", 0) as quiet:
            search.sort(quiet)
            points = search.replay(torch.cat([always_there(len(exits)), starts[:, columns]]))
            points = joined([points, search.ascend(best_at(points, _PRICES), quiet)])
        thresholds = torch.full((_PRICES + 1, self._record.exits), math.inf, dtype=torch.float32, device="cpu")
        thresholds[:, columns] = best_at(points, _PRICES)
        self._tried[exits] = _Tried(mean_accuracy(points, *self._budgets), thresholds)
        self._bar.update(1)
