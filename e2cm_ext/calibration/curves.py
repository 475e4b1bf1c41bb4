"""From a record to a curve of accuracy over FLOPs: which threshold vectors are worth having, and what each gives.

The search is the paper's (E2CM, section 4.1). For each of the target FLOPs 0.000, 0.001, ... 1.000, as fractions of the
base network's, a threshold vector is drawn at random; then binary search at each component, alternating between the
components, until the mean FLOPs on the record meet the target. Of all these vectors, those on the convex hull of FLOPs
and accuracy are kept. Points between two of them are reached by time sharing. The paper leaves these details open:

- The random start is drawn as quantiles of the certainties that occur at each exit, and the binary searches halve the
  list of these. Uniform numbers from [0, 1] would rarely be useful: with K classes the largest probabilities may all be
  near 1/K, and other certainties have no such range.
- Alternating means: one step at the first exit, one at the second, and so on, round after round, each in the direction
  that the FLOPs of the whole vector ask for. An exit's range shrinks with each of its steps. If all ranges are empty
  before the target is met, up to two rounds follow in which each exit goes as near to it as it can.
- A target is met by FLOPs that are not above it and at most 0.0005 below. Few samples may allow nothing so near, and
  targets below the cheapest vector allow nothing at all: then the nearest is taken.
- A threshold lies halfway between the lowest certainty that leaves and the highest that stays. It is +inf if no sample
  leaves (the exit is off, its head costs nothing), and -inf if all do.
- The random numbers come from `seed`, the number of the target and that of the exit: the result is the same, bit for
  bit, for any number of threads.
- Two vectors are always candidates: all exits off, and all samples leave at the first exit.

method="coordinate" is not the paper's. It goes on from there by coordinate ascent: for 101 prices of FLOPs in accuracy,
from 0 to infinity, it takes the vector found so far that is best at this price, and sets one exit after the other to
the threshold that is best with the others fixed, until nothing changes. That gives more accuracy for the same FLOPs,
but overfits the record more: give it some thousand samples, and trust the figures of another record (Curve.on). With
fewer than 30 samples per exit it loses on other samples what it gains on these: method="auto" then takes the paper's
search.
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "Method", "OperatingPoint", "check_method", "curve", "curve_of_points", "curve_of_thresholds"]

Method = Literal["auto", "paper", "coordinate"]

_PRICES = 100
_SAMPLES_PER_EXIT = 30  # that coordinate ascent needs
_ROUNDING = 1e-12  # of a difference between two accuracies


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """A threshold vector, with its cost and accuracy on the record that it comes from.

    Attributes:
        flops: Mean FLOPs per sample, as a fraction of the base network's.
        accuracy: Share of right predictions.
        thresholds: [M] float32; +inf: that exit never fires.
        probability: With `other`: of a sample to be decided by `thresholds`; 1 without.
        other: With time sharing, the point whose thresholds decide the rest of the samples. `flops` and `accuracy` are
            those of the mixture; `thresholds` alone are cheaper.

    Example:
        >>> point = curve.best_within(0.5)              # the most accurate at half the FLOPs, or less
        >>> print(point)
        accuracy 0.9130 at FLOPs 0.4998
        >>> ee.thresholds = point.thresholds
    """

    flops: float
    accuracy: float
    thresholds: Tensor
    probability: float = 1.0
    other: OperatingPoint | None = None

    def __str__(self) -> str:
        text = f"accuracy {self.accuracy:.4f} at FLOPs {self.flops:.4f}"
        if self.other is None:
            return text
        return f"{text}: {self.probability:.1%} of the samples by one threshold vector, the others by ({self.other})"


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """Accuracy over FLOPs: the corners of the upper convex hull of all threshold vectors that were searched.

    Corners rise in FLOPs and accuracy, from the cheapest vector to the most accurate one. FLOPs are means per sample,
    as fractions of the base network's.

    Attributes:
        flops: [P] float64.
        accuracy: [P] float64.
        thresholds: [P, M] float32.
        base_accuracy: Accuracy of the network with all exits off, on the same record.
        names: Names of the exits.
        rule: Name of the rule.
        front: All Pareto-optimal threshold vectors, also those below the hull: between its corners are wide gaps.

    Example:
        >>> curve = ee.curve(held_out)
        >>> print(curve)                                # a table of the corners
        >>> curve.best_within(0.5).accuracy             # at half the FLOPs
        >>> curve.within(0.01).flops                    # cost of losing at most 0.01 of accuracy
        >>> curve.on(ee.record(test)).plot()            # the same thresholds on other samples
    """

    flops: Tensor
    accuracy: Tensor
    thresholds: Tensor
    base_accuracy: float
    names: tuple[str, ...]
    rule: str
    front: Points = field(kw_only=True)

    def at(self, flops: float) -> OperatingPoint:
        """Return the point of the curve at these mean FLOPs, by time sharing if it lies between two corners.

        Args:
            flops: A fraction of the base network's. Beyond the end of the curve: its last point.

        Raises:
            ValueError: No thresholds are so cheap.
        """
        budget = self._checked_budget(flops)
        last = len(self.flops) - 1
        if budget >= self.flops[last]:
            return _operating_point(self._corners, last)
        right = int(torch.searchsorted(self.flops.contiguous(), budget, right=True))
        cheap, costly = _operating_point(self._corners, right - 1), _operating_point(self._corners, right)
        probability = (costly.flops - budget) / (costly.flops - cheap.flops)
        if probability == 1:
            return cheap
        accuracy = probability * cheap.accuracy + (1 - probability) * costly.accuracy
        return OperatingPoint(budget, accuracy, cheap.thresholds, probability, costly)

    def best_within(self, flops: float) -> OperatingPoint:
        """Return the most accurate single threshold vector within a budget, without time sharing.

        Args:
            flops: The most that it may cost, as a fraction of the base network's.

        Raises:
            ValueError: No thresholds are so cheap.
        """
        affordable = self.front.flops <= self._checked_budget(flops)
        return self._most_accurate(self.front.pick(affordable))

    def within(self, accuracy_drop: float) -> OperatingPoint:
        """Return the cheapest single threshold vector that loses no more accuracy than that.

        Args:
            accuracy_drop: The most that accuracy may be below the base network's, on this record. On other samples
                the drop may be larger.

        Raises:
            ValueError: All thresholds lose more.
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
        return _operating_point(good, int(good.flops.argmin()))

    def on(self, record: Record, progress: bool = False) -> Curve:
        """Evaluate the same threshold vectors on another record of the same network.

        Args:
            record: Samples that the thresholds were not found on.
            progress: Show a progress bar.

        Returns:
            A curve by rising FLOPs on that record, where it need not be convex.

        Raises:
            ValueError: The record has other exits or another rule.
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
        """Draw the curve with matplotlib.

        Points are the single threshold vectors of `front`. Lines between the corners are what time sharing reaches. A
        dashed line is the base network.

        Args:
            ax: Where to draw; None: into the current axes.
            time: Times to draw over, in place of FLOPs and in any unit: one per corner, or a function from threshold
                vectors [P, M] to P times. With the former, points between the corners are left out.
            hull: Draw the lines.
            **style: Of the lines, or of the points if there are no lines: label="...", color="...".

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
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

    def _checked_budget(self, flops: float) -> float:
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
        """The cheapest of them, if several are equally accurate."""
        best = points.pick(points.accuracy == points.accuracy.max())
        return _operating_point(best, int(best.flops.argmin()))


def curve(
    record: Record,
    *,
    targets: int = 1000,
    seed: int = 0,
    method: Method = "auto",
    progress: bool = False,
) -> Curve:
    """Search threshold vectors on a record. The top of `calibration/curves.py` describes the search.

    Ctrl-C ends it within a second, or after the current vector, which takes longer with a million samples.

    Args:
        record: The samples.
        targets: FLOPs targets, evenly from 0 to 1; there are targets + 1 of them.
        seed: Of the random starts.
        method: "paper"; "coordinate": by coordinate ascent from there (not the paper's: more accurate for the same
            FLOPs, needs many samples); or "auto": "coordinate" from 30 samples per exit on, else "paper".
        progress: Show a progress bar.

    Returns:
        The Curve.

    Raises:
        ValueError: An argument is out of range, or the record is empty.
    """
    check_method(method)
    if isinstance(targets, bool) or not isinstance(targets, int) or not 1 <= targets < 2**31:
        raise ValueError(f"`targets` is {targets!r}; wanted a whole number from 1 on: 1000, as in the paper")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"`seed` is {seed!r}; wanted a whole number from 0 to 2**64 - 1")
    if method == "auto":
        method = "coordinate" if len(record) >= _SAMPLES_PER_EXIT * record.exits else "paper"
    prices = _PRICES if method == "coordinate" else 0
    with progress_bar(progress, "threshold search", record.exits + targets + 1 + (prices and prices + 1)) as bar:
        search = Search(record)
        search.sort(bar)
        points = concatenate([search.replay(default_thresholds(record.exits)), search.search(targets, seed, bar)])
        if prices:
            points = concatenate([points, search.ascend(best_at_prices(points, prices), bar)])
    return curve_of_points(record, points)


def curve_of_thresholds(record: Record, thresholds: Tensor, progress: bool = False) -> Curve:
    """Evaluate given threshold vectors [P, M] on a record, and no others."""
    with progress_bar(progress, "replay", record.exits + 1) as bar:
        search = Search(record)
        search.sort(bar)
        points = search.replay(thresholds)
        bar.update(1)
    return curve_of_points(record, points)


def curve_of_points(record: Record, points: Points) -> Curve:
    """The curve of threshold vectors that were evaluated on this record."""
    front = points.pick(pareto_front(points))
    corners = front.pick(hull(front))
    return Curve(*corners, float(record.accuracy[-1]), record.names, record.rule, front=front)


def check_method(method: str) -> None:
    """Refuse names of methods that do not exist."""
    if method not in ("auto", "paper", "coordinate"):
        raise ValueError(f"`method` is {method!r}; wanted 'auto', 'paper' or 'coordinate'")


def _operating_point(points: Points, i: int) -> OperatingPoint:
    return OperatingPoint(float(points.flops[i]), float(points.accuracy[i]), points.thresholds[i].clone())
