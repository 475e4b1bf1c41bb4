"""The command line, `e2cm`: fit, calibrate and measure a network with early exits, without Python code.

    export E2CM_NETWORK=torchvision/resnet50 E2CM_WEIGHTS=pretrained E2CM_DATA=imagenet E2CM_NORMALISE=weights
    e2cm fit resnet50.e2cm --flops 0.5
    e2cm evaluate resnet50.e2cm
    e2cm report resnet50.e2cm resnet50.html

Exit codes: 0, success; 1, the command failed, and one line says why; 2, the command line is wrong; 130, Ctrl-C.
Results go to stdout, with --json as one JSON object; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from .. import report
from ..native import build_info
from ..utils import serialization
from . import demo
from .fit_commands import calibrate, fit
from .measure_commands import bench, curve, evaluate, profile, report_command
from .options import CommandGroup, OutputFile, output_options
from .output import command_line, format_threshold, new_table, print_result, thresholds_to_json

__all__ = ["main"]


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(build_info()["version"], prog_name="e2cm")
@click.pass_context
def main(context: click.Context) -> None:
    """Early exits for trained image classifiers: images that are easy to classify leave the network early.

    \b
    Try it, in two minutes and without data of your own:
      e2cm demo
    \b
    With a network of your own, first say what it is and what data it was trained on:
      export E2CM_NETWORK='net.py:make()'  E2CM_WEIGHTS=net.pt
      export E2CM_DATA=images.npz  E2CM_NORMALISE=imagenet
    \b
    Fit a head at every exit, and find thresholds for half of the FLOPs:
      e2cm fit net.e2cm --flops 0.5
    Measure accuracy, FLOPs and time, and show them in figures:
      e2cm evaluate net.e2cm
      e2cm bench net.e2cm
      e2cm report net.e2cm net.html
    Find thresholds for another budget:
      e2cm calibrate net.e2cm --accuracy-drop 0.005
    \b
    Tab completion (bash; zsh and fish likewise), for your ~/.bashrc:
      eval "$(_E2CM_COMPLETE=bash_source e2cm)"

    Exit codes: 0 success, 1 the command failed, 2 the command line is wrong, 130 Ctrl-C.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@output_options
def info(file: Path | None, **options: Any) -> None:
    """Show what this installation has, or what a file of e2cm_ext holds.

    \b
      e2cm info
      e2cm info net.e2cm
    """
    if file is None:
        environment = report.environment()
        table = new_table("this installation", "", "", text=2)
        for name, text in environment.items():
            table.add_row(name, escape(text))
        print_result(options["as_json"], {"environment": environment, "build": build_info()}, table)
        return
    tensors, about = serialization.read(file, None)
    kind = about["kind"]
    result = {"file": str(file), "kind": kind, "format": serialization.FORMAT, "about": about}
    result["tensors"] = {name: list(value.shape) for name, value in tensors.items()}
    title = f"{file}: {kind}, format {serialization.FORMAT}, by e2cm_ext {about.get('package', '?')}"
    if kind == "EarlyExit":
        table = new_table(title, "exit", "head", "features", "threshold")
        thresholds = thresholds_to_json(tensors["thresholds"])
        for name, head, threshold in zip(about["exits"], about["heads"], thresholds, strict=True):
            features = "x".join(map(str, head["feature_shape"]))
            table.add_row(escape(name), head["kind"], features, format_threshold(threshold))
    else:
        table = new_table(title, "", "", text=2)
        for name, value in tensors.items():
            table.add_row(name, f"{value.dtype} {list(value.shape)}")
    print_result(options["as_json"], result, table)


@main.command(name="demo")
@click.option("-o", "--out", type=OutputFile(), default="e2cm-demo.html", show_default=True, help="File of the report.")
@click.option("--flops", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="The budget.")
@click.option("--small", is_flag=True, help="A smaller network, trained for a few seconds: a check that it all runs.")
@output_options
def demo_command(out: Path, flops: float, small: bool, **options: Any) -> None:
    """Train a small network on handwritten digits, add exits, measure, and write a report. Needs no data.

    \b
      e2cm demo
      e2cm demo --flops 0.1 -o cheap.html
    """
    rows = demo.run(out, flops=flops, small=small, command=command_line(), progress=not options["quiet"])
    title = f"handwritten digits, a budget of {flops:g} of the FLOPs"
    table = new_table(title, "", "accuracy", "FLOPs", "time [10%, 90%]", "exits used")
    for row in rows:
        time = "" if row.time is None else str(row.time)
        table.add_row(escape(row.name), f"{row.accuracy:.4f}", f"{row.flops:.4f}", escape(time), row.exits_used)
    result = {
        "report": str(out),
        "rows": [
            {
                "name": row.name,
                "accuracy": row.accuracy,
                "flops": row.flops,
                "time": row.time and vars(row.time),
                "exits_used": row.exits_used,
            }
            for row in rows
        ],
    }
    print_result(options["as_json"], result, table, f"\nfigures: open {out} in a browser")


for _command in (fit, calibrate, evaluate, curve, profile, bench, report_command):
    main.add_command(_command)
