"""The commands that measure a fitted network: evaluate, curve, profile, bench and report."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.markup import escape
from torch import Tensor

from .. import report
from ..data.loader import to_network
from ..utils import serialization, timing
from .options import (
    Inputs,
    OutputFile,
    data_options,
    file_argument,
    network_options,
    output_options,
    search_option,
)
from .output import bar, command_line, new_table, point_to_json, print_result

__all__ = ["bench", "curve", "evaluate", "profile", "report_command"]

_BUDGETS = tuple(i / 10 for i in range(1, 11))  # of `e2cm curve`


@click.command()
@file_argument
@network_options
@data_options("test")
@output_options
def evaluate(file: Path, **options: Any) -> None:
    """Run the network with its exits: accuracy, FLOPs, and how many samples leave at each exit.

    \b
      e2cm evaluate net.e2cm
      e2cm evaluate net.e2cm --part 2000: --json | jq .flops
    """
    inputs = Inputs.from_options(options)
    ee = inputs.load_exits(file)
    batches = inputs.batches()
    found = ee.evaluate(batches, inputs.progress)
    ee.thresholds = math.inf
    base = ee.evaluate(batches, inputs.progress)
    count = int(found.exits.sum())
    rows = list(zip((*found.names, "(the network itself)"), found.exits.tolist(), strict=True))
    result = {
        "data": inputs.data_name(),
        "samples": count,
        "accuracy": found.accuracy,
        "network_accuracy": base.accuracy,
        "flops": found.flops,
        "exits": [{"name": name, "leavers": leavers} for name, leavers in rows],
    }
    table = new_table(f"{inputs.data_name()}: {count} samples", "exit", "leave here", "share", "")
    table.columns[3].justify = "left"
    for name, leavers in rows:
        table.add_row(escape(name), str(leavers), f"{leavers / count:.1%}", bar(leavers / count))
    print_result(
        options["as_json"],
        result,
        table,
        f"\naccuracy {found.accuracy:.4f} at FLOPs {found.flops:.4f}; the network alone {base.accuracy:.4f} at 1",
    )


@click.command()
@file_argument
@network_options
@data_options("test")
@search_option
@click.option("--picture", type=OutputFile(), help="Draw the curve into this file: .svg, .png or .pdf.")
@output_options
def curve(file: Path, picture: Path | None, **options: Any) -> None:
    """Show the accuracy for FLOPs budgets of 0.1 to 1.

    Thresholds are found on one half of the samples and evaluated on the other half, so the search does not bias the
    figures.

    \b
      e2cm curve net.e2cm
      e2cm curve net.e2cm --method paper --picture paper.svg
    """
    inputs = Inputs.from_options(options)
    ee = inputs.load_exits(file)
    split = report.SplitCurve(ee, ee.record(inputs.batches(), inputs.progress), inputs.progress, options["method"])
    base, count = split.curve.base_accuracy, len(split.test_record)
    points = [(budget, split.best_within(budget)) for budget in _BUDGETS]
    if picture is not None:
        _draw(split, picture)
    table = new_table(f"{inputs.data_name()}: evaluated on {count} samples", "budget", "FLOPs", "accuracy", "")
    for budget, point in points:
        if point is None:
            table.add_row(f"{budget:.1f}", "", "", "below the cost of the first exit")
        else:
            difference = f"{point.accuracy - base:+.4f}"
            table.add_row(f"{budget:.1f}", f"{point.flops:.4f}", f"{point.accuracy:.4f}", difference)
    result = {
        "data": inputs.data_name(),
        "samples": count,
        "network_accuracy": base,
        "points": [{"budget": budget, **point_to_json(point)} for budget, point in points if point],
        "all": {"flops": split.curve.front.flops, "accuracy": split.curve.front.accuracy},
    }
    print_result(options["as_json"], result, table, f"\nthe network alone {base:.4f} at 1")


def _draw(split: report.SplitCurve, path: Path) -> None:
    report.check_matplotlib()
    from matplotlib.figure import Figure

    file_format = path.suffix[1:].lower()
    if file_format not in Figure().canvas.get_supported_filetypes():
        raise ValueError(f"--picture {path}: wanted a name that ends in .svg, .png or .pdf")
    figure = Figure(figsize=(6, 4), layout="constrained")
    split.curve.plot(figure.subplots())
    with serialization.atomic_write(path) as out:
        figure.savefig(out, format=file_format)


@click.command()
@file_argument
@network_options
@data_options("test")
@click.option(
    "--repeats", type=click.IntRange(1), default=10, show_default=True, help="How often each time is measured."
)
@click.option("--save", type=OutputFile(), help="Write the times to this file, for Profile.load.")
@output_options
def profile(file: Path, repeats: int, save: Path | None, **options: Any) -> None:
    """Measure the time of every stage and every exit on this machine, at batch sizes 1, 2, 4, ...

    \b
      e2cm profile net.e2cm -b 32 --threads 1
    """
    inputs = Inputs.from_options(options)
    ee = inputs.load_exits(file)
    images = report.first_images(inputs.batches(), options["batch_size"])
    found = ee.profile(images, options["batch_size"], repeats=repeats, progress=inputs.progress)
    if save is not None:
        found.save(save)
    table = new_table(f"microseconds per batch; {found.device}", "batches of", *map(str, found.sizes))
    columns = zip((*found.names, "(end)"), found.stages.T, strict=True)
    for j, (name, column) in enumerate(columns):
        table.add_row(escape(name), *(f"{1e6 * seconds:.0f}" for seconds in column.tolist()))
        if j < len(found.names):
            steps = found.heads[:, j].tolist()
            table.add_row("  exit step", *(f"{1e6 * seconds:.0f}" for seconds in steps), style="dim")
    result = {
        "device": found.device,
        "sizes": found.sizes,
        "names": found.names,
        "stages_seconds": found.stages,
        "exit_steps_seconds": found.heads,
    }
    print_result(options["as_json"], result, table)


@click.command()
@file_argument
@network_options
@data_options("test")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="How often each is measured.")
@click.option("--batches", type=click.IntRange(1), default=8, show_default=True, help="Number of batches in a round.")
@output_options
def bench(file: Path, rounds: int, batches: int, **options: Any) -> None:
    """Time the network with its exits against the network itself, interleaved, on the same images.

    \b
    Batch by batch, and as a stream that merges the remaining samples of several batches:
      e2cm bench net.e2cm
    One image at a time, on one thread:
      e2cm bench net.e2cm -b 1 --batches 64 --threads 1
    """
    inputs = Inputs.from_options(options)
    ee = inputs.load_exits(file)
    size = options["batch_size"]
    images = to_network(report.first_images(inputs.batches(), size * batches), inputs.model)
    image_batches = torch.split(images, size)

    def batch_by_batch(predict: Callable[[Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            for batch in image_batches:
                predict(batch)

        return run

    def stream() -> None:
        for _ in ee.predict_stream(image_batches):
            pass

    runs = {"network": batch_by_batch(inputs.model), "predict": batch_by_batch(ee.predict), "predict_stream": stream}
    with torch.inference_mode():
        device = torch.device(options["device"])
        seconds = timing.time_interleaved(runs, rounds, device=device, progress=inputs.progress)
    unlabelled = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in image_batches]
    flops_with_exits = ee.evaluate(unlabelled, progress=False).flops
    count = len(images)
    result: dict[str, Any] = {
        "images": count, "batch_size": size, "rounds": rounds, "flops": flops_with_exits, "ways": {},
    }  # fmt: skip
    title = f"{count} images in batches of {size}, {rounds} rounds, {torch.get_num_threads()} threads"
    table = new_table(title, "", "ms per image", "of the network's time", "of its FLOPs")
    for name, values in seconds.items():
        ratio = timing.ratio(values, seconds["network"])
        per_image = 1e3 * float(values.median()) / count
        flops = 1.0 if name == "network" else flops_with_exits
        result["ways"][name] = {"ms_per_image": per_image, "time": vars(ratio), "flops": flops}
        table.add_row(name, f"{per_image:.3f}", escape(str(ratio)), f"{flops:.4f}")
    print_result(options["as_json"], result, table, "median [10%, 90%] of the rounds")


@click.command(name="report")
@file_argument
@click.argument("out", metavar="OUT.html", type=OutputFile())
@network_options
@data_options("test")
@click.option("--title", help="[default: the network's name]")
@output_options
def report_command(file: Path, out: Path, title: str | None, **options: Any) -> None:
    """Write one HTML page: curves, times, exits by class, mistakes, easy and hard images.

    The page has no external resources: it can be sent as one file.

    \b
      e2cm report net.e2cm net.html
    """
    inputs = Inputs.from_options(options)
    ee = inputs.load_exits(file)
    batches = inputs.batches()
    record = report.write(
        out,
        ee,
        batches,
        title=title or f"{options['network'].rpartition('/')[2]} with early exits",
        data=inputs.data_name(),
        classes=batches.classes if batches.classes and len(batches.classes) >= ee.num_classes else None,
        restore=inputs.restore,
        batch_size=options["batch_size"],
        command=command_line(),
        progress=inputs.progress,
    )
    replay = record.replay(ee.thresholds.cpu())
    result = {"file": str(out), "bytes": out.stat().st_size, "accuracy": replay.accuracy, "flops": replay.flops}
    print_result(options["as_json"], result, f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
