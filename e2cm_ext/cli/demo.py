"""All of it on a small scale: a residual network is trained on scikit-learn's digits, gets exits, and is measured.

The digits, 8x8, lie anywhere on a noisy canvas of 12x12: as they are, the first layer knows nearly all of them. Of the
1,797 digits 1,000 train the network and fit the exits, 350 find the thresholds, and 447 are reported on, in two places
each. The paper's method, ours and a trained rival (SDN) stand on the same network and are asked for the same FLOPs;
each is timed against the network, in turns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import data, report
from ..calibration.curves import Curve, Method
from ..early_exit import EarlyExit
from ..methods import sdn
from ..report import ComparisonRow
from ..utils.timing import Ratio

__all__ = ["Digits", "Residual", "digits", "network", "run", "trained"]

_TRAIN, _HELD_OUT = 1000, 350
_BATCH, _CANVAS, _NOISE = 128, 12, 0.2


class Digits(NamedTuple):
    """Batches of (images [B, 1, 12, 12] in [0, 1], labels): three parts without a common sample."""

    train: data.Batches
    held_out: data.Batches
    test: data.Batches


def digits() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn: pip install 'e2cm_ext[demo]'") from error
    found = load_digits()
    images, labels = torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = torch.split(order, [_TRAIN, _HELD_OUT, len(order) - _TRAIN - _HELD_OUT])
    return Digits(*(_batches(images[rows], labels[rows], seed) for seed, rows in enumerate(parts)))


def _batches(images: Tensor, labels: Tensor, seed: int) -> data.Batches:
    """All of them twice, in other places."""
    draw = torch.Generator().manual_seed(seed)
    every = torch.cat([somewhere(images, draw) for _ in range(2)])
    arrays = data.Arrays(every[:, 0], labels.repeat(2), normalise=None, classes=[str(k) for k in range(10)])
    return data.Batches(arrays, batch_size=_BATCH, shuffle=True)


def somewhere(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each of them anywhere on a noisy canvas: [B, 1, 8, 8] -> [B, 1, 12, 12]."""
    room = _CANVAS - images.shape[-1] + 1
    canvas = torch.zeros(len(images), 1, _CANVAS, _CANVAS)
    for image, place, (top, left) in zip(
        images, canvas, torch.randint(room, (len(images), 2), generator=draw).tolist(), strict=True
    ):
        place[:, top : top + images.shape[-2], left : left + images.shape[-1]] = image
    return (canvas + _NOISE * torch.randn(canvas.shape, generator=draw)).clamp(0, 1)


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.around = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        out: Tensor = (y + self.around(x)).relu()
        return out


def network(width: int = 16, blocks: int = 4) -> nn.Module:
    """A stem, `blocks` residual blocks on 12x12 and as many, twice as wide, on 6x6, and a classifier."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    large = (Residual(width, width, 1) for _ in range(blocks))
    small = (Residual(2 * width if j else width, 2 * width, 1 if j else 2) for j in range(blocks))
    return nn.Sequential(stem, *large, *small, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def trained(model: nn.Module, batches: data.Batches, epochs: int, progress: bool = True) -> nn.Module:
    """By Adam, with a learning rate that rises and falls, on images moved around; the same every time."""
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    draw = torch.Generator().manual_seed(0)
    steps = epochs * math.ceil(len(images) / _BATCH)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    model.train()
    for _ in tqdm(range(epochs), desc="train the network", unit="epoch", disable=not progress, leave=False):
        for rows in torch.split(torch.randperm(len(images), generator=draw), _BATCH):
            down, right = torch.randint(-1, 2, (2,), generator=draw).tolist()
            moved = images[rows].roll((down, right), (2, 3))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(moved), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


class _Way(NamedTuple):
    name: str
    ee: EarlyExit
    method: Method | Callable[..., Curve]  # of finding thresholds


def run(
    out: str | os.PathLike[str],
    *,
    flops: float = 0.5,
    small: bool = False,
    command: str = "e2cm demo",
    progress: bool = True,
) -> list[ComparisonRow]:
    """Writes the report to `out`; returns the rows of its table, the network alone first."""
    report.check_matplotlib()
    parts = digits()
    torch.manual_seed(0)
    model = trained(network(8, 3) if small else network(), parts.train, epochs=3 if small else 12, progress=progress)
    ways = _ways(model, parts, epochs=2 if small else 12, progress=progress)
    images = report.first_images(parts.test, _BATCH)
    rows = [_network_alone(model, parts.test)]
    for way in ways:
        record = way.ee.record(parts.held_out, progress)
        curve = way.ee.curve(record, progress, method=way.method) if isinstance(way.method, str) else way.method(record)
        point = curve.best_within(flops)
        way.ee.thresholds = point.thresholds
        on_test = curve.on(way.ee.record(parts.test, progress))
        found = way.ee.evaluate(parts.test, progress)
        used = f"{int((found.exits[:-1] > 0).sum())} of {len(way.ee.exit_names)}"
        time = report.measure_times(way.ee, images, {"set": point.thresholds}, progress=progress)["set"]
        rows.append(ComparisonRow(way.name, found.accuracy, found.flops, time, used, on_test))
    report.write(
        Path(out),
        ways[-1].ee,
        parts.test,
        title="Handwritten digits, a small residual network",
        data="scikit-learn's digits on a noisy canvas, not seen by the network, its exits or their thresholds",
        classes=parts.test.classes,
        restore=lambda images: images,
        batch_size=_BATCH,
        compared=rows,
        command=command,
        progress=progress,
    )
    return rows


def _ways(model: nn.Module, parts: Digits, epochs: int, progress: bool) -> list[_Way]:
    """Ours last: the report is about it."""
    example = report.first_images(parts.train, 1)
    rival = sdn.build(model, example)
    sdn.train(rival, parts.train, epochs=epochs, progress=progress)
    paper = EarlyExit(model, example, head="class_means").fit(parts.train, progress)
    ours = EarlyExit(model, example, head="whitened_means").fit(parts.train, progress)
    return [
        _Way("class means (the paper)", paper, "paper"),
        _Way("SDN, exits trained", rival, sdn.curve),
        _Way("whitened means (ours)", ours, "auto"),
    ]


def _network_alone(model: nn.Module, batches: data.Batches) -> ComparisonRow:
    right = count = 0
    with torch.inference_mode():
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
            count += len(labels)
    return ComparisonRow("the network alone", right / count, 1.0, Ratio(1.0, 1.0, 1.0))
