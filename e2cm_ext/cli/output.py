"""What commands print: tables for people, one JSON object for scripts, and the command that comes next."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..calibration.curves import OperatingPoint
from ..early_exit import EarlyExit

__all__ = [
    "bar",
    "command_line",
    "exits_to_json",
    "format_threshold",
    "new_table",
    "point_to_json",
    "print_result",
    "repeated_options",
    "thresholds_to_json",
]

_WIDTH = 100  # of a table that goes into a file or a pipe
_BAR_WIDTH = 20
# What all commands need to know about the network and its data.
_SHARED_OPTIONS = ("network", "weights", "classes", "device", "data", "normalise", "size", "root", "channels_last")
_POINT_FIELDS = ("latency", "seconds", "base_seconds", "batch_size", "risk", "epsilon", "delta", "samples")


def new_table(title: str, *columns: str, text: int = 1) -> Table:
    """Return a table without rows.

    Args:
        title: Its title.
        columns: Names of the columns.
        text: The first columns, so many, hold text; the others hold numbers.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for j, column in enumerate(columns):
        table.add_column(column, justify="left" if j < text else "right", overflow="fold")
    return table


def print_result(as_json: bool, result: Mapping[str, Any], *shown: Table | str) -> None:
    """Print `result` as JSON, or else the tables and lines of `shown`."""
    if as_json:
        click.echo(json.dumps(result, indent=1, default=_to_json, allow_nan=False))
        return
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH
    console = Console(file=sys.stdout, highlight=False, width=width)
    for item in shown:
        console.print(escape(item) if isinstance(item, str) else item, soft_wrap=isinstance(item, str))


def _to_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else vars(value) if hasattr(value, "__dict__") else str(value)


def thresholds_to_json(thresholds: Tensor) -> list[float | str]:
    """Return numbers, with "never" and "always" in place of the infinities, which JSON does not have.

    An exit with threshold "never" is off. All samples leave at an exit with threshold "always".
    """
    return [{math.inf: "never", -math.inf: "always"}.get(value, value) for value in thresholds.tolist()]


def format_threshold(threshold: float | str) -> str:
    """Return an item of thresholds_to_json as text for a table."""
    return f"{threshold:.4f}" if isinstance(threshold, float) else threshold


def point_to_json(point: OperatingPoint) -> dict[str, Any]:
    """Return an operating point as a JSON object, with the fields that depend on the kind of its budget."""
    extra = {name: getattr(point, name) for name in _POINT_FIELDS if hasattr(point, name)}
    return {
        "accuracy": point.accuracy,
        "flops": point.flops,
        "thresholds": thresholds_to_json(point.thresholds),
        **extra,
    }


def exits_to_json(ee: EarlyExit) -> list[dict[str, Any]]:
    """Return the exits of a network as JSON objects."""
    rows = zip(
        ee.exit_names, ee.head_list(), thresholds_to_json(ee.thresholds), ee.costs.fractions.tolist(), strict=False
    )
    return [
        {"name": name, "head": head.kind, "features": list(head.feature_shape), "threshold": threshold, "flops": flops}
        for name, head, threshold, flops in rows
    ]


def bar(share: float) -> str:
    """Return a bar for a share of 0 to 1; for a share above 0 it is never empty."""
    return "█" * round(_BAR_WIDTH * share) or ("▏" if share else "")


def repeated_options(options: Mapping[str, Any]) -> str:
    """Return the options of this command that the next one needs too, without those set in the environment."""
    words: list[str] = []
    context = click.get_current_context()
    for name in _SHARED_OPTIONS:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            value = options[name]
            if name == "normalise" and not isinstance(value, str):
                value = "/".join(",".join(f"{number:g}" for number in numbers) for numbers in value)
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return "".join(f" {shlex.quote(word)}" for word in words)


def command_line() -> str:
    """Return this command with the environment variables that it depends on."""
    names = sorted(name for name in os.environ if name.startswith("E2CM_") and not name.endswith("COMPLETE"))
    variables = "".join(f"{name}={shlex.quote(os.environ[name])} " for name in names)
    return variables + shlex.join(["e2cm", *click.get_current_context().obj])
