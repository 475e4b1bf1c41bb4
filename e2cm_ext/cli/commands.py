"""The command line, `e2cm`: everything that a trained network needs to leave early, without a line of Python.

    export E2CM_NETWORK=torchvision/resnet50 E2CM_WEIGHTS=pretrained E2CM_DATA=imagenet E2CM_NORMALISE=weights
    e2cm fit resnet50.e2cm --flops 0.5
    e2cm evaluate resnet50.e2cm
    e2cm report resnet50.e2cm resnet50.html

Exit codes: 0, all is well; 1, it could not be done, and a line says why; 2, the command line is wrong; 130, Ctrl-C.
Results go to stdout, with --json as one JSON object; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import data, report
from ..calibration.curves import OperatingPoint
from ..calibration.record import Record
from ..data.loader import to_network
from ..early_exit import EarlyExit
from ..native import build_info
from ..utils import serialization, timing
from . import demo
from .options import (
    Output,
    Part,
    Program,
    Work,
    budget,
    budget_options,
    data_options,
    network_options,
    ours,
    output_options,
    search_option,
    wrong,
)

__all__ = ["main"]

BUDGETS = tuple(i / 10 for i in range(1, 11))
HEADS = ("whitened_means", "class_means", "pooled_means", "auto")


# ---- showing --------------------------------------------------------------------------------------------------------


def _console() -> Console:
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(file=sys.stdout, highlight=False, width=wide)


def _table(title: str, *columns: str) -> Table:
    """The first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for j, column in enumerate(columns):
        table.add_column(column, justify="right" if j else "left", overflow="fold")
    return table


def _print(as_json: bool, result: Mapping[str, Any], *shown: Table | str) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1, default=_plain, allow_nan=False))
        return
    console = _console()
    for item in shown:
        console.print(escape(item) if isinstance(item, str) else item, soft_wrap=isinstance(item, str))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else vars(value) if hasattr(value, "__dict__") else str(value)


def _limits(thresholds: Tensor) -> list[float | str]:
    """JSON knows no infinity: an exit that is off fires "never", one that lets everybody out "always"."""
    return [{math.inf: "never", -math.inf: "always"}.get(limit, limit) for limit in thresholds.tolist()]


def _shown_limit(limit: float | str) -> str:
    return f"{limit:.4f}" if isinstance(limit, float) else limit


def _bar(share: float) -> str:
    return "█" * round(20 * share) or ("▏" if share else "")


def _of_point(point: OperatingPoint) -> dict[str, Any]:
    extra = {
        name: getattr(point, name)
        for name in ("latency", "seconds", "base_seconds", "batch_size", "risk", "epsilon", "delta", "samples")
        if hasattr(point, name)
    }
    return {"accuracy": point.accuracy, "flops": point.flops, "thresholds": _limits(point.thresholds), **extra}


def _of_exits(ee: EarlyExit) -> list[dict[str, Any]]:
    rows = zip(ee.exit_names, ee.head_list(), _limits(ee.thresholds), ee.costs.fractions.tolist(), strict=False)
    return [
        {"name": name, "head": head.kind, "features": list(head.feature_shape), "threshold": limit, "flops": flops}
        for name, head, limit, flops in rows
    ]


def _again(options: Mapping[str, Any], *names: str) -> str:
    """The options that the next command needs as well, but for those that stand in the environment."""
    words: list[str] = []
    context = click.get_current_context()
    for name in names:
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.COMMANDLINE:
            value = options[name]
            if name == "normalise" and not isinstance(value, str):
                value = "/".join(",".join(f"{number:g}" for number in half) for half in value)
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return "".join(f" {shlex.quote(word)}" for word in words)


SHARED = ("network", "weights", "classes", "device", "data", "normalise", "size", "root", "channels_last")


# ---- commands -------------------------------------------------------------------------------------------------------


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(build_info()["version"], prog_name="e2cm")
@click.pass_context
def main(context: click.Context) -> None:
    """Early exits for trained image classifiers: every image leaves as soon as it is recognised.

    \b
    See it work, in two minutes and without any data of yours:
      e2cm demo
    \b
    Then with a network of yours. What it is and what it was trained on is said once:
      export E2CM_NETWORK='net.py:make()'  E2CM_WEIGHTS=net.pt
      export E2CM_DATA=images.npz  E2CM_NORMALISE=imagenet
    \b
    Learn what the classes look like at every exit, and aim at half of the FLOPs:
      e2cm fit net.e2cm --flops 0.5
    See what that gives, in accuracy, in FLOPs, in time, and in pictures:
      e2cm evaluate net.e2cm
      e2cm bench net.e2cm
      e2cm report net.e2cm net.html
    Change your mind:
      e2cm calibrate net.e2cm --accuracy-drop 0.005
    \b
    Tab completion (bash; zsh and fish likewise), for your ~/.bashrc:
      eval "$(_E2CM_COMPLETE=bash_source e2cm)"

    Exit codes: 0 all is well, 1 it could not be done, 2 the command line is wrong, 130 Ctrl-C.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("out", metavar="OUT.e2cm", type=Output())
@network_options
@data_options("train")
@click.option(
    "--exits", default="blocks", show_default=True,
    help="'blocks', 'all', a number (spread over the FLOPs), or names of modules, 'layer1,layer2.0'.",
)  # fmt: skip
@click.option("--head", type=click.Choice(HEADS), default="whitened_means", show_default=True, help="What answers.")
@click.option("--rule", type=click.Choice(["confidence", "entropy"]), default="confidence", show_default=True)
@click.option("--select", type=click.IntRange(0), help="Keep so many exits, the best; 0: as few as do as well as all.")
@click.option(
    "--held-out", type=float, default=0.1, show_default=True,
    help="Share of the samples (or their number) that thresholds are found on, and exits not fitted on.",
)  # fmt: skip
@click.option("--held-out-split", help="Take a split of its own for that, all of it; then all samples are fitted on.")
@click.option("--held-out-part", type=Part(), help="Only these samples of that split.")
@budget_options
@search_option
@output_options
def fit(out: Path, **options: Any) -> None:
    """Learn what the classes look like at every exit, and write it to OUT.e2cm.

    Forward passes only: nothing is trained, and the network is not changed. With a budget, thresholds are found too, on
    samples that are held out; without one all exits are off, until `e2cm calibrate` finds some.

    \b
    Half of the FLOPs, from the training images (a tenth is held out):
      e2cm fit net.e2cm --flops 0.5
    A network that knows its training images by heart: thresholds from images that it has never seen:
      e2cm fit net.e2cm --accuracy-drop 0.01 --held-out-split test --held-out-part :2000
      e2cm evaluate net.e2cm --part 2000:
    The paper's method as it stands:
      e2cm fit net.e2cm --head class_means --method paper --flops 0.5
    """
    asked = budget(options)
    if options["held_out_part"] and not options["held_out_split"]:
        raise wrong("--held-out-part is of --held-out-split; give both")
    work = Work.of(options)
    fitted_on, held_out = _fitted_on_and_held_out(work, bool(asked) or options["select"] is not None)
    example, _ = next(iter(fitted_on))
    ee = EarlyExit(work.model, example[:1], exits=_exits(options["exits"]), head=options["head"], rule=options["rule"])
    ee.fit(fitted_on, work.progress)
    point, record = None, None
    if held_out is not None:
        ee, point, record = _calibrated(ee, held_out, work, asked)
    ee.save(out)
    result: dict[str, Any] = {
        "file": str(out),
        "fitted_on": len(fitted_on.dataset),  # type: ignore[arg-type]
        "exits": _of_exits(ee),
        "held_out": None if record is None else len(record),
        "network_accuracy": None if record is None else float(record.accuracy[-1]),
        "point": None if point is None else _of_point(point),
    }
    lines = [f"{out}: {len(ee.exit_names)} exits, {options['head']} fitted on {result['fitted_on']} samples"]
    if point is not None and record is not None:
        lines.append(f"on {len(record)} others: {point}; the network alone {float(record.accuracy[-1]):.4f}")
        lines.append(f"next: e2cm evaluate {shlex.quote(str(out))}{_again(options, *SHARED)}")
    else:
        lines.append(f"next: e2cm calibrate {shlex.quote(str(out))} --flops 0.5{_again(options, *SHARED)}")
    _print(options["as_json"], result, *lines)


def _exits(text: str) -> Any:
    if text in ("blocks", "all"):
        return text
    return int(text) if text.isdecimal() else [name.strip() for name in text.split(",")]


def _fitted_on_and_held_out(work: Work, needed: bool) -> tuple[data.Batches, data.Batches | None]:
    options = work.options
    whole = work.images()
    if not needed:
        return whole, None
    if options["held_out_split"]:
        return whole, work.images(options["held_out_split"], options["held_out_part"] or slice(None))
    share, count = options["held_out"], len(whole.dataset)  # type: ignore[arg-type]
    held = share if share < 1 else share / count
    if not 0 < held < 1:
        raise ValueError(f"--held-out is {share:g}; wanted a share below 1, or a number below the {count} samples")
    fitted_on, held_out = data.split(whole, [1 - held, held])
    return fitted_on, held_out


def _calibrated(
    ee: EarlyExit, held_out: data.Batches, work: Work, asked: Mapping[str, Any]
) -> tuple[EarlyExit, OperatingPoint | None, Record]:
    """With the exits that --select wants, and the thresholds that the budget asks for."""
    options = work.options
    record = ee.record(held_out, work.progress)
    if options.get("select") is not None:
        ee = ee.select(record, options["select"] or None, work.progress)
        record = record.at_exits(ee.exit_names)
    if not asked:
        return ee, None, record
    batch_size = options["batch_size"]
    times: dict[str, Any] = {}
    if "latency" in asked or "milliseconds" in asked:
        images = report.first_images(held_out, batch_size)
        times = {"profile": ee.profile(images, batch_size, progress=work.progress)}
    point = ee.calibrate(
        record, **asked, **times, batch_size=batch_size, method=options["method"], progress=work.progress
    )
    return ee, point, record


@main.command()
@ours
@network_options
@data_options("test")
@budget_options
@search_option
@click.option("-o", "--out", type=Output(), help="Write here, not to FILE.e2cm itself.")
@output_options
def calibrate(file: Path, out: Path | None, **options: Any) -> None:
    """Find thresholds for another budget, and write them to FILE.e2cm.

    Take samples that the exits were not fitted on. What holds on these holds on new ones about as well as that many
    samples can tell; --risk says how well that is.

    \b
      e2cm calibrate net.e2cm --flops 0.3 --split test --part :2000
      e2cm calibrate net.e2cm --latency 0.5 -b 32
      e2cm calibrate net.e2cm --risk 0.01 0.05 -o safe.e2cm
    """
    asked = budget(options)
    if not asked:
        raise wrong("no budget is given; wanted --flops, --accuracy-drop, --latency, --milliseconds or --risk")
    work = Work.of(options)
    ee, point, record = _calibrated(work.load(file), work.images(), work, asked)
    assert point is not None
    target = out or file
    ee.save(target)
    result = {"file": str(target), "samples": len(record), "network_accuracy": float(record.accuracy[-1])}
    _print(
        options["as_json"],
        result | {"point": _of_point(point)},
        f"{target}: {point}; the network alone {float(record.accuracy[-1]):.4f}, on {len(record)} samples",
    )


@main.command()
@ours
@network_options
@data_options("test")
@output_options
def evaluate(file: Path, **options: Any) -> None:
    """Run the network with its exits: accuracy, FLOPs, and who leaves where.

    \b
      e2cm evaluate net.e2cm
      e2cm evaluate net.e2cm --part 2000: --json | jq .flops
    """
    work = Work.of(options)
    ee = work.load(file)
    images = work.images()
    found = ee.evaluate(images, work.progress)
    ee.thresholds = math.inf
    alone = ee.evaluate(images, work.progress)
    count = int(found.exits.sum())
    names = (*found.names, "(the network itself)")
    result = {
        "data": work.described(),
        "samples": count,
        "accuracy": found.accuracy,
        "network_accuracy": alone.accuracy,
        "flops": found.flops,
        "exits": [{"name": name, "leavers": n} for name, n in zip(names, found.exits.tolist(), strict=True)],
    }
    table = _table(f"{work.described()}: {count} samples", "exit", "leave here", "share", "")
    table.columns[3].justify = "left"
    for name, leavers in zip(names, found.exits.tolist(), strict=True):
        table.add_row(escape(name), str(leavers), f"{leavers / count:.1%}", _bar(leavers / count))
    _print(
        options["as_json"],
        result,
        table,
        f"\naccuracy {found.accuracy:.4f} at FLOPs {found.flops:.4f}; the network alone {alone.accuracy:.4f} at 1",
    )


@main.command()
@ours
@network_options
@data_options("test")
@search_option
@click.option("--picture", type=Output(), help="Draw it: .svg, .png or .pdf.")
@output_options
def curve(file: Path, picture: Path | None, **options: Any) -> None:
    """What accuracy could be had for which FLOPs.

    Thresholds are found on one half of the samples and measured on the other, so the figures are those of new samples.

    \b
      e2cm curve net.e2cm
      e2cm curve net.e2cm --method paper --picture paper.svg
    """
    work = Work.of(options)
    ee = work.load(file)
    halves = report.Halves(ee, ee.record(work.images(), work.progress), work.progress, options["method"])
    base = halves.curve.base_accuracy
    points = [(limit, halves.at(limit)) for limit in BUDGETS]
    if picture is not None:
        _draw(halves, picture)
    table = _table(f"{work.described()}: measured on {len(halves.judging)} samples", "budget", "FLOPs", "accuracy", "")
    for limit, point in points:
        if point is None:
            table.add_row(f"{limit:.1f}", "", "", "cheaper than the first exit")
        else:
            table.add_row(
                f"{limit:.1f}", f"{point.flops:.4f}", f"{point.accuracy:.4f}", f"{point.accuracy - base:+.4f}"
            )
    result = {
        "data": work.described(),
        "samples": len(halves.judging),
        "network_accuracy": base,
        "points": [{"budget": limit, **_of_point(point)} for limit, point in points if point],
        "all": {"flops": halves.curve.front.flops, "accuracy": halves.curve.front.accuracy},
    }
    _print(options["as_json"], result, table, f"\nthe network alone {base:.4f} at 1")


def _draw(halves: report.Halves, path: Path) -> None:
    report.refuse_no_matplotlib()
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in kinds:
        raise ValueError(f"--picture {path}: wanted a name that ends in .svg, .png or .pdf")
    figure = Figure(figsize=(6, 4), layout="constrained")
    halves.curve.plot(figure.subplots())
    with serialization.atomic_write(path) as out:
        figure.savefig(out, format=kind)


@main.command()
@ours
@network_options
@data_options("test")
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True)
@click.option("--save", type=Output(), help="Write the times here, to be used on another day.")
@output_options
def profile(file: Path, repeats: int, save: Path | None, **options: Any) -> None:
    """How long every stage and every exit takes on this machine, at batch sizes 1, 2, 4 ...

    \b
      e2cm profile net.e2cm -b 32 --threads 1
    """
    work = Work.of(options)
    ee = work.load(file)
    images = report.first_images(work.images(), options["batch_size"])
    found = ee.profile(images, options["batch_size"], repeats=repeats, progress=work.progress)
    if save is not None:
        found.save(save)
    table = _table(f"microseconds per batch; {found.device}", "batches of", *map(str, found.sizes))
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
    _print(options["as_json"], result, table)


@main.command()
@ours
@network_options
@data_options("test")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="How often each is measured.")
@click.option("--batches", type=click.IntRange(1), default=8, show_default=True, help="Of how many batches.")
@output_options
def bench(file: Path, rounds: int, batches: int, **options: Any) -> None:
    """Time the network with its exits against the network itself, in turns, on the same images.

    \b
    Batch by batch, and as a stream in which the survivors of many batches go on together:
      e2cm bench net.e2cm
    One image after the other, on one thread:
      e2cm bench net.e2cm -b 1 --batches 64 --threads 1
    """
    work = Work.of(options)
    ee = work.load(file)
    size = options["batch_size"]
    some = torch.split(to_network(report.first_images(work.images(), size * batches), work.model), size)

    def through(run: Callable[[Tensor], Any]) -> Callable[[], None]:
        def way() -> None:
            for images in some:
                run(images)

        return way

    def stream() -> None:
        for _ in ee.predict_stream(some):
            pass

    with torch.inference_mode():
        ways = {"network": through(work.model), "predict": through(ee.predict), "predict_stream": stream}
        seconds = timing.time_interleaved(ways, rounds, device=torch.device(options["device"]), progress=work.progress)
    spent = ee.evaluate([(images, torch.zeros(len(images), dtype=torch.int64)) for images in some], progress=False)
    count = sum(map(len, some))
    result: dict[str, Any] = {"images": count, "batch_size": size, "rounds": rounds, "flops": spent.flops, "ways": {}}
    title = f"{count} images in batches of {size}, {rounds} rounds, {torch.get_num_threads()} threads"
    table = _table(title, "", "ms per image", "of the network's time", "of its FLOPs")
    for name, values in seconds.items():
        over = timing.ratio(values, seconds["network"])
        per_image = 1e3 * float(values.median()) / count
        flops = 1.0 if name == "network" else spent.flops
        result["ways"][name] = {"ms_per_image": per_image, "time": vars(over), "flops": flops}
        table.add_row(name, f"{per_image:.3f}", escape(str(over)), f"{flops:.4f}")
    _print(options["as_json"], result, table, "median [10%, 90%] of the rounds")


@main.command(name="report")
@ours
@click.argument("out", metavar="OUT.html", type=Output())
@network_options
@data_options("test")
@click.option("--title", help="[default: the network's name]")
@output_options
def report_command(file: Path, out: Path, title: str | None, **options: Any) -> None:
    """Write one HTML page that shows everything: curves, times, who leaves where, mistakes, easy and hard images.

    The page needs nothing else: send it to somebody.

    \b
      e2cm report net.e2cm net.html
    """
    work = Work.of(options)
    ee = work.load(file)
    images = work.images()
    record = report.write(
        out,
        ee,
        images,
        title=title or f"{options['network'].rpartition('/')[2]} with early exits",
        data=work.described(),
        classes=images.classes if images.classes and len(images.classes) >= ee.num_classes else None,
        restore=work.restores,
        batch_size=options["batch_size"],
        command=_command_line(),
        progress=work.progress,
    )
    replay = record.replay(ee.thresholds.cpu())
    result = {"file": str(out), "bytes": out.stat().st_size, "accuracy": replay.accuracy, "flops": replay.flops}
    _print(options["as_json"], result, f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _command_line() -> str:
    """That of this command. What stands in the environment is a part of it."""
    names = sorted(name for name in os.environ if name.startswith("E2CM_") and not name.endswith("COMPLETE"))
    before = "".join(f"{name}={shlex.quote(os.environ[name])} " for name in names)
    return before + shlex.join(["e2cm", *click.get_current_context().obj])


@main.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@output_options
def info(file: Path | None, **options: Any) -> None:
    """What this installation can do, or what a file of ours holds.

    \b
      e2cm info
      e2cm info net.e2cm
    """
    if file is None:
        found = report.environment()
        table = _table("this installation", "", "")
        table.columns[1].justify = "left"
        for name, text in found.items():
            table.add_row(name, escape(text))
        _print(options["as_json"], {"environment": found, "build": build_info()}, table)
        return
    tensors, about = serialization.read(file, None)
    kind = about["kind"]
    result = {"file": str(file), "kind": kind, "format": serialization.FORMAT, "about": about}
    result["tensors"] = {name: list(value.shape) for name, value in tensors.items()}
    shown = _table(f"{file}: {kind}, format {serialization.FORMAT}, by e2cm_ext {about.get('package', '?')}", "", "")
    if kind == "EarlyExit":
        shown = _table(shown.title if isinstance(shown.title, str) else "", "exit", "head", "features", "threshold")
        for name, head, limit in zip(about["exits"], about["heads"], _limits(tensors["thresholds"]), strict=True):
            features = "x".join(map(str, head["feature_shape"]))
            shown.add_row(escape(name), head["kind"], features, _shown_limit(limit))
    else:
        shown.columns[1].justify = "left"
        for name, value in tensors.items():
            shown.add_row(name, f"{value.dtype} {list(value.shape)}")
    _print(options["as_json"], result, shown)


@main.command(name="demo")
@click.option("-o", "--out", type=Output(), default="e2cm-demo.html", show_default=True, help="Where the report goes.")
@click.option("--flops", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="The budget.")
@click.option("--small", is_flag=True, help="A smaller network, trained for a moment: to see that all of it runs.")
@output_options
def demo_command(out: Path, flops: float, small: bool, **options: Any) -> None:
    """Train a small network on handwritten digits, give it exits, measure, and write a report. Needs no data.

    \b
      e2cm demo
      e2cm demo --flops 0.1 -o cheap.html
    """
    rows = demo.run(out, flops=flops, small=small, command=_command_line(), progress=not options["quiet"])
    table = _table(
        f"handwritten digits, FLOPs {flops:g} asked for", "", "accuracy", "FLOPs", "time [10%, 90%]", "exits used"
    )
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
    _print(options["as_json"], result, table, f"\npictures: open {out} in a browser")
