"""A report on one network with early exits: a single HTML file without external resources."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from ..calibration.profile import Profile
from ..calibration.record import Record
from ..early_exit import EarlyExit
from ..utils import serialization
from .gallery import Restore, build_gallery
from .measurement import SplitCurve, environment, first_images
from .template import check_matplotlib, render
from .view import CURRENT, ComparisonRow, PageView

__all__ = ["write"]


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
    compared: Sequence[ComparisonRow] = (),
    command: str = "",
    progress: bool = True,
) -> Record:
    """Evaluate a network with its exits, and write a report as one HTML file.

    The report shows accuracy, FLOPs and measured time under the current thresholds; curves over FLOPs and time; where
    samples leave, by class; mistakes of early exits; images with high and low confidence at every exit; calibration of
    the confidences; and the environment.

    The curves are not biased by the threshold search: thresholds are searched on one half of the samples and evaluated
    on the other half. Everything else is about the current thresholds, on all samples.

    Args:
        path: Where the report goes. A file at `path` stays as it is until the new one is complete.
        ee: The network. Its thresholds are not changed.
        loader: Batches of (images, labels); several passes are made.
        title: Heading of the page.
        data: A line on what the samples are.
        classes: Names of the classes. By default their numbers.
        restore: Turns a batch, as the network takes it, into images [B, C, H, W] in [0, 1], for display. By default
            each image is rescaled to this range.
        batch_size: At which times are measured.
        profile: Times of stages and exits. By default they are measured.
        compared: Rows of the table at the top, with curves. By default the network without and with exits.
        command: The command that made the report.
        progress: Show progress bars.

    Returns:
        The record of the samples of `loader`.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError: The folder of `path` does not exist.
        ValueError: `classes` has fewer names than the network has classes.

    Example:
        >>> from e2cm_ext import report
        >>> report.write("report.html", ee, loader, title="ResNet-56, CIFAR-10", classes=("airplane", ...))
    """
    check_matplotlib()
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):  # before the work, not after it
        raise FileNotFoundError(f"{os.fspath(path)} cannot be written: there is no folder {folder}")
    names = [str(name) for name in classes] if classes else [str(k) for k in range(ee.num_classes)]
    if len(names) < ee.num_classes:
        raise ValueError(f"`classes` has {len(names)} names; wanted {ee.num_classes}")
    record = ee.record(loader, progress)
    images = first_images(loader, batch_size)
    if profile is None:
        profile = ee.profile(images, batch_size, progress=progress)
    batch_size = min(batch_size, profile.sizes[-1])
    view = PageView(ee, record, SplitCurve(ee, record, progress), profile, batch_size, names)
    timed = view.timed_points(images, progress)
    html = render(
        view,
        {row.name: row.curve for row in compared if row.curve is not None} or {"": view.split.curve},
        timed,
        title=title,
        data=data,
        comparison=compared or view.comparison(timed[CURRENT].time),
        gallery=build_gallery(record, view.replay, names, loader, restore),
        environment=environment(ee),
        command=command,
    )
    with serialization.atomic_write(path) as file:
        file.write(html.encode())
    return record
