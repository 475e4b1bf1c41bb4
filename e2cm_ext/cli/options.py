"""What all commands of `e2cm` have in common: errors in one line, the kinds of options, and what they stand for."""

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

# Files may hold their heads.
from ..methods import aep, branchynet, bwds, dec, eenets, joined, sdn  # noqa: F401
from . import model_loader

__all__ = [
    "Output",
    "Part",
    "Program",
    "Work",
    "budget",
    "budget_options",
    "data_options",
    "network_options",
    "ours",
    "output_options",
    "search_option",
    "wrong",
]

METHODS = ("auto", "paper", "coordinate")
F = TypeVar("F", bound=Callable[..., Any])

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---- errors, in one line --------------------------------------------------------------------------------------------


class Program(click.Group):
    """A group whose errors are one line on stderr, and whose exit codes are those at the top of this file."""

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


if TYPE_CHECKING:
    _Kind = click.ParamType[Any]  # a class that takes a parameter in the newest click alone
else:
    _Kind = click.ParamType


class Network(_Kind):
    name = "network"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names of torchvision and timm once it is clear which of the two, since to import them takes a while."""
        zoo, slash, _ = incomplete.partition("/")
        if slash and zoo in ("torchvision", "timm"):
            found = [f"{zoo}/{name}" for name in model_loader.names(zoo)]
        else:
            found = ["torchvision/", "timm/", *(f"{path}:" for path in map(str, Path().glob("*.py")))]
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]


class Normalise(_Kind):
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


class Part(_Kind):
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
        path = Path(str(super().convert(value, param, ctx)))
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


# fmt: off
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
    )


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
)
output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for machines."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
    click.option("--debug", is_flag=True, expose_value=False, help="Errors with their traceback."),
)
search_option = click.option(
    "--method", type=click.Choice(METHODS), default="auto", show_default=True, help="Of the threshold search."
)
# fmt: on


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
        model, prepared = model_loader.load(options["network"], options["weights"], options["classes"])
        try:
            model = model.to(options["device"])
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built for no such device
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
        ends = () if part is None else ("" if end is None else str(end) for end in (part.start, part.stop))
        bounds = f"[{':'.join(ends)}]" if part else ""
        return f"{Path(self.options['data']).name}, split {self.options['split']}{bounds}"


def budget(options: Mapping[str, Any]) -> dict[str, Any]:
    """What calibrate is asked for; empty if nothing is."""
    names = ("flops", "accuracy_drop", "latency", "milliseconds", "risk")
    given = {name: options[name] for name in names if options[name] not in (None, ())}
    if len(given) > 1:
        both = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise wrong(f"{both} are given; wanted one budget")
    if options["of"] != "accuracy" and "risk" not in given:
        raise wrong("--of says what a --risk is of; give --risk with it")
    return given | ({"of": options["of"]} if "risk" in given else {})


def wrong(message: str) -> click.UsageError:
    """An error of the command line that is being run."""
    return click.UsageError(message, click.get_current_context())
