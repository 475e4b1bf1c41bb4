"""The figures of a report, as inline SVG that follows the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..calibration import plotting
from ..calibration.curves import Curve
from .view import CURRENT, PageView, TimedPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_figures"]

_MAX_NAMED_CLASSES = 10  # in a legend

# Colours that matplotlib writes, and the variables of the page in their place: it has a light and a dark scheme.
_COLOURS = {
    "#000000": "currentColor",
    "#666666": "var(--muted)",
    "#1f77b4": "var(--blue)",
    "#ff7f0e": "var(--orange)",
    "#2ca02c": "var(--green)",
    "#d62728": "var(--red)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.facecolor": "none",
    "legend.framealpha": 0,
    "axes.grid": False,
}


def draw_figures(view: PageView, curves: Mapping[str, Curve], timed: Mapping[str, TimedPoint]) -> dict[str, str]:
    """Draw all figures of the page.

    Args:
        view: What the page shows.
        curves: By name, accuracy over FLOPs. A curve with an empty name is that of `view.split`.
        timed: The points whose times were measured.

    Returns:
        By name, an <svg> element.
    """
    replay, base, thresholds = view.replay, view.base_accuracy, view.thresholds
    class_names = view.classes if len(view.classes) <= _MAX_NAMED_CLASSES else None
    early = f"{view.early_share:.0%} of {len(view.record)} samples left early"
    figures: dict[str, tuple[str, Callable[[Axes], object]]] = {
        "flops": (
            f"Accuracy over FLOPs. Current thresholds: accuracy {replay.accuracy:.4f} at {replay.flops:.4f} of the "
            f"FLOPs; the network alone: {base:.4f} at 1.",
            lambda ax: _draw_accuracy_over_flops(ax, view, curves),
        ),
        "time": (
            f"Accuracy over the time of a batch of {view.batch_size}. Current thresholds: accuracy "
            f"{replay.accuracy:.4f} at {timed[CURRENT].time.median:.3f} of the network's time.",
            lambda ax: _draw_accuracy_over_time(ax, view, timed),
        ),
        "exits": (
            f"Number of samples that leave at each exit: {early}.",
            lambda ax: plotting.draw_exits(ax, view.record, thresholds, class_names),
        ),
        "accuracy": (
            f"Accuracy if all samples left at one exit, over the cost of that exit; the network alone: {base:.4f}.",
            lambda ax: plotting.draw_accuracy(ax, view.record),
        ),
        "reliability": (
            "Accuracy over confidence.",
            lambda ax: plotting.draw_reliability(ax, view.record, thresholds),
        ),
        "certainty": (
            "Certainty of right and of wrong predictions at every exit, and its threshold.",
            lambda ax: plotting.draw_certainty(ax, view.record, thresholds),
        ),
    }
    return {
        name: _inline_svg(number, text, draw) for number, (name, (text, draw)) in enumerate(figures.items(), start=1)
    }


def _draw_accuracy_over_flops(ax: Axes, view: PageView, curves: Mapping[str, Curve]) -> None:
    for name, curve in curves.items():
        curve.plot(ax, label=name or "threshold vectors, and time sharing between them")
    ax.plot([view.replay.flops], [view.replay.accuracy], "o", markersize=8, color="tab:red", label="current thresholds")
    ax.legend()


def _draw_accuracy_over_time(ax: Axes, view: PageView, timed: Mapping[str, TimedPoint]) -> None:
    view.split.curve.plot(ax, time=view.expected_times, label="expected, from times of stages and exits")
    for label, colour, points in (
        ("measured", "tab:orange", [point for name, point in timed.items() if name != CURRENT]),
        ("measured, current thresholds", "tab:red", [timed[CURRENT]]),
    ):
        if points:
            times = [point.time for point in points]
            spread = [[time.median - time.p10 for time in times], [time.p90 - time.median for time in times]]
            x, y = [time.median for time in times], [point.accuracy for point in points]
            ax.errorbar(x, y, xerr=spread, fmt="o", markersize=6, capsize=3, color=colour, label=label)
    ax.set_xlabel("time of a batch, as a fraction of the network's")
    ax.legend()


def _inline_svg(number: int, text: str, draw: Callable[[Axes], object]) -> str:
    """Draw one figure.

    Args:
        number: Of the figure on the page; keeps its ids apart from those of the others.
        text: What it shows, for screen readers.
        draw: Draws it into axes.
    """
    from markupsafe import escape
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": str(number)}):
        figure = Figure(figsize=(5, 3.7), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title("")  # the page has its own
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)[\"')]", svg))
    # Several figures share a page: ids without a reference are removed, the others get a prefix.
    svg = re.sub(r'\bid="([^"]+)"', lambda found: f'id="p{number}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"((?:href=\"|url\()#)([\w.-]+)", rf"\1p{number}-\2", svg)
    svg = svg.replace("xlink:href", "href")
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, name)
    # matplotlib does not write black, the default fill of SVG: currentColor takes its place.
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    opening = f'<svg class="plot" role="img" aria-label="{escape(text)}" {box[0]} fill="currentColor">'
    return opening + svg[svg.index(">") + 1 :]
