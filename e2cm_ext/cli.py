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
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from . import data, demo, files, networks, report, turns
from ._native import build_info
from .calibration import OperatingPoint
from .early_exit import EarlyExit
from .profile import Profile
from .record import Record

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BUDGETS = tuple(i / 10 for i in range(1, 11))
HEADS = ("whitened_means", "class_means", "pooled_means", "auto")
METHODS = ("auto", "paper", "coordinate")


# ---- errors, in one line --------------------------------------------------------------------------------------------


class Program(click.Group):
    """A group whose errors are one line on stderr, and whose exit codes are those at the top of this file."""

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **rest: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                code = super().main(words, *more, standalone_mode=False, **rest)
            except Exception as error:
                if "--debug" in words:
                    traceback.print_exc()
                code = _told(error)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _told(error: Exception) -> int:
    if isinstance(error, click.Abort):
        _say("interrupted: nothing was written")
        return 130
    if isinstance(error, click.UsageError):
        context = error.ctx.command_path if error.ctx else "e2cm"
        _say(f"error: {error.format_message()} (see `{context} --help`)")
        return 2
    if isinstance(error, click.ClickException):
        _say(f"error: {error.format_message()}")
        return 1
    text = str(error) if isinstance(error, ValueError | TypeError | ImportError) else _of_system(error)
    _say(f"error: {text or type(error).__name__}")
    return 1


def _of_system(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error) if isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: {error}"


def _say(text: str) -> None:
    click.echo(f"e2cm: {' '.join(text.split())}", err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {message}")


# ---- options --------------------------------------------------------------------------------------------------------


class Network(click.ParamType):
    name = "network"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names of torchvision and timm once it is clear which of the two, since to import them takes a while."""
        zoo, slash, _ = incomplete.partition("/")
        if slash and zoo in ("torchvision", "timm"):
            found = [f"{zoo}/{name}" for name in networks.names(zoo)]
        else:
            found = ["torchvision/", "timm/", *(f"{path}:" for path in map(str, Path().glob("*.py")))]
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]


class Normalise(click.ParamType):
    """none, imagenet, weights, or MEAN/STD with one number or one per channel."""

    name = "how"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("none", "weights"):
            return value
        if value == "imagenet":
            return IMAGENET
        try:
            mean, std = (tuple(float(number) for number in half.split(",")) for half in value.split("/"))
        except (AttributeError, ValueError):
            self.fail(f"{value!r} is none of: none, imagenet, weights, MEAN/STD such as .49,.48,.45/.25,.24,.26")
        return mean, std

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("none", "imagenet", "weights") if name.startswith(incomplete)]


class Part(click.ParamType):
    """FROM:TO, each of which may be left out, as in Python."""

    name = "from:to"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        first, colon, end = value.partition(":")
        try:
            if not colon:
                raise ValueError
            return slice(int(first) if first else None, int(end) if end else None)
        except ValueError:
            self.fail(f"{value!r} is no range of samples; wanted FROM:TO, such as 2000: or :5000")


class Output(click.Path):
    """A file that is to be written, in a folder that is there: seen before the work, not after it."""

    name = "file"

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Path = super().convert(value, param, ctx)
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            self.fail(f"{path} cannot be written: there is no folder {folder}")
        if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            self.fail(f"{path} cannot be written: no permission")
        return path


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


ours = click.argument("file", metavar="FILE.e2cm", type=click.Path(exists=True, dir_okay=False, path_type=Path))
network_options = _options(
    click.option(
        "-n", "--network", type=Network(), envvar="E2CM_NETWORK", required=True, show_envvar=True,
        help="torchvision/NAME, timm/NAME, module:function or file.py:function; the function may be called with plain "
        "values, 'net.py:make(56)'. It is imported and run.",
    ),
    click.option(
        "-w", "--weights", envvar="E2CM_WEIGHTS", show_envvar=True,
        help="A state dict (.pt, .pth, .safetensors); for torchvision and timm also 'pretrained', which may download, "
        "or 'random'. A function may bring its own.",
    ),
    click.option("--classes", type=click.IntRange(1), help="So many classes, for networks of torchvision and timm."),
    click.option("--device", envvar="E2CM_DEVICE", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ..."),
    click.option("--threads", type=click.IntRange(1), help="Of the CPU.  [default: torch's own choice]"),
)  # fmt: skip


def data_options(split: str) -> Callable[[F], F]:
    return _options(
        click.option(
            "-d", "--data", envvar="E2CM_DATA", required=True, show_envvar=True, metavar="DATA",
            shell_complete=click.Path(path_type=Path).shell_complete,
            help="A .npz file (x_train, y_train, x_test, y_test), a folder with one folder of images per class, or the "
            "name of a torchvision data set.",
        ),
        click.option(
            "--normalise", type=Normalise(), envvar="E2CM_NORMALISE", show_envvar=True, required=True,
            help="How the network's images were prepared when it was trained: 'imagenet', 'none' (in [0, 1]), MEAN/STD "
            "of images in [0, 1], or 'weights' (as pretrained weights say). Never guessed.",
        ),
        click.option("--size", type=click.IntRange(1), help="Resize the shorter side to this, and cut out the middle."),
        click.option("--root", default="data", show_default=True, help="Where torchvision data sets are."),
        click.option("--download", is_flag=True, help="Let torchvision fetch what is not there."),
        click.option("--split", default=split, show_default=True, help="'none': a folder that is not split."),
        click.option("--part", type=Part(), help="Only these samples of the split: 2000: or :5000."),
        click.option("-b", "--batch-size", type=click.IntRange(1), default=128, show_default=True),
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes that read images."),
        click.option(
            "--channels-last", is_flag=True, envvar="E2CM_CHANNELS_LAST", show_envvar=True,
            help="Run network and images in this memory format, often the faster one.",
        ),
    )  # fmt: skip


budget_options = _options(
    click.option("--flops", type=float, help="Most accurate within this fraction of the network's FLOPs: 0.5."),
    click.option("--accuracy-drop", type=float, help="Cheapest that loses no more accuracy than this: 0.01."),
    click.option("--latency", type=float, help="Most accurate within this fraction of the network's time: 0.5."),
    click.option("--milliseconds", type=float, help="Most accurate within so many ms per batch."),
    click.option(
        "--risk", type=float, nargs=2, metavar="EPS DELTA",
        help="Loses at most EPS on new samples, or errs with probability DELTA: 0.01 0.05.",
    ),
    click.option(
        "--of", type=click.Choice(["accuracy", "agreement"]), default="accuracy", show_default=True,
        help="What a --risk is of: accuracy lost, or answers other than the network's.",
    ),
)  # fmt: skip
output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for machines."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
    click.option("--debug", is_flag=True, expose_value=False, help="Errors with their traceback."),
)
search_option = click.option(
    "--method", type=click.Choice(METHODS), default="auto", show_default=True, help="Of the threshold search."
)


# ---- what options mean ----------------------------------------------------------------------------------------------


@dataclass
class Work:
    """The network, and where its images come from."""

    options: Mapping[str, Any]
    model: nn.Module
    prepared: Any  # what knows how images were prepared, if anything does

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Work:
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        model, prepared = networks.load(options["network"], options["weights"], options["classes"])
        try:
            model = model.to(options["device"])
        except RuntimeError as error:
            first, _, _ = str(error).partition("\n")
            raise ValueError(f"--device {options['device']}: {first}") from error
        if options["channels_last"]:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(options, model, prepared)

    @property
    def progress(self) -> bool:
        return not self.options["quiet"]

    def images(self, split: str | None = None, part: slice | None = None) -> data.Batches:
        options = self.options
        split = split or options["split"]
        how = options["normalise"]
        ready: dict[str, Any] = {"normalise": None if how == "none" else how, "size": options["size"]}
        if how == "weights":
            if self.prepared is None:
                raise ValueError(
                    "--normalise weights: these weights do not say how images were prepared; wanted imagenet, none or "
                    "MEAN/STD, as the network was trained"
                )
            if options["size"]:
                raise ValueError("--size: --normalise weights brings a size of its own; give one of the two")
            ready = {"transform": data.transform_of(self.prepared)}
        return data.load(
            options["data"],
            split=None if split == "none" else split,
            root=options["root"],
            part=part or options["part"],
            batch_size=options["batch_size"],
            workers=options["workers"],
            channels_last=options["channels_last"],
            download=options["download"],
            **ready,
        )

    def restore(self, images: Tensor) -> Tensor:
        """Images in [0, 1], to be looked at."""
        mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in self.options["normalise"])
        return images * std + mean

    @property
    def restores(self) -> Callable[[Tensor], Tensor] | None:
        if self.options["normalise"] == "weights":
            return None
        return (lambda images: images) if self.options["normalise"] == "none" else self.restore

    def load(self, file: Path) -> EarlyExit:
        return EarlyExit.load(file, self.model)

    def described(self) -> str:
        part = self.options["part"]
        bounds = "" if part is None else f"[{'' if part.start is None else part.start}:{part.stop or ''}]"
        return f"{Path(self.options['data']).name}, split {self.options['split']}{bounds}"


def _budget(options: Mapping[str, Any]) -> dict[str, Any]:
    """What calibrate is asked for; empty if nothing is."""
    names = ("flops", "accuracy_drop", "latency", "milliseconds", "risk")
    given = {name: options[name] for name in names if options[name] not in (None, ())}
    if len(given) > 1:
        both = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{both} are given; wanted one budget.", click.get_current_context())
    if options["of"] != "accuracy" and "risk" not in given:
        raise click.UsageError("--of says what a --risk is of; give --risk with it.", click.get_current_context())
    return given | ({"of": options["of"]} if "risk" in given else {})


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


def _limits(thresholds: Tensor) -> list[float | None]:
    """JSON knows no infinity: null is an exit that is off."""
    return [None if limit == math.inf else limit for limit in thresholds.tolist()]


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
    rows = zip(ee.exit_names, ee._heads(), _limits(ee.thresholds), ee.costs.fractions.tolist(), strict=False)
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
    asked = _budget(options)
    if options["held_out_part"] and not options["held_out_split"]:
        raise click.UsageError("--held-out-part is of --held-out-split; give both.", click.get_current_context())
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
    asked = _budget(options)
    if not asked:
        wanted = "--flops, --accuracy-drop, --latency, --milliseconds or --risk"
        raise click.UsageError(f"Wanted a budget: {wanted}.", click.get_current_context())
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
    points = [(budget, halves.at(budget)) for budget in BUDGETS]
    if picture is not None:
        _draw(halves, picture)
    table = _table(f"{work.described()}: measured on {len(halves.judging)} samples", "budget", "FLOPs", "accuracy", "")
    for budget, point in points:
        if point is None:
            table.add_row(f"{budget:.1f}", "", "", "cheaper than the first exit")
        else:
            table.add_row(
                f"{budget:.1f}", f"{point.flops:.4f}", f"{point.accuracy:.4f}", f"{point.accuracy - base:+.4f}"
            )
    result = {
        "data": work.described(),
        "samples": len(halves.judging),
        "network_accuracy": base,
        "points": [{"budget": budget, **_of_point(point)} for budget, point in points if point],
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
    with files.whole(path) as out:
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
    found: Profile = ee.profile(images, options["batch_size"], repeats=repeats, progress=work.progress)
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
    some = list(report.first_images(work.images(), size * batches).to(options["device"]).split(size))

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
        seconds = turns.in_turns(ways, rounds, device=torch.device(options["device"]), progress=work.progress)
    spent = ee.evaluate([(images, torch.zeros(len(images), dtype=torch.int64)) for images in some], progress=False)
    count = sum(map(len, some))
    result: dict[str, Any] = {"images": count, "batch_size": size, "rounds": rounds, "flops": spent.flops, "ways": {}}
    title = f"{count} images in batches of {size}, {rounds} rounds, {torch.get_num_threads()} threads"
    table = _table(title, "", "ms per image", "of the network's time", "of its FLOPs")
    for name, values in seconds.items():
        over = turns.ratio(values, seconds["network"])
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
    command = shlex.join(["e2cm", *sys.argv[1:]]) if "pytest" not in sys.modules else "e2cm report"
    record = report.write(
        out,
        ee,
        images,
        title=title or f"{options['network']} with early exits",
        data=work.described(),
        classes=images.classes if images.classes and len(images.classes) >= ee.num_classes else None,
        restore=work.restores,
        batch_size=options["batch_size"],
        command=_with_environment(command),
        progress=work.progress,
    )
    replay = record.replay(ee.thresholds.cpu())
    result = {"file": str(out), "bytes": out.stat().st_size, "accuracy": replay.accuracy, "flops": replay.flops}
    _print(options["as_json"], result, f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _with_environment(command: str) -> str:
    """What stands in the environment is a part of the command."""
    names = sorted(name for name in os.environ if name.startswith("E2CM_") and not name.endswith("COMPLETE"))
    return "".join(f"{name}={shlex.quote(os.environ[name])} " for name in names) + command


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
        for name, value in found.items():
            table.add_row(name, escape(value))
        _print(options["as_json"], {"environment": found, "build": build_info()}, table)
        return
    tensors, about = files.read(file, None)
    kind = about["kind"]
    result = {"file": str(file), "kind": kind, "format": files.FORMAT, "about": about}
    result["tensors"] = {name: list(value.shape) for name, value in tensors.items()}
    shown = _table(f"{file}: {kind}, format {files.FORMAT}, by e2cm_ext {about.get('package', '?')}", "", "")
    if kind == "EarlyExit":
        shown = _table(shown.title if isinstance(shown.title, str) else "", "exit", "head", "features", "threshold")
        for name, head, limit in zip(about["exits"], about["heads"], tensors["thresholds"].tolist(), strict=True):
            features = "x".join(map(str, head["feature_shape"]))
            shown.add_row(escape(name), head["kind"], features, "off" if limit == math.inf else f"{limit:.4f}")
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
      pip install 'e2cm_ext[demo]' && e2cm demo
    """
    rows = demo.run(out, flops=flops, small=small, progress=not options["quiet"])
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
