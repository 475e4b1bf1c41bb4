"""Figures of curves and records, with matplotlib.

Nothing else in the package needs matplotlib, so it is imported only to draw. `Curve.plot` and `Record.plot` call this
module; it knows curves and records only by what it draws of them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..stages.flops import Costs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CurveData",
    "PointData",
    "RecordData",
    "Times",
    "draw_accuracy",
    "draw_certainty",
    "draw_curve",
    "draw_exits",
    "draw_reliability",
    "plot_record",
]

Times = Tensor | Sequence[float] | Callable[[Tensor], Tensor | Sequence[float]]

_BASE_STYLE: dict[str, Any] = {"color": "0.4", "linewidth": 1, "linestyle": "--", "zorder": 1}  # the network itself
_BLUE, _RED = "tab:blue", "tab:red"
_MAX_COLORED_CLASSES = 10  # colours that can be told apart
_MAX_NAMED_EXITS = 13  # names that fit beside each other
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_NEEDS_MATPLOTLIB = "needs matplotlib: `pip install matplotlib`"


# ---- what is drawn --------------------------------------------------------------------------------------------------


class PointData(Protocol):
    """P threshold vectors: see `e2cm_ext.calibration.search.Points`."""

    @property
    def flops(self) -> Tensor: ...

    @property
    def accuracy(self) -> Tensor: ...

    @property
    def thresholds(self) -> Tensor: ...


class CurveData(PointData, Protocol):
    """A curve: see `e2cm_ext.calibration.Curve`."""

    @property
    def base_accuracy(self) -> float: ...

    @property
    def front(self) -> PointData: ...


class ReplayData(Protocol):
    """What samples do under some thresholds: see `e2cm_ext.calibration.Replay`."""

    @property
    def exit(self) -> Tensor: ...

    @property
    def flops(self) -> float: ...

    @property
    def accuracy(self) -> float: ...


class ReliabilityData(Protocol):
    """Accuracy by confidence: see `e2cm_ext.calibration.Reliability`."""

    @property
    def counts(self) -> Tensor: ...

    @property
    def confidence(self) -> Tensor: ...

    @property
    def accuracy(self) -> Tensor: ...

    @property
    def ece(self) -> float: ...


class RecordData(Protocol):
    """A record: see `e2cm_ext.calibration.Record`."""

    def __len__(self) -> int: ...

    @property
    def confidence(self) -> Tensor: ...

    @property
    def label(self) -> Tensor: ...

    @property
    def correct(self) -> Tensor: ...

    @property
    def accuracy(self) -> Tensor: ...

    @property
    def costs(self) -> Costs: ...

    @property
    def rule(self) -> str: ...

    @property
    def exits(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def replay(self, thresholds: Tensor, /) -> ReplayData: ...

    def reliability(self, thresholds: Tensor, /) -> ReliabilityData: ...


# ---- a curve --------------------------------------------------------------------------------------------------------


def draw_curve(curve: CurveData, ax: Axes | None, *, time: Times | None, hull: bool, **style: Any) -> Axes:
    """Draw accuracy over FLOPs or times: see Curve.plot."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"Curve.plot {_NEEDS_MATPLOTLIB}") from error
    corners: Any = curve.flops
    front: Any = curve.front.flops
    if time is not None:
        corners = _times(time, curve.thresholds)
        front = _times(time, curve.front.thresholds) if callable(time) else None
    ax = pyplot.gca() if ax is None else ax
    if hull:
        order = corners.argsort(stable=True)
        (line,) = ax.plot(corners[order].tolist(), curve.accuracy[order].tolist(), **style)
        style = {"color": line.get_color(), "alpha": 0.5}
    points, accuracy = (corners, curve.accuracy) if front is None else (front, curve.front.accuracy)
    ax.plot(points.tolist(), accuracy.tolist(), **{"marker": ".", "markersize": 4, "linestyle": "none", **style})
    _draw_base(ax, curve.base_accuracy)
    ax.set_xlabel("FLOPs, of the base network's" if time is None else "time")
    ax.set_ylabel("accuracy")
    return ax


def _times(time: Times, thresholds: Tensor) -> Tensor:
    found = torch.as_tensor(time(thresholds) if callable(time) else time, dtype=torch.float64).detach().cpu()
    if found.shape != thresholds.shape[:1]:
        raise ValueError(f"`time` gave shape {list(found.shape)}; wanted [{len(thresholds)}], one per threshold vector")
    return found


def _draw_base(ax: Axes, accuracy: float) -> None:
    """Once, however many curves of one network are drawn."""
    drawn: list[Any] = [line for line in ax.get_lines() if line.get_gid() == "base network"]
    if all(line.get_ydata()[0] != accuracy for line in drawn):
        label = "_base network" if drawn else "base network"  # legends leave out what begins with _
        ax.axhline(accuracy, gid="base network", label=label, **_BASE_STYLE)


# ---- a record -------------------------------------------------------------------------------------------------------


def plot_record(record: RecordData, thresholds: Tensor | Sequence[float]) -> Figure:
    """A figure of four panels: see Record.plot."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which would keep the figure
    except ImportError as error:
        raise ImportError(f"Record.plot {_NEEDS_MATPLOTLIB}") from error
    if len(record) == 0 or record.exits == 0:
        raise ValueError(f"`record` holds {len(record)} samples at {record.exits} exits; wanted at least one of each")
    limits = torch.as_tensor(thresholds, dtype=torch.float32).detach().cpu()
    figure = Figure(figsize=(12, 9), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    draw_accuracy(top_left, record)
    draw_exits(top_right, record, limits)
    draw_reliability(bottom_left, record, limits)
    draw_certainty(bottom_right, record, limits)
    return figure


def draw_accuracy(ax: Axes, record: RecordData) -> None:
    """Draw the accuracy of every exit over the cost of leaving there, if that were the only exit."""
    costs = record.costs
    before = torch.tensor(costs.stages[:-1], dtype=torch.float64).cumsum(0)
    alone = (before + torch.tensor(costs.heads, dtype=torch.float64)) / costs.base
    *exits, base = record.accuracy.tolist()
    ax.plot(alone.tolist(), exits, marker="o", markersize=4, linewidth=1, color=_BLUE, label="exits")
    ax.plot([1], [base], marker="*", markersize=10, linestyle="none", color="0.4", label=f"base network: {base:.4f}")
    ax.axhline(base, **_BASE_STYLE)
    ax.set_xlim(left=0)
    ax.set(title="accuracy at every exit, alone", xlabel="FLOPs, of the base network's", ylabel="accuracy")
    ax.legend()


def draw_exits(ax: Axes, record: RecordData, limits: Tensor, class_names: Sequence[str] | None = None) -> None:
    """Draw how many samples leave at each exit under thresholds `limits` [M], by class if there are few classes."""
    replay = record.replay(limits)
    positions = range(record.exits + 1)
    classes = int(record.label.max()) + 1
    if classes > _MAX_COLORED_CLASSES:
        ax.bar(positions, replay.exit.bincount(minlength=len(positions)).tolist(), color=_BLUE)
    else:
        bottom = torch.zeros(len(positions), dtype=torch.int64)
        for k in range(classes):
            counts = replay.exit[record.label == k].bincount(minlength=len(positions))
            ax.bar(
                positions,
                counts.tolist(),
                bottom=bottom.tolist(),
                label=class_names[k] if class_names else str(k),
                color=f"C{k}",
            )
            bottom += counts
        ax.legend(title="class", fontsize="small")
    ax.set(title=f"where samples leave: accuracy {replay.accuracy:.4f} at FLOPs {replay.flops:.4f}", ylabel="samples")
    _label_exits(ax, [*record.names, "(end)"], "exit; the last is the network itself")


def draw_reliability(ax: Axes, record: RecordData, limits: Tensor) -> None:
    """Draw accuracy over confidence under thresholds `limits` [M], and the number of answers in each bin."""
    ax.set(title="reliability", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    try:
        found = record.reliability(limits)
    except ValueError as error:  # no probabilities in this record
        ax.text(0.5, 0.5, textwrap.fill(str(error), 40), ha="center", va="center")
        return
    bins = len(found.counts)
    left = [b / bins for b in range(bins)]
    ax.bar(
        left, found.accuracy.nan_to_num().tolist(), 1 / bins, align="edge", color=_BLUE, alpha=0.4, edgecolor="white"
    )
    ax.plot(found.confidence.tolist(), found.accuracy.tolist(), marker="o", markersize=4, linestyle="none", color=_BLUE)
    ax.plot([0, 1], [0, 1], **_BASE_STYLE)
    for x, count in zip(left, found.counts.tolist(), strict=True):
        ax.text(x + 0.5 / bins, 0.02, f"{count or ''}", rotation="vertical", ha="center", va="bottom", fontsize="small")
    ax.set_title(f"reliability and number of answers: expected calibration error {found.ece:.4f}")


def draw_certainty(ax: Axes, record: RecordData, limits: Tensor) -> None:
    """Draw quantiles of the certainty of right and of wrong answers at every exit, and thresholds `limits` [M].

    The network itself is left out: it has no threshold, and often is so much surer that nothing else could be seen.
    """
    for correct, color, shift, label in ((True, _BLUE, -0.2, "right"), (False, _RED, 0.2, "wrong")):
        positions, levels = [], []
        for j in range(record.exits):
            certainty = record.confidence[record.correct[:, j] == correct, j].double()
            certainty = certainty[certainty.isfinite()].sort().values
            if len(certainty):
                positions.append(j + shift)
                levels.append([float(certainty[int(q * (len(certainty) - 1))]) for q in _QUANTILES])
        if positions:
            least, low, middle, high, most = zip(*levels, strict=True)
            heights = [above - below for below, above in zip(low, high, strict=True)]
            ax.vlines(positions, least, most, color=color, linewidth=min(0.8, 20 / record.exits))
            ax.bar(positions, heights, 0.36, bottom=low, color=color, label=label)
            ends = [x - 0.18 for x in positions], [x + 0.18 for x in positions]
            ax.hlines(middle, *ends, color="white", linewidth=1.5)
    finite = limits.isfinite()
    if finite.any():
        at = finite.nonzero().flatten()
        ax.hlines(limits[finite].tolist(), (at - 0.4).tolist(), (at + 0.4).tolist(), color="black", label="threshold")
    ax.set(title="certainty of right and wrong answers", ylabel=f"certainty, by the rule {record.rule!r}")
    ax.legend(title="median, half, 90%", fontsize="small", title_fontsize="small")
    _label_exits(ax, list(record.names), "exit")


def _label_exits(ax: Axes, names: list[str], numbered: str) -> None:
    """By name if there is room, else by number, under the label `numbered`."""
    if len(names) <= _MAX_NAMED_EXITS:
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    else:
        ax.set_xlabel(numbered)
