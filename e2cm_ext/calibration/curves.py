"""From a record to thresholds: which threshold vectors are worth having, and what each of them costs and gets right.

The search is the paper's (E2CM, section 4.1): for the target FLOPs 0.000, 0.001, ... 1.000, of the base network's, a
threshold vector drawn at random; binary search at each component, alternating between the components, until the mean
FLOPs on the record meet the target; of all the vectors, those on the convex hull of FLOPs and accuracy. Points between
two of these are reached by time sharing. What the paper leaves open is ours:

- The random start is drawn as quantiles of the certainties that occur at each exit, and the binary searches halve the
  list of these. Of numbers drawn uniformly from [0, 1] few would mean anything: with K classes the largest
  probabilities may all sit near 1/K, and other certainties have no such range.
- Alternating: one step at the first exit, one at the second, and so on, round after round, each in the direction that
  the FLOPs of the whole vector ask for. An exit's range shrinks with each of its steps. Should all ranges be empty
  before the target is met, up to two rounds follow in which each exit in turn goes as near to it as it can.
- A target is met by FLOPs that are not above it and at most 0.0005 below. Few samples may allow nothing so near, and
  targets below the cheapest answer allow nothing at all: then the nearest is taken.
- A threshold lies halfway between the lowest certainty that leaves and the highest that stays; it is +inf if nobody
  leaves (the exit is off, its head costs nothing) and -inf if everybody does.
- The random numbers come from `seed`, the number of the target and that of the exit: the result is the same bits for
  any number of threads.
- Two vectors are always among the candidates: all exits off, and everybody leaves at the first exit.

method="coordinate" is ours as a whole. It goes on from there by coordinate ascent: for 101 prices of FLOPs, from
nothing to everything, it takes the vector found so far that is best at this price, and gives one exit after the other
the threshold that is best as the others are, until none moves. That yields more accuracy for the same FLOPs, and fits
the record closer: give it some thousand samples, and believe what another record says (Curve.on). With fewer than 30
samples per exit it loses on others what it gains on these: method="auto" then takes the paper's search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..ops import validation
from . import plotting
from .record import Record
from .search import Points, Search, always_there, best_at, hull, joined, pareto_front, progress_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "Method", "OperatingPoint", "curve", "curve_of"]

Method = Literal["auto", "paper", "coordinate"]

_PRICES = 100
_ENOUGH = 30  # samples per exit, for coordinate ascent
_ROUNDING = 1e-12  # of a difference between two accuracies


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """A threshold vector, and what it costs and gets right on the record it comes from.

    With `other`, time sharing: each sample is decided by `thresholds` with probability `share`, else by
    other.thresholds; `flops` and `accuracy` are those of the mixture. `thresholds` alone are cheaper than the mixture.
    """

    flops: float
    accuracy: float
    thresholds: Tensor  # [M] float32; +inf: that exit never fires
    share: float = 1.0
    other: OperatingPoint | None = None

    def __str__(self) -> str:
        text = f"accuracy {self.accuracy:.4f} at FLOPs {self.flops:.4f}"
        if self.other is None:
            return text
        return f"{text}: {self.share:.1%} of the samples by one threshold vector, the others by ({self.other})"


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """Accuracy over FLOPs: the corners of the upper convex hull of all that was searched, by rising FLOPs.

    It begins with the cheapest point and ends with the most accurate one, the cheaper of two that are equally accurate.
    FLOPs are means per sample, as fractions of the base network's.
    """

    flops: Tensor  # [P] float64
    accuracy: Tensor  # [P] float64
    thresholds: Tensor  # [P, M] float32
    base_accuracy: float  # of the network with all exits off, on the same record
    names: tuple[str, ...]  # of the exits
    rule: str
    # Also the points below the hull that nothing cheaper beats: the hull alone has wide gaps.
    front: Points = field(kw_only=True)

    def at(self, flops: float) -> OperatingPoint:
        """The point of the curve at these mean FLOPs, by time sharing if it lies between two corners.

        Beyond the end of the curve: its last point. Before its beginning: a ValueError, since no thresholds can do it.
        """
        budget = self._budget(flops)
        last = len(self.flops) - 1
        if budget >= self.flops[last]:
            return _point(self._corners, last)
        right = int(torch.searchsorted(self.flops.contiguous(), budget, right=True))
        cheap, dear = _point(self._corners, right - 1), _point(self._corners, right)
        share = (dear.flops - budget) / (dear.flops - cheap.flops)
        if share == 1:
            return cheap
        accuracy = share * cheap.accuracy + (1 - share) * dear.accuracy
        return OperatingPoint(budget, accuracy, cheap.thresholds, share, dear)

    def best_within(self, flops: float) -> OperatingPoint:
        """The most accurate single threshold vector that costs no more than `flops`, without time sharing."""
        affordable = self.front.flops <= self._budget(flops)
        return self._most_accurate(self.front.pick(affordable))

    def within(self, accuracy_drop: float) -> OperatingPoint:
        """The cheapest single threshold vector whose accuracy is no further than that below the base network's.

        That is said of the record: on other samples the drop may be larger.
        """
        if math.isnan(accuracy_drop):
            raise ValueError("`accuracy_drop` is NaN; wanted a number such as 0.01")
        wanted = self.base_accuracy - accuracy_drop
        good = self.front.pick(self.front.accuracy >= wanted - _ROUNDING)
        if not len(good.flops):
            best = self._most_accurate(self.front)
            raise ValueError(
                f"`accuracy_drop` is {accuracy_drop}; the least on this curve is "
                f"{self.base_accuracy - best.accuracy:.6g} (accuracy {best.accuracy:.4f} of {self.base_accuracy:.4f})"
            )
        return _point(good, int(good.flops.argmin()))

    def on(self, record: Record, progress: bool = False) -> Curve:
        """The same threshold vectors on another record of the same network, by rising FLOPs there.

        What was the convex hull where the thresholds were found need not be convex here.
        """
        if (record.names, record.rule) != (self.names, self.rule):
            raise ValueError(
                f"`record` has rule {record.rule!r} and exits {', '.join(record.names)}; "
                f"the curve has rule {self.rule!r} and exits {', '.join(self.names)}"
            )
        with progress_bar(progress, "replay", record.exits + 1) as bar:
            search = Search(record)
            search.sort(bar)
            corners, front = (search.replay(points.thresholds) for points in (self._corners, self.front))
            bar.update(1)
        corners = corners.pick(corners.flops.argsort(stable=True))
        front = front.pick(front.flops.argsort(stable=True))
        return Curve(*corners, float(record.accuracy[-1]), self.names, self.rule, front=front)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        time: plotting.Times | None = None,
        hull: bool = True,
        **style: Any,
    ) -> Axes:
        """Draws the curve with matplotlib into `ax` or, without one, into the current axes; returns these.

        Points are the single threshold vectors of `front`; lines between the corners of the curve are what time
        sharing reaches (hull=False leaves them out); a dashed line is the base network. style: of the lines, or of the
        points where there are no lines: label="...", color="...".

        time: draws over times in place of FLOPs, in whatever unit they are: one for every corner, or a function from
        threshold vectors [P, M] to P times. Only the function can tell the times of the points between the corners.
        """
        return plotting.draw_curve(self, ax, time=time, hull=hull, **style)

    def __repr__(self) -> str:
        return (
            f"Curve({len(self.flops)} points, FLOPs {self.flops[0]:.4f} to {self.flops[-1]:.4f}, "
            f"accuracy {self.accuracy[0]:.4f} to {self.accuracy[-1]:.4f}, base {self.base_accuracy:.4f})"
        )

    def __str__(self) -> str:
        lines = [f"{'FLOPs':>8}{'accuracy':>10}{'of base':>9}{'exits on':>10}"]
        for flops, accuracy, thresholds in zip(*map(Tensor.tolist, self._corners), strict=True):
            on = sum(threshold < math.inf for threshold in thresholds)
            lines.append(f"{flops:8.4f}{accuracy:10.4f}{accuracy - self.base_accuracy:+9.4f}{on:10d}")
        return "\n".join([*lines, f"base network: accuracy {self.base_accuracy:.4f} at FLOPs 1"])

    @property
    def _corners(self) -> Points:
        return Points(self.flops, self.accuracy, self.thresholds)

    def _budget(self, flops: float) -> float:
        if not validation.is_number(flops):
            raise TypeError(f"`flops` is {flops!r}; wanted a fraction of the base network's, such as 0.5")
        if math.isnan(flops):
            raise ValueError("`flops` is NaN; wanted a fraction of the base network's, such as 0.5")
        if flops < self.flops[0]:
            raise ValueError(
                f"`flops` is {flops}; the cheapest there is costs {float(self.flops[0]):.6g} of the base network "
                f"(accuracy {float(self.accuracy[0]):.4f})"
            )
        return float(flops)

    @staticmethod
    def _most_accurate(points: Points) -> OperatingPoint:
        """The cheapest of them, if several are."""
        best = points.pick(points.accuracy == points.accuracy.max())
        return _point(best, int(best.flops.argmin()))


def curve(
    record: Record,
    *,
    targets: int = 1000,
    seed: int = 0,
    method: Method = "auto",
    progress: bool = False,
) -> Curve:
    """The paper's search on a record, or ours that goes on from there: see the top of this file.

    There are targets + 1 of them, evenly from 0 to 1. Ctrl-C ends the search within a second, or after the vector in
    work where a million samples make that longer.
    """
    check_method(method)
    if isinstance(targets, bool) or not isinstance(targets, int) or not 1 <= targets < 2**31:
        raise ValueError(f"`targets` is {targets!r}; wanted a whole number from 1 on: 1000, as in the paper")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"`seed` is {seed!r}; wanted a whole number from 0 to 2**64 - 1")
    if method == "auto":
        method = "coordinate" if len(record) >= _ENOUGH * record.exits else "paper"
    prices = _PRICES if method == "coordinate" else 0
    with progress_bar(progress, "threshold search", record.exits + targets + 1 + (prices and prices + 1)) as bar:
        search = Search(record)
        search.sort(bar)
        points = joined([search.replay(always_there(record.exits)), search.search(targets, seed, bar)])
        if prices:
            points = joined([points, search.ascend(best_at(points, prices), bar)])
    return _curve(record, points)


def curve_of(record: Record, thresholds: Tensor, progress: bool = False) -> Curve:
    """Of the threshold vectors [P, M] that are given, and no others, on a record."""
    with progress_bar(progress, "replay", record.exits + 1) as bar:
        search = Search(record)
        search.sort(bar)
        points = search.replay(thresholds)
        bar.update(1)
    return _curve(record, points)


def _curve(record: Record, points: Points) -> Curve:
    front = points.pick(pareto_front(points))
    corners = front.pick(hull(front))
    return Curve(*corners, float(record.accuracy[-1]), record.names, record.rule, front=front)


def check_method(method: str) -> None:
    if method not in ("auto", "paper", "coordinate"):
        raise ValueError(f"`method` is {method!r}; wanted 'auto', 'paper' or 'coordinate'")


def _point(points: Points, i: int) -> OperatingPoint:
    return OperatingPoint(float(points.flops[i]), float(points.accuracy[i]), points.thresholds[i].clone())
