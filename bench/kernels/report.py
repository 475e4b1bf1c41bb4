"""The tables that the bench prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..markdown import table, with_spread
from .rivals import NOTES, WAYS

SHOWN = (10, 128, 16384)  # the shape whose share of the machine's limit is in the summary


def format_report(result: dict[str, Any]) -> str:
    about, points = result["provenance"], result["points"]
    parts = [
        f"{about['processor']}, {result['dtype']} features, kernels for {about['instruction_set']}, "
        f"torch {about['versions']['torch']}, {about['date'][:10]}: `{about['command']}`"
    ]
    for threads in sorted({point["threads"] for point in points}):
        parts += tables_of([point for point in points if point["threads"] == threads], threads)
    return "\n\n".join([*parts, "\n".join(summary_lines(result)), NOTES])


def tables_of(points: list[dict[str, Any]], threads: int) -> list[str]:
    """Of one number of threads: ours beside the best rival, then all ways."""
    header = ["shape", "ours µs", "best rival µs", "which", "ratio", "GB/s", "GFLOP/s", "limit", "share"]
    ways = [way for way in WAYS if any(way in point["microseconds"] for point in points)]
    rows = ([shape_name(p), *(_time(p["microseconds"].get(way)) for way in ways)] for p in points)
    title = _threads(threads)
    return [
        f"### {title}",
        table(header, map(point_row, points)),
        f"All ways, {title}, microseconds:",
        table(["shape", *ways], rows),
    ]


def point_row(point: dict[str, Any]) -> list[str]:
    limit = point["limit"]
    bound = f"{short(limit['gigabytes_per_second']['median'])} GB/s"
    if limit["by"] == "arithmetic":
        bound = f"{short(limit['gigaflops']['median'])} GFLOP/s"
    return [
        shape_name(point),
        _time(point["microseconds"]["ours"]),
        _time(point["microseconds"][point["best_rival"]]),
        point["best_rival"],
        with_spread(point["ratio"]),
        short(point["gigabytes_per_second"]),
        short(point["gigaflops"]),
        bound,
        f"{point['share_of_limit']['median']:.0%}",
    ]


def summary_lines(result: dict[str, Any]) -> Iterator[str]:
    for s in result["summary"]:
        yield (
            f"- K={s['classes']}, {_threads(s['threads'])}: against the best rival {s['mean']:.2f}x "
            f"(geometric mean of {s['shapes']} shapes), at least {s['least']:.2f}x"
        )
    for point in result["points"]:
        if (point["classes"], point["batch"], point["features"]) == SHOWN:
            share = point["share_of_limit"]
            yield (
                f"- share of the machine's limit ({point['limit']['by']}) at {shape_name(point)}, "
                f"{_threads(point['threads'])}: {share['median']:.0%} [{share['p10']:.0%}, {share['p90']:.0%}]"
            )
    calls = result["call_overhead_microseconds"].items()
    listed = ", ".join(f"{with_spread(found, 1)} µs if it {outcome}" for outcome, found in calls)
    yield f"- one call of `exit_step` on a single sample (K=10, D=64, one thread): {listed}"
    yield f"- limits measured by {result['limits_by']}"


def short(value: float) -> str:
    """Three digits, and no more zeros than needed."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f}"


def shape_name(point: dict[str, Any]) -> str:
    return f"K={point['classes']}, B={point['batch']}, D={point['features']}"


def _time(found: dict[str, float] | None) -> str:
    return "" if found is None else short(found["median"])


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
