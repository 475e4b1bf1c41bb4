"""Pictures of curves and records, with matplotlib: of all of the package nothing else needs it, so only drawing asks
for it. The methods `plot` of Curve and Record lead here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .curves import Curve
    from .record import Record

__all__ = [
    "Times",
    "draw_accuracy",
    "draw_certainty",
    "draw_curve",
    "draw_exits",
    "draw_reliability",
    "of_record",
]

Times = Tensor | Sequence[float] | Callable[[Tensor], Tensor | Sequence[float]]

_BASE: dict[str, Any] = {"color": "0.4", "linewidth": 1, "linestyle": "--", "zorder": 1}  # the network itself
_BLUE, _RED = "tab:blue", "tab:red"
_FEW_CLASSES = 10  # as many colours as tell one class from the other
_FEW_NAMES = 13  # as many names as stand beside each other
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_WANTED = "needs matplotlib: `pip install matplotlib`"


# ---- a curve --------------------------------------------------------------------------------------------------------


def draw_curve(curve: Curve, ax: Axes | None, *, time: Times | None, hull: bool, **style: Any) -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"Curve.plot {_WANTED}") from error
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
    there: list[Any] = [line for line in ax.get_lines() if line.get_gid() == "base network"]
    if all(line.get_ydata()[0] != accuracy for line in there):
        label = "_base network" if there else "base network"  # legends leave out what begins with _
        ax.axhline(accuracy, gid="base network", label=label, **_BASE)


# ---- a record -------------------------------------------------------------------------------------------------------


def of_record(record: Record, thresholds: Tensor | Sequence[float]) -> Figure:
    try:
        from matplotlib.figure import Figure  # not pyplot, which needs no notice of it
    except ImportError as error:
        raise ImportError(f"Record.plot {_WANTED}") from error
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


def draw_accuracy(ax: Axes, record: Record) -> None:
    """Over what it would cost to leave there if that were the only exit."""
    costs = record.costs
    before = torch.tensor(costs.stages[:-1], dtype=torch.float64).cumsum(0)
    alone = (before + torch.tensor(costs.heads, dtype=torch.float64)) / costs.base
    *exits, base = record.accuracy.tolist()
    ax.plot(alone.tolist(), exits, marker="o", markersize=4, linewidth=1, color=_BLUE, label="exits")
    ax.plot([1], [base], marker="*", markersize=10, linestyle="none", color="0.4", label=f"base network: {base:.4f}")
    ax.axhline(base, **_BASE)
    ax.set_xlim(left=0)
    ax.set(title="accuracy at every exit, alone", xlabel="FLOPs, of the base network's", ylabel="accuracy")
    ax.legend()


def draw_exits(ax: Axes, record: Record, limits: Tensor, class_names: Sequence[str] | None = None) -> None:
    replay = record.replay(limits)
    places = range(record.exits + 1)
    classes = int(record.label.max()) + 1
    if classes > _FEW_CLASSES:
        ax.bar(places, replay.exit.bincount(minlength=len(places)).tolist(), color=_BLUE)
    else:
        below = torch.zeros(len(places), dtype=torch.int64)
        for k in range(classes):
            counts = replay.exit[record.label == k].bincount(minlength=len(places))
            ax.bar(
                places,
                counts.tolist(),
                bottom=below.tolist(),
                label=class_names[k] if class_names else str(k),
                color=f"C{k}",
            )
            below += counts
        ax.legend(title="class", fontsize="small")
    ax.set(title=f"who leaves where: accuracy {replay.accuracy:.4f} at FLOPs {replay.flops:.4f}", ylabel="samples")
    _name_exits(ax, [*record.names, "(end)"], "exit; the last is the network itself")


def draw_reliability(ax: Axes, record: Record, limits: Tensor) -> None:
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
    ax.plot([0, 1], [0, 1], **_BASE)
    for x, count in zip(left, found.counts.tolist(), strict=True):
        ax.text(x + 0.5 / bins, 0.02, f"{count or ''}", rotation="vertical", ha="center", va="bottom", fontsize="small")
    ax.set_title(f"reliability and number of answers: expected calibration error {found.ece:.4f}")


def draw_certainty(ax: Axes, record: Record, limits: Tensor) -> None:
    """Without the network itself: it knows no threshold, and is often so much surer that nothing else could be seen."""
    for correct, color, shift, label in ((True, _BLUE, -0.2, "right"), (False, _RED, 0.2, "wrong")):
        places, levels = [], []
        for j in range(record.exits):
            certainty = record.confidence[record.correct[:, j] == correct, j].double()
            certainty = certainty[certainty.isfinite()].sort().values
            if len(certainty):
                places.append(j + shift)
                levels.append([float(certainty[int(q * (len(certainty) - 1))]) for q in _QUANTILES])
        if places:
            least, low, middle, high, most = zip(*levels, strict=True)
            heights = [above - below for below, above in zip(low, high, strict=True)]
            ax.vlines(places, least, most, color=color, linewidth=min(0.8, 20 / record.exits))
            ax.bar(places, heights, 0.36, bottom=low, color=color, label=label)
            ax.hlines(middle, [x - 0.18 for x in places], [x + 0.18 for x in places], color="white", linewidth=1.5)
    on = limits.isfinite()
    if on.any():
        at = on.nonzero().flatten()
        ax.hlines(limits[on].tolist(), (at - 0.4).tolist(), (at + 0.4).tolist(), color="black", label="threshold")
    ax.set(title="certainty of right and wrong answers", ylabel=f"certainty, by the rule {record.rule!r}")
    ax.legend(title="median, half, 90%", fontsize="small", title_fontsize="small")
    _name_exits(ax, list(record.names), "exit")


def _name_exits(ax: Axes, names: list[str], numbered: str) -> None:
    """By name if there is room, else by number."""
    if len(names) <= _FEW_NAMES:
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    else:
        ax.set_xlabel(numbered)
