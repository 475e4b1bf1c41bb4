"""What all commands of `e2cm` share: errors in one line, options and their types, and the network that they name."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import torch
from click.shell_completion import CompletionItem
from torch import Tensor, nn

from .. import data
from ..early_exit import EarlyExit

# Imported to register their heads: files may hold them.
from ..methods import aep, branchynet, bwds, dec, eenets, joined, sdn  # noqa: F401
from . import model_loader

__all__ = [
    "CommandGroup",
    "Inputs",
    "OutputFile",
    "SampleRange",
    "budget_options",
    "data_options",
    "file_argument",
    "network_options",
    "output_options",
    "requested_budget",
    "search_option",
    "usage_error",
]

METHODS = ("auto", "paper", "coordinate")
F = TypeVar("F", bound=Callable[..., Any])

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---- errors in one line ---------------------------------------------------------------------------------------------


class CommandGroup(click.Group):
    """A group of commands whose errors are one line on stderr; the exit codes are listed in commands.py."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, standalone_mode: bool = True, **rest: Any
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                code = super().main(words, standalone_mode=False, obj=words, **rest)
            except Exception as error:
                if "--debug" in words:
                    traceback.print_exc()
                code = _print_error(error)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _print_error(error: Exception) -> int:
    """Print one line, and return the exit code."""
    if isinstance(error, click.Abort):
        _print_line("interrupted: nothing was written")
        return 130
    if isinstance(error, click.UsageError):
        context = error.ctx.command_path if error.ctx else "e2cm"
        _print_line(f"error: {error.format_message()} (see `{context} --help`)")
        return 2
    if isinstance(error, click.ClickException):
        _print_line(f"error: {error.format_message()}")
        return 1
    text = str(error) if isinstance(error, ValueError | TypeError | ImportError) else _system_error(error)
    _print_line(f"error: {text or type(error).__name__}")
    return 1


def _system_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        prefix = f"{error.filename}: " if error.filename else ""
        return f"{prefix}{error.strerror}"
    return str(error) if isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: {error}"


def _print_line(text: str) -> None:
    click.echo(f"e2cm: {' '.join(text.split())}", err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _print_line(f"warning: {message}")


# ---- types of options -----------------------------------------------------------------------------------------------


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]  # generic only in the newest click
else:
    _ParamType = click.ParamType


class NetworkName(_ParamType):
    name = "network"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete names of torchvision and timm after their prefix: importing both takes long."""
        library, slash, _ = incomplete.partition("/")
        if slash and library in ("torchvision", "timm"):
            names = [f"{library}/{name}" for name in model_loader.names(library)]
        else:
            names = ["torchvision/", "timm/", *(f"{path}:" for path in map(str, Path().glob("*.py")))]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class Normalisation(_ParamType):
    """How images are normalised: none, imagenet, weights, or MEAN/STD with one number or one per channel."""

    name = "how"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("none", "weights"):
            return value
        if value == "imagenet":
            return IMAGENET
        try:
            mean, std = (tuple(float(number) for number in numbers.split(",")) for numbers in value.split("/"))
        except (AttributeError, ValueError):
            self.fail(f"{value!r} is none of: none, imagenet, weights, MEAN/STD such as .49,.48,.45/.25,.24,.26")
        return mean, std

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("none", "imagenet", "weights") if name.startswith(incomplete)]


class SampleRange(_ParamType):
    """A range of samples, FROM:TO, as in a Python slice."""

    name = "from:to"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        first, colon, end = value.partition(":")
        try:
            if not colon:
                raise ValueError
            return slice(int(first) if first else None, int(end) if end else None)
        except ValueError:
            self.fail(f"{value!r} is not a range of samples; wanted FROM:TO, such as 2000: or :5000")


class OutputFile(click.Path):
    """A file to be written. Folder and permissions are checked before the command starts its work."""

    name = "file"

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            self.fail(f"{path} cannot be written: there is no folder {folder}")
        if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            self.fail(f"{path} cannot be written: no permission")
        return path


# ---- options --------------------------------------------------------------------------------------------------------


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return a decorator that adds all these options, in this order."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


# fmt: off
file_argument = click.argument(
    "file", metavar="FILE.e2cm", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
network_options = _options(
    click.option(
        "-n", "--network", type=NetworkName(), envvar="E2CM_NETWORK", required=True, show_envvar=True,
        help="torchvision/NAME, timm/NAME, module:function or file.py:function; the function may be called with plain "
        "values, 'net.py:make(56)'. Its module is imported and run.",
    ),
    click.option(
        "-w", "--weights", envvar="E2CM_WEIGHTS", show_envvar=True,
        help="A state dict (.pt, .pth, .safetensors); for torchvision and timm also 'pretrained', which may download, "
        "or 'random'. A function may load its own.",
    ),
    click.option("--classes", type=click.IntRange(1), help="Number of classes, for networks of torchvision and timm."),
    click.option("--device", envvar="E2CM_DEVICE", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ..."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: chosen by torch]"),
)


def data_options(split: str) -> Callable[[F], F]:
    return _options(
        click.option(
            "-d", "--data", envvar="E2CM_DATA", required=True, show_envvar=True, metavar="DATA",
            shell_complete=click.Path(path_type=Path).shell_complete,
            help="A .npz file (x_train, y_train, x_test, y_test), a folder with one folder of images per class, or the "
            "name of a torchvision data set.",
        ),
        click.option(
            "--normalise", type=Normalisation(), envvar="E2CM_NORMALISE", show_envvar=True, required=True,
            help="How images were normalised when the network was trained: 'imagenet', 'none' (in [0, 1]), MEAN/STD "
            "of images in [0, 1], or 'weights' (as pretrained weights say). Never guessed.",
        ),
        click.option("--size", type=click.IntRange(1), help="Resize the shorter side to this, and crop the center."),
        click.option("--root", default="data", show_default=True, help="Folder of torchvision data sets."),
        click.option("--download", is_flag=True, help="Let torchvision download a missing data set."),
        click.option("--split", default=split, show_default=True, help="Of the data; 'none': a folder without splits."),
        click.option("--part", type=SampleRange(), help="Only these samples of the split: 2000: or :5000."),
        click.option("-b", "--batch-size", type=click.IntRange(1), default=128, show_default=True),
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes that load images."),
        click.option(
            "--channels-last", is_flag=True, envvar="E2CM_CHANNELS_LAST", show_envvar=True,
            help="Run in this memory format, which is often faster.",
        ),
    )


budget_options = _options(
    click.option("--flops", type=float, help="Highest accuracy within this fraction of the network's FLOPs: 0.5."),
    click.option("--accuracy-drop", type=float, help="Fewest FLOPs that lose no more accuracy than this: 0.01."),
    click.option("--latency", type=float, help="Highest accuracy within this fraction of the network's time: 0.5."),
    click.option("--milliseconds", type=float, help="Highest accuracy within this many ms per batch."),
    click.option(
        "--risk", type=float, nargs=2, metavar="EPS DELTA",
        help="Loses at most EPS on new samples, with probability 1 - DELTA: 0.01 0.05.",
    ),
    click.option(
        "--of", type=click.Choice(["accuracy", "agreement"]), default="accuracy", show_default=True,
        help="What --risk bounds: accuracy lost, or predictions that differ from the network's.",
    ),
)
output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for scripts."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)
search_option = click.option(
    "--method", type=click.Choice(METHODS), default="auto", show_default=True, help="Method of the threshold search."
)
# fmt: on


# ---- what options stand for -----------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """The network and the data that the options name.

    Attributes:
        options: Of the command.
        model: The network, on its device.
        preprocessing: What describes how its images are prepared: see model_loader.load.
    """

    options: Mapping[str, Any]
    model: nn.Module
    preprocessing: Any

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Inputs:
        """Load the network."""
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        model, preprocessing = model_loader.load(options["network"], options["weights"], options["classes"])
        try:
            model = model.to(options["device"])
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built for no such device
            first, _, _ = str(error).partition("\n")
            raise ValueError(f"--device {options['device']}: {first}") from error
        if options["channels_last"]:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(options, model, preprocessing)

    @property
    def progress(self) -> bool:
        """Whether to show progress bars."""
        return not self.options["quiet"]

    def batches(self, split: str | None = None, part: slice | None = None) -> data.Batches:
        """Return batches of images and labels; `split` and `part` replace those of the options."""
        options = self.options
        split = split or options["split"]
        normalise = options["normalise"]
        transform: dict[str, Any] = {"normalise": None if normalise == "none" else normalise, "size": options["size"]}
        if normalise == "weights":
            if self.preprocessing is None:
                raise ValueError(
                    "--normalise weights: these weights do not say how images were prepared; wanted imagenet, none or "
                    "MEAN/STD, as the network was trained"
                )
            if options["size"]:
                raise ValueError("--size: --normalise weights has its own size; give one of the two")
            transform = {"transform": data.transform_of(self.preprocessing)}
        return data.load(
            options["data"],
            split=None if split == "none" else split,
            root=options["root"],
            part=part or options["part"],
            batch_size=options["batch_size"],
            workers=options["workers"],
            channels_last=options["channels_last"],
            download=options["download"],
            **transform,
        )

    @property
    def restore(self) -> Callable[[Tensor], Tensor] | None:
        """Turns normalised images into images in [0, 1], for display; None if their normalisation is not known."""
        normalise = self.options["normalise"]
        if normalise == "weights":
            return None
        if normalise == "none":
            return lambda images: images
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in normalise)
        return lambda images: images * std + mean

    def load_exits(self, file: Path) -> EarlyExit:
        """Load exits from a file into the network."""
        return EarlyExit.load(file, self.model)

    def data_name(self) -> str:
        """Return a name for data, split and part."""
        part = self.options["part"]
        ends = () if part is None else ("" if end is None else str(end) for end in (part.start, part.stop))
        bounds = f"[{':'.join(ends)}]" if part else ""
        return f"{Path(self.options['data']).name}, split {self.options['split']}{bounds}"


def requested_budget(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of EarlyExit.calibrate; empty without a budget."""
    names = ("flops", "accuracy_drop", "latency", "milliseconds", "risk")
    given = {name: options[name] for name in names if options[name] not in (None, ())}
    if len(given) > 1:
        names_given = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise usage_error(f"{names_given} are given; wanted one budget")
    if options["of"] != "accuracy" and "risk" not in given:
        raise usage_error("--of says what --risk bounds; give --risk with it")
    return given | ({"of": options["of"]} if "risk" in given else {})


def usage_error(message: str) -> click.UsageError:
    """Return an error about the command line: exit code 2."""
    return click.UsageError(message, click.get_current_context())
