"""A report on one network with early exits: a single HTML file that needs nothing else, to be opened in any browser.

    report.write("report.html", ee, loader, title="ResNet-56, CIFAR-10", classes=("airplane", ...))

What is in it: what the thresholds that are set give, in accuracy, FLOPs and measured time; the curves over both; who
leaves where, class by class; what early answers get wrong; the images that left first and last at every exit; how far
confidences can be believed; and where all of it was measured. The page itself is report.html, beside this file.

The curves are honest about new images: thresholds are found on one half of the loader's samples, drawn with a fixed
seed, and drawn as measured on the other half. All else is about the thresholds that `ee` came with, on all the samples.
"""

from __future__ import annotations

import base64
import io
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration import plotting
from ..calibration.curves import Curve, Method, OperatingPoint
from ..calibration.profile import Profile
from ..calibration.record import Record, Replay
from ..data.loader import to_network
from ..early_exit import EarlyExit
from ..native import build_info
from ..utils import serialization, timing
from ..utils.timing import Ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Compared", "Halves", "environment", "measured", "write"]

BUDGETS = (0.25, 0.5, 0.75)  # of FLOPs: where time is measured
_SHOWN = 6  # images at either end of an exit
_THUMB = 96  # pixels at most
_MATRIX = 12  # classes, for which a confusion matrix can be read
_PAIRS = 12
_ROUNDS = 7
_SEED = 0

Restore = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Compared:
    """One way to run the network, for the table at the top of a report."""

    name: str
    accuracy: float
    flops: float
    time: Ratio | None = None  # of the network's own
    exits_used: str = ""
    curve: Curve | None = None  # drawn beside the others


def write(
    path: str | os.PathLike[str],
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    title: str = "A network with early exits",
    data: str = "",
    classes: Sequence[str] | None = None,
    restore: Restore | None = None,
    batch_size: int = 128,
    profile: Profile | None = None,
    compared: Sequence[Compared] = (),
    command: str = "",
    progress: bool = True,
) -> Record:
    """Looks at the samples of the loader, measures, and writes the report; returns the record.

    data: a line on what the samples are. classes: their names. restore: makes of a batch as the network takes it
    images in [0, 1], [B, C, H, W], to be looked at; without it every image is stretched to that range. profile: of the
    times of stages and exits, else they are measured. compared: other ways to be put beside this one. command: what
    made the report. What was at `path` stays until the new file is complete.
    """
    refuse_no_matplotlib()
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):  # said before the work, not after it
        raise FileNotFoundError(f"{os.fspath(path)} cannot be written: there is no folder {folder}")
    names = [str(name) for name in classes] if classes else [str(k) for k in range(ee.num_classes)]
    if len(names) < ee.num_classes:
        raise ValueError(f"`classes` has {len(names)} names; wanted {ee.num_classes}")
    record = ee.record(loader, progress)
    images = first_images(loader, batch_size)
    if profile is None:
        profile = ee.profile(images, batch_size, progress=progress)
    batch_size = min(batch_size, profile.sizes[-1])
    page = _Page(ee, record, Halves(ee, record, progress), profile, batch_size, names)
    times = page.measured(images, progress)
    html = _rendered(
        title=title,
        data=data,
        page=page,
        times=times,
        compared=_table(page, times, compared),
        curves={each.name: each.curve for each in compared if each.curve is not None} or {"": page.halves.curve},
        gallery=page.gallery(loader, restore),
        environment=environment(ee),
        command=command,
    )
    with serialization.atomic_write(path) as file:
        file.write(html.encode())
    return record


# ---- measuring ------------------------------------------------------------------------------------------------------


def first_images(loader: Iterable[Any], count: int) -> Tensor:
    """The first images of a loader, at most `count`."""
    found: list[Tensor] = []
    for images, _ in loader:
        found.append(torch.as_tensor(images))
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


class Halves:
    """Thresholds from one half of a record, and what they do on the other, which did not choose them."""

    def __init__(self, ee: EarlyExit, record: Record, progress: bool = False, method: Method = "auto") -> None:
        if len(record) < 2:
            raise ValueError(f"there are {len(record)} samples; wanted at least 2, better some thousand")
        order = torch.randperm(len(record), generator=torch.Generator().manual_seed(_SEED))
        finding, self.judging = (record.part(half.sort().values) for half in order.tensor_split(2))
        self.found = ee.curve(finding, progress, method=method)
        self.curve = self.found.on(self.judging)

    def at(self, budget: float) -> OperatingPoint | None:
        """The single thresholds that are best within so many FLOPs where they were found; figures of the other half."""
        if budget < float(self.found.front.flops.min()):
            return None
        thresholds = self.found.best_within(budget).thresholds
        replay = self.judging.replay(thresholds)
        return OperatingPoint(replay.flops, replay.accuracy, thresholds)


def measured(
    ee: EarlyExit, images: Tensor, thresholds: Mapping[str, Tensor], rounds: int = _ROUNDS, progress: bool = False
) -> dict[str, Ratio]:
    """The time of a batch under each of these thresholds over that of the network itself, measured in turns.

    The network itself is here with all its exits off.
    """
    before = ee.thresholds
    images = to_network(images, ee.stages)

    def way(limits: Tensor | float) -> Callable[[], Any]:
        def run() -> None:
            ee.thresholds = limits
            ee(images)

        return run

    try:
        with torch.inference_mode():
            ways = {"": way(math.inf), **{name: way(limits) for name, limits in thresholds.items()}}
            seconds = timing.time_interleaved(ways, rounds, device=ee.thresholds.device, progress=progress)
    finally:
        ee.thresholds = before
    base = seconds.pop("")
    return {name: timing.ratio(values, base) for name, values in seconds.items()}


def environment(ee: EarlyExit | None = None) -> dict[str, str]:
    """Where figures come from: versions, machine, threads."""
    build = build_info()
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "e2cm_ext": f"{build['version']}, {build['compiler']}, instruction set {build['isa']} of "
        f"{', '.join(build['isa_available'])}",
        "CUDA part": ", ".join(build["cuda_archs"]) or "not built",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "machine": f"{_processor()}, {os.cpu_count()} logical cores, {platform.system()}",
        "threads": str(torch.get_num_threads()),
    }
    if ee is not None:
        device = ee.thresholds.device
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()


# ---- what is told ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exit:
    name: str
    head: str
    threshold: str
    flops: float  # of a sample that leaves here
    leavers: int
    share: float
    accuracy: float | None  # of these
    network: float | None  # of the network, on the same samples


@dataclass(frozen=True)
class _Class:
    name: str
    samples: int
    accuracy: float
    network: float
    flops: float
    shares: list[float]  # who leaves where
    bars: str  # the same as the outline of a histogram


@dataclass(frozen=True)
class _Picture:
    source: str
    truth: str
    answer: str
    right: bool
    confidence: float


@dataclass(frozen=True)
class _Shelf:
    """The images of one exit."""

    name: str
    leavers: int
    first: list[_Picture]
    last: list[_Picture]


@dataclass
class _Page:
    ee: EarlyExit
    record: Record
    halves: Halves
    profile: Profile
    batch_size: int
    classes: list[str]
    limits: Tensor = field(init=False)
    replay: Replay = field(init=False)
    accuracy_of: dict[str, float] = field(default_factory=dict)  # what is measured

    def __post_init__(self) -> None:
        self.limits = self.ee.thresholds.cpu()
        self.replay = self.record.replay(self.limits)
        self.accuracy_of["set"] = self.replay.accuracy
        on = self.limits < math.inf
        heads = tuple(head if bool(is_on) else 0 for head, is_on in zip(self.record.costs.heads, on, strict=True))
        self._spent = type(self.record.costs)(self.record.costs.stages, heads, self.record.names).fractions

    @property
    def base_accuracy(self) -> float:
        return float(self.record.accuracy[-1])

    @property
    def left_early(self) -> float:
        return float((self.replay.exit < self.record.exits).double().mean())

    @property
    def exits_on(self) -> int:
        return int((self.limits < math.inf).sum())

    def expected(self, thresholds: Tensor) -> list[float]:
        """Times of the network's own, from what stages and exit steps take."""
        base = self.profile.base_seconds(self.batch_size)
        return [
            self.profile.expected_seconds(self.halves.judging, limits, self.batch_size) / base for limits in thresholds
        ]

    def measured(self, images: Tensor, progress: bool) -> dict[str, Ratio]:
        """At the thresholds that are set, under the name "set", and at some budgets."""
        wanted = {"set": self.limits}
        for budget in BUDGETS:
            if point := self.halves.at(budget):
                wanted[f"FLOPs {budget:g}"] = point.thresholds
                self.accuracy_of[f"FLOPs {budget:g}"] = point.accuracy
        return measured(self.ee, images, wanted, progress=progress)

    def exits(self) -> list[_Exit]:
        heads = [str(head.kind).replace("_", " ") for head in self.ee.head_list()]
        named = {math.inf: "never", -math.inf: "always"}
        limits = [named.get(limit, f"{limit:.4f}") for limit in self.limits.tolist()]
        rows = []
        for j, name in enumerate((*self.record.names, "the network itself")):
            here = self.replay.exit == j
            count = int(here.sum())
            rows.append(
                _Exit(
                    name,
                    heads[j] if j < len(heads) else "its own classifier",
                    limits[j] if j < len(limits) else "",
                    float(self._spent[j]),
                    count,
                    count / max(1, len(self.record)),
                    float(self.replay.correct[here].double().mean()) if count else None,
                    float(self.record.correct[here, -1].double().mean()) if count else None,
                )
            )
        return rows

    def by_class(self) -> list[_Class]:
        """From the easiest, whose samples cost least, to the hardest."""
        found = []
        for k, name in enumerate(self.classes):
            of_it = self.record.label == k
            count = int(of_it.sum())
            if count:
                leave = self.replay.exit[of_it].bincount(minlength=self.record.exits + 1).double() / count
                found.append(
                    _Class(
                        name,
                        count,
                        float(self.replay.correct[of_it].double().mean()),
                        float(self.record.correct[of_it, -1].double().mean()),
                        float(leave @ self._spent),
                        leave.tolist(),
                        _outline(leave.tolist()),
                    )
                )
        return sorted(found, key=lambda row: row.flops)

    def confusion(self) -> Tensor:
        """[K, K]: how many of the class in the row were called the class in the column, of those that left early."""
        early = self.replay.exit < self.record.exits
        k = len(self.classes)
        pairs = self.record.label[early] * k + self.replay.prediction[early].clamp(0, k - 1)
        return pairs.bincount(minlength=k * k).reshape(k, k)

    def confused(self) -> list[dict[str, Any]]:
        """The most frequent mistakes of early answers, and how many of them the network would have made as well."""
        matrix = self.confusion().fill_diagonal_(0)
        early = self.replay.exit < self.record.exits
        rows = []
        for index in matrix.flatten().argsort(descending=True, stable=True)[:_PAIRS].tolist():
            truth, answer = divmod(index, len(self.classes))
            if not matrix[truth, answer]:
                break
            these = early & (self.record.label == truth) & (self.replay.prediction == answer)
            rows.append(
                {
                    "truth": self.classes[truth],
                    "answer": self.classes[answer],
                    "count": int(matrix[truth, answer]),
                    "network": int((these & ~self.record.correct[:, -1]).sum()),
                }
            )
        return rows

    def gallery(self, loader: Iterable[Any], restore: Restore | None) -> list[_Shelf]:
        """Of every exit that somebody left at: the surest and the least sure. Then those that never left early."""
        wanted: list[tuple[str, int, list[int], list[int]]] = []
        for j, name in enumerate((*self.record.names, "")):
            rows = (self.replay.exit == j).nonzero().flatten()
            order = rows[self.replay.confidence[rows].nan_to_num(-math.inf).argsort(descending=True, stable=True)]
            first = order[:_SHOWN].tolist()
            last = order[max(len(first), len(order) - _SHOWN) :].tolist()
            if len(rows):
                wanted.append((name, len(rows), first, last))
        pixels = _pixels(loader, {i for _, _, first, last in wanted for i in (*first, *last)}, restore)
        return [
            _Shelf(
                name, count, [self._picture(i, pixels[i]) for i in first], [self._picture(i, pixels[i]) for i in last]
            )
            for name, count, first, last in wanted
        ]

    def _picture(self, i: int, source: str) -> _Picture:
        truth, answer = int(self.record.label[i]), int(self.replay.prediction[i])
        confidence = float(self.replay.confidence[i])
        return _Picture(source, self.classes[truth], self.classes[answer], truth == answer, confidence)


def _outline(shares: Sequence[float]) -> str:
    """An SVG path over a field of len(shares) x 1, its top at 0: bars as high as the shares, the highest fills it."""
    most = max([*shares, 1e-9])
    return "".join(f"M{j + 0.1:g} 1v-{share / most:.3g}h.8V1z" for j, share in enumerate(shares) if share)


def _pixels(loader: Iterable[Any], wanted: set[int], restore: Restore | None) -> dict[int, str]:
    """data: addresses of the images with these numbers."""
    found: dict[int, str] = {}
    number = 0
    for images, _ in loader:
        here = [i for i in range(number, number + len(images)) if i in wanted]
        if here:
            some = torch.as_tensor(images)[[i - number for i in here]].float().cpu()
            some = some if restore is None else restore(some)
            for i, image in zip(here, some, strict=True):
                found[i] = _address(_stretched(image) if restore is None else image)
        number += len(images)
    return found


def _stretched(image: Tensor) -> Tensor:
    low, high = image.aminmax()
    return (image - low) / (high - low).clamp_min(1e-12)


def _address(image: Tensor) -> str:
    """[C, H, W] in [0, 1]; of other than 1 or 3 channels the first is shown."""
    from PIL import Image

    if image.dim() == 2:
        image = image[None]
    channels = image if image.shape[0] == 3 else image[:1]
    array = (channels.nan_to_num().clamp(0, 1) * 255).round().byte().movedim(0, -1).squeeze(-1).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((_THUMB, _THUMB))
    kind = "PNG" if max(picture.size) <= 48 else "JPEG"
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(page: _Page, times: Mapping[str, Ratio], compared: Sequence[Compared]) -> list[Compared]:
    if compared:
        return list(compared)
    leavers = page.replay.exit.bincount(minlength=page.record.exits + 1)[:-1]
    used = f"{int((leavers > 0).sum())} of {page.record.exits}"
    return [
        Compared("the network alone", page.base_accuracy, 1.0, Ratio(1.0, 1.0, 1.0)),
        Compared("with its exits", page.replay.accuracy, page.replay.flops, times["set"], used),
    ]


# ---- drawing --------------------------------------------------------------------------------------------------------

# What matplotlib writes, and what the page's own style makes of it, by day and by night.
_COLOURS = {
    "#000000": "currentColor",
    "#666666": "var(--muted)",
    "#1f77b4": "var(--blue)",
    "#ff7f0e": "var(--orange)",
    "#2ca02c": "var(--green)",
    "#d62728": "var(--red)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.facecolor": "none",
    "legend.framealpha": 0,
    "axes.grid": False,
}


def _drawn(number: int, text: str, draw: Callable[[Axes], object]) -> str:
    """An inline SVG. text: what it shows, for those who cannot see it."""
    from markupsafe import escape
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": str(number)}):
        figure = Figure(figsize=(5, 3.7), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title("")  # the page has its own
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)[\"')]", svg))
    # Several pictures share a page: names that nothing refers to go, the others become this picture's own.
    svg = re.sub(r'\bid="([^"]+)"', lambda found: f'id="p{number}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"((?:href=\"|url\()#)([\w.-]+)", rf"\1p{number}-\2", svg)
    svg = svg.replace("xlink:href", "href")
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, name)
    # matplotlib leaves black, the default of SVG, unsaid.
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    opening = f'<svg class="plot" role="img" aria-label="{escape(text)}" {box[0]} fill="currentColor">'
    return opening + svg[svg.index(">") + 1 :]


def _figures(page: _Page, curves: Mapping[str, Curve], times: Mapping[str, Ratio]) -> dict[str, str]:
    replay, base = page.replay, page.base_accuracy

    def over_flops(ax: Axes) -> None:
        for name, curve in curves.items():
            curve.plot(ax, label=name or "single thresholds, and between them")
        ax.plot([replay.flops], [replay.accuracy], "o", markersize=8, color="tab:red", label="as set")
        ax.legend()

    def over_time(ax: Axes) -> None:
        page.halves.curve.plot(ax, time=page.expected, label="expected, from the times of stages and exits")
        for label, colour, names in (
            ("measured", "tab:orange", [name for name in times if name != "set"]),
            ("measured, as set", "tab:red", ["set"]),
        ):
            if names:
                ratios = [times[name] for name in names]
                x = [ratio.median for ratio in ratios]
                spread = [[r.median - r.p10 for r in ratios], [r.p90 - r.median for r in ratios]]
                y = [page.accuracy_of[name] for name in names]
                ax.errorbar(x, y, xerr=spread, fmt="o", markersize=6, capsize=3, color=colour, label=label)
        ax.set_xlabel("time of a batch, of the network's own")
        ax.legend()

    known = page.classes if len(page.classes) <= 10 else None
    early = f"{page.left_early:.0%} of {len(page.record)} samples left early"
    return {
        "flops": _drawn(
            1,
            f"Accuracy over FLOPs. As set: accuracy {replay.accuracy:.4f} at {replay.flops:.4f} of the FLOPs; the "
            f"network alone: {base:.4f} at 1.",
            over_flops,
        ),
        "time": _drawn(
            2,
            f"Accuracy over the time of a batch of {page.batch_size}. As set: accuracy {replay.accuracy:.4f} at "
            f"{times['set'].median:.3f} of the network's time.",
            over_time,
        ),
        "exits": _drawn(
            3,
            f"How many samples leave at which exit: {early}.",
            lambda ax: plotting.draw_exits(ax, page.record, page.limits, known),
        ),
        "accuracy": _drawn(
            4,
            f"Accuracy if all samples left at one exit, over what that costs; the network alone: {base:.4f}.",
            lambda ax: plotting.draw_accuracy(ax, page.record),
        ),
        "reliability": _drawn(
            5, "Accuracy over confidence.", lambda ax: plotting.draw_reliability(ax, page.record, page.limits)
        ),
        "certainty": _drawn(
            6,
            "How sure every exit is when it is right, and when it is wrong, and its threshold.",
            lambda ax: plotting.draw_certainty(ax, page.record, page.limits),
        ),
    }


def _rendered(*, page: _Page, curves: Mapping[str, Curve], times: Mapping[str, Ratio], **rest: Any) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    few = len(page.classes) <= _MATRIX
    return jinja.from_string(template).render(
        page=page,
        figures={name: Markup(svg) for name, svg in _figures(page, curves, times).items()},
        times=times,
        points=[(budget, page.halves.at(budget)) for budget in (i / 10 for i in range(1, 11))],
        matrix=page.confusion().tolist() if few else None,
        confused=page.confused(),
        **rest,
    )


def refuse_no_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a report needs matplotlib: pip install 'e2cm_ext[plot]'") from error
