"""Markdown tables of results. Nothing but the standard library is needed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """left: the number of columns that are aligned to the left; the others are numbers."""
    alignment = [":--"] * left + ["--:"] * (len(header) - left)
    return "\n".join(row(cells) for cells in (header, alignment, *rows))


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_spread(found: Mapping[str, float], digits: int = 2) -> str:
    """A median with its 10th and 90th percentile, as README and docs write them."""
    median, p10, p90 = (f"{found[key]:.{digits}f}" for key in ("median", "p10", "p90"))
    return f"{median} [{p10}, {p90}]"
