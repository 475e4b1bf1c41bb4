"""The tables of a report: exits, classes, mistakes, and the comparison at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..calibration.curves import Curve, OperatingPoint
from ..calibration.profile import Profile
from ..calibration.record import Record, Replay
from ..early_exit import EarlyExit
from ..stages.flops import Costs
from ..utils.timing import Ratio
from .measurement import SplitCurve, measure_times

__all__ = ["CURRENT", "ClassRow", "ComparisonRow", "ExitRow", "MistakeRow", "PageView", "TimedPoint"]

CURRENT = "current"  # the key of the thresholds that the network came with
_TIMED_BUDGETS = (0.25, 0.5, 0.75)  # of FLOPs
_LISTED_BUDGETS = tuple(i / 10 for i in range(1, 11))
_MAX_MATRIX_CLASSES = 12  # a larger confusion matrix cannot be read
_MAX_MISTAKES = 12


@dataclass(frozen=True)
class ComparisonRow:
    """One method in the table at the top of a report.

    Attributes:
        name: Of the method.
        accuracy: On the samples of the report.
        flops: Mean FLOPs per sample, as a fraction of the network's.
        time: As a fraction of the network's; None: not measured.
        exits_used: Such as "3 of 5".
        curve: Drawn beside those of the other methods.
    """

    name: str
    accuracy: float
    flops: float
    time: Ratio | None = None
    exits_used: str = ""
    curve: Curve | None = None


@dataclass(frozen=True)
class ExitRow:
    """What happens at one exit; the last row is the network itself.

    Attributes:
        name: Of the exit.
        head: Its kind.
        threshold: As text; empty for the network itself.
        flops: Of a sample that leaves here, as a fraction of the network's.
        leavers: Number of samples that leave here.
        share: The same as a share of all samples.
        accuracy: Of the exit on these samples; None without any.
        network_accuracy: Of the network itself on the same samples.
    """

    name: str
    head: str
    threshold: str
    flops: float
    leavers: int
    share: float
    accuracy: float | None
    network_accuracy: float | None


@dataclass(frozen=True)
class ClassRow:
    """The samples of one class.

    Attributes:
        name: Of the class.
        samples: Their number.
        accuracy: With exits.
        network_accuracy: Of the network itself.
        flops: Mean FLOPs per sample, as a fraction of the network's.
        shares: Share of the samples that leave at each exit; the last is the network itself.
        histogram: `shares` as an SVG path.
    """

    name: str
    samples: int
    accuracy: float
    network_accuracy: float
    flops: float
    shares: list[float]
    histogram: str


class MistakeRow(NamedTuple):
    """A pair of classes that early exits confuse, and how many of these samples the network itself gets wrong too."""

    label: str
    prediction: str
    samples: int
    network_wrong: int


class TimedPoint(NamedTuple):
    """A threshold vector whose time was measured: its accuracy, and its time as a fraction of the network's."""

    accuracy: float
    time: Ratio


@dataclass
class PageView:
    """What the page shows of a network under its current thresholds.

    Args:
        ee: The network.
        record: What its exits say about the samples of the report.
        split: Curves from the two halves of this record.
        profile: Times of stages and exits.
        batch_size: At which times are measured and estimated.
        classes: Names of the classes.

    Attributes:
        thresholds: [M], of `ee`, on the CPU.
        replay: The record under these thresholds.
    """

    ee: EarlyExit
    record: Record
    split: SplitCurve
    profile: Profile
    batch_size: int
    classes: list[str]
    thresholds: Tensor = field(init=False)
    replay: Replay = field(init=False)

    def __post_init__(self) -> None:
        self.thresholds = self.ee.thresholds.cpu()
        self.replay = self.record.replay(self.thresholds)

    @property
    def base_accuracy(self) -> float:
        """Accuracy of the network without exits."""
        return float(self.record.accuracy[-1])

    @property
    def early_share(self) -> float:
        """Share of the samples that leave early."""
        return float(self._left_early.double().mean())

    @property
    def active_exits(self) -> int:
        """Number of exits with a threshold below infinity."""
        return int((self.thresholds < math.inf).sum())

    @property
    def listed_points(self) -> list[tuple[float, OperatingPoint | None]]:
        """FLOPs budgets, and the most accurate thresholds within each; None where none are so cheap."""
        return [(budget, self.split.best_within(budget)) for budget in _LISTED_BUDGETS]

    def timed_points(self, images: Tensor, progress: bool) -> dict[str, TimedPoint]:
        """Measure the time of the current thresholds, under the key CURRENT, and of some FLOPs budgets."""
        accuracy, vectors = {CURRENT: self.replay.accuracy}, {CURRENT: self.thresholds}
        for budget in _TIMED_BUDGETS:
            if point := self.split.best_within(budget):
                accuracy[f"FLOPs {budget:g}"], vectors[f"FLOPs {budget:g}"] = point.accuracy, point.thresholds
        times = measure_times(self.ee, images, vectors, progress=progress)
        return {name: TimedPoint(accuracy[name], time) for name, time in times.items()}

    def expected_times(self, thresholds: Tensor) -> list[float]:
        """Estimate times from the profile, for threshold vectors [P, M], as fractions of the network's."""
        base = self.profile.base_seconds(self.batch_size)
        return [
            self.profile.expected_seconds(self.split.test_record, vector, self.batch_size) / base
            for vector in thresholds
        ]

    def comparison(self, time: Ratio) -> list[ComparisonRow]:
        """The network without exits and with them, whose time is given."""
        leavers = self.replay.exit.bincount(minlength=self.record.exits + 1)[:-1]
        used = f"{int((leavers > 0).sum())} of {self.record.exits}"
        return [
            ComparisonRow("the network alone", self.base_accuracy, 1.0, Ratio(1.0, 1.0, 1.0)),
            ComparisonRow("with its exits", self.replay.accuracy, self.replay.flops, time, used),
        ]

    def exits(self) -> list[ExitRow]:
        """One row per exit, then the network itself."""
        heads = [str(head.kind).replace("_", " ") for head in self.ee.head_list()] + ["its own classifier"]
        infinite = {math.inf: "never", -math.inf: "always"}
        thresholds = [infinite.get(value, f"{value:.4f}") for value in self.thresholds.tolist()] + [""]
        flops = self._flops_at_exits.tolist()
        rows = []
        for j, name in enumerate((*self.record.names, "the network itself")):
            here = self.replay.exit == j
            count = int(here.sum())
            rows.append(
                ExitRow(
                    name,
                    heads[j],
                    thresholds[j],
                    flops[j],
                    count,
                    count / max(1, len(self.record)),
                    float(self.replay.correct[here].double().mean()) if count else None,
                    float(self.record.correct[here, -1].double().mean()) if count else None,
                )
            )
        return rows

    def class_rows(self) -> list[ClassRow]:
        """One row per class that has samples, from the fewest FLOPs to the most."""
        flops = self._flops_at_exits
        rows = []
        for k, name in enumerate(self.classes):
            members = self.record.label == k
            count = int(members.sum())
            if count:
                shares = self.replay.exit[members].bincount(minlength=self.record.exits + 1).double() / count
                rows.append(
                    ClassRow(
                        name,
                        count,
                        float(self.replay.correct[members].double().mean()),
                        float(self.record.correct[members, -1].double().mean()),
                        float(shares @ flops),
                        shares.tolist(),
                        _histogram_path(shares.tolist()),
                    )
                )
        return sorted(rows, key=lambda row: row.flops)

    def confusion(self) -> Tensor:
        """[K, K]: samples that left early; true classes in rows, predicted ones in columns."""
        k = len(self.classes)
        pairs = self.record.label[self._left_early] * k + self.replay.prediction[self._left_early].clamp(0, k - 1)
        return pairs.bincount(minlength=k * k).reshape(k, k)

    def confusion_matrix(self) -> list[list[int]] | None:
        """The same for the page; None if there are too many classes."""
        return self.confusion().tolist() if len(self.classes) <= _MAX_MATRIX_CLASSES else None

    def mistakes(self) -> list[MistakeRow]:
        """The most frequent mistakes of early exits."""
        matrix = self.confusion().fill_diagonal_(0)
        rows = []
        for index in matrix.flatten().argsort(descending=True, stable=True)[:_MAX_MISTAKES].tolist():
            label, prediction = divmod(index, len(self.classes))
            count = int(matrix[label, prediction])
            if not count:
                break
            confused = self._left_early & (self.record.label == label) & (self.replay.prediction == prediction)
            network_wrong = int((confused & ~self.record.correct[:, -1]).sum())
            rows.append(MistakeRow(self.classes[label], self.classes[prediction], count, network_wrong))
        return rows

    @property
    def _left_early(self) -> Tensor:
        return self.replay.exit < self.record.exits

    @property
    def _flops_at_exits(self) -> Tensor:
        """[M+1]: FLOPs of a sample that leaves at each exit. Exits that are off cost nothing."""
        costs = self.record.costs
        active = (self.thresholds < math.inf).tolist()
        heads = tuple(flops if on else 0 for flops, on in zip(costs.heads, active, strict=True))
        return Costs(costs.stages, heads, costs.names).fractions


def _histogram_path(shares: Sequence[float]) -> str:
    """Return an SVG path in a field of width len(shares) and height 1. The highest bar has height 1."""
    highest = max([*shares, 1e-9])
    return "".join(f"M{j + 0.1:g} 1v-{share / highest:.3g}h.8V1z" for j, share in enumerate(shares) if share)
