"""The commands that write .e2cm files: fit and calibrate."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .. import data, report
from ..calibration.curves import OperatingPoint
from ..calibration.record import Record
from ..early_exit import EarlyExit
from .options import (
    Inputs,
    OutputFile,
    SampleRange,
    budget_options,
    data_options,
    file_argument,
    network_options,
    output_options,
    requested_budget,
    search_option,
    usage_error,
)
from .output import exits_to_json, point_to_json, print_result, repeated_options

__all__ = ["calibrate", "fit"]

HEADS = ("whitened_means", "class_means", "pooled_means", "auto")


@click.command()
@click.argument("out", metavar="OUT.e2cm", type=OutputFile())
@network_options
@data_options("train")
@click.option(
    "--exits", default="blocks", show_default=True,
    help="'blocks', 'all', a number (spread over the FLOPs), or names of modules, 'layer1,layer2.0'.",
)  # fmt: skip
@click.option("--head", type=click.Choice(HEADS), default="whitened_means", show_default=True, help="Kind of head.")
@click.option(
    "--rule", type=click.Choice(["confidence", "entropy"]), default="confidence", show_default=True,
    help="What is compared with a threshold.",
)  # fmt: skip
@click.option(
    "--select", type=click.IntRange(0), help="Keep only this many exits; 0: the fewest that do as well as all."
)
@click.option(
    "--held-out", type=float, default=0.1, show_default=True,
    help="Share of the samples (or their number) that is held out from fitting, to find thresholds on.",
)  # fmt: skip
@click.option("--held-out-split", help="Find thresholds on this split, and fit on all samples of --split.")
@click.option("--held-out-part", type=SampleRange(), help="Only these samples of --held-out-split.")
@budget_options
@search_option
@output_options
def fit(out: Path, **options: Any) -> None:
    """Fit a head at every exit, and write the result to OUT.e2cm.

    This takes forward passes only: no gradients, and the network is not changed. With a budget, thresholds are found
    too, on samples that are held out. Without a budget all exits are off until `e2cm calibrate` finds thresholds.

    \b
    Half of the FLOPs, from the training images (a tenth is held out):
      e2cm fit net.e2cm --flops 0.5
    A network that overfits its training images: thresholds from images that it was not trained on:
      e2cm fit net.e2cm --accuracy-drop 0.01 --held-out-split test --held-out-part :2000
      e2cm evaluate net.e2cm --part 2000:
    The method of the paper:
      e2cm fit net.e2cm --head class_means --method paper --flops 0.5
    """
    budget = requested_budget(options)
    if options["held_out_part"] and not options["held_out_split"]:
        raise usage_error("--held-out-part selects samples of --held-out-split; give both")
    inputs = Inputs.from_options(options)
    fit_batches, held_out = _fit_and_held_out(inputs, bool(budget) or options["select"] is not None)
    example, _ = next(iter(fit_batches))
    ee = EarlyExit(
        inputs.model, example[:1], exits=_parse_exits(options["exits"]), head=options["head"], rule=options["rule"]
    )
    ee.fit(fit_batches, inputs.progress)
    point, record = None, None
    if held_out is not None:
        ee, point, record = _select_and_calibrate(ee, held_out, inputs, budget)
    ee.save(out)
    result: dict[str, Any] = {
        "file": str(out),
        "fitted_on": len(fit_batches.dataset),  # type: ignore[arg-type]
        "exits": exits_to_json(ee),
        "held_out": None if record is None else len(record),
        "network_accuracy": None if record is None else float(record.accuracy[-1]),
        "point": None if point is None else point_to_json(point),
    }
    lines = [f"{out}: {len(ee.exit_names)} exits, {options['head']} fitted on {result['fitted_on']} samples"]
    file, shared = shlex.quote(str(out)), repeated_options(options)
    if point is not None and record is not None:
        lines.append(f"on {len(record)} held-out samples: {point}; the network alone {float(record.accuracy[-1]):.4f}")
        lines.append(f"next: e2cm evaluate {file}{shared}")
    else:
        lines.append(f"next: e2cm calibrate {file} --flops 0.5{shared}")
    print_result(options["as_json"], result, *lines)


def _parse_exits(text: str) -> Any:
    if text in ("blocks", "all"):
        return text
    return int(text) if text.isdecimal() else [name.strip() for name in text.split(",")]


def _fit_and_held_out(inputs: Inputs, hold_out: bool) -> tuple[data.Batches, data.Batches | None]:
    """Return the samples to fit on, and, with `hold_out`, others to find thresholds on."""
    options = inputs.options
    batches = inputs.batches()
    if not hold_out:
        return batches, None
    if options["held_out_split"]:
        return batches, inputs.batches(options["held_out_split"], options["held_out_part"] or slice(None))
    given, count = options["held_out"], len(batches.dataset)  # type: ignore[arg-type]
    share = given if given < 1 else given / count
    if not 0 < share < 1:
        raise ValueError(f"--held-out is {given:g}; wanted a share below 1, or a number below the {count} samples")
    fit_batches, held_out = data.split(batches, [1 - share, share])
    return fit_batches, held_out


def _select_and_calibrate(
    ee: EarlyExit, held_out: data.Batches, inputs: Inputs, budget: Mapping[str, Any]
) -> tuple[EarlyExit, OperatingPoint | None, Record]:
    """Select exits, if --select is given, and find thresholds, if there is a budget."""
    options = inputs.options
    record = ee.record(held_out, inputs.progress)
    if options.get("select") is not None:
        ee = ee.select(record, options["select"] or None, inputs.progress)
        record = record.at_exits(ee.exit_names)
    if not budget:
        return ee, None, record
    batch_size = options["batch_size"]
    times: dict[str, Any] = {}
    if "latency" in budget or "milliseconds" in budget:
        images = report.first_images(held_out, batch_size)
        times = {"profile": ee.profile(images, batch_size, progress=inputs.progress)}
    point = ee.calibrate(
        record, **budget, **times, batch_size=batch_size, method=options["method"], progress=inputs.progress
    )
    return ee, point, record


@click.command()
@file_argument
@network_options
@data_options("test")
@budget_options
@search_option
@click.option("-o", "--out", type=OutputFile(), help="Write here instead of to FILE.e2cm.")
@output_options
def calibrate(file: Path, out: Path | None, **options: Any) -> None:
    """Find thresholds for another budget, and write them to FILE.e2cm.

    Use samples that the exits were not fitted on. The more samples there are, the closer accuracy and FLOPs on new
    samples are to those found here. --risk gives a bound.

    \b
      e2cm calibrate net.e2cm --flops 0.3 --split test --part :2000
      e2cm calibrate net.e2cm --latency 0.5 -b 32
      e2cm calibrate net.e2cm --risk 0.01 0.05 -o safe.e2cm
    """
    budget = requested_budget(options)
    if not budget:
        raise usage_error("no budget is given; wanted --flops, --accuracy-drop, --latency, --milliseconds or --risk")
    inputs = Inputs.from_options(options)
    ee, point, record = _select_and_calibrate(inputs.load_exits(file), inputs.batches(), inputs, budget)
    assert point is not None
    target = out or file
    ee.save(target)
    network_accuracy = float(record.accuracy[-1])
    print_result(
        options["as_json"],
        {
            "file": str(target),
            "samples": len(record),
            "network_accuracy": network_accuracy,
            "point": point_to_json(point),
        },
        f"{target}: {point}; the network alone {network_accuracy:.4f}, on {len(record)} samples",
    )
