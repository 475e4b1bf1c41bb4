"""A small complete run: a residual network is trained on scikit-learn's digits, gets exits, and is measured.

Digits of 8x8 are placed at random on a noisy canvas of 12x12: without this the first exit recognises nearly all of
them. Of the 1,797 digits 1,000 train the network and fit the exits, 350 find the thresholds, and 447 are tested, in two
places each. Class means (the paper), whitened means and trained exits (SDN) share the network and get the same FLOPs
budget; each is timed against the network, interleaved.
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

__all__ = ["Digits", "ResidualBlock", "load_parts", "place_randomly", "residual_network", "run", "train"]

_TRAIN, _HELD_OUT = 1000, 350  # samples; the others are test samples
_BATCH_SIZE, _CANVAS, _NOISE = 128, 12, 0.2


class Digits(NamedTuple):
    """Batches of (images [B, 1, 12, 12] in [0, 1], labels), in three parts without a common digit."""

    train: data.Batches
    held_out: data.Batches
    test: data.Batches


def load_parts() -> Digits:
    """Load the digits, and split them into three parts.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn: pip install 'e2cm_ext[demo]'") from error
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = torch.split(order, [_TRAIN, _HELD_OUT, len(order) - _TRAIN - _HELD_OUT])
    return Digits(*(_batches(images[rows], labels[rows], seed) for seed, rows in enumerate(parts)))


def _batches(images: Tensor, labels: Tensor, seed: int) -> data.Batches:
    """Return all digits twice, in two places each."""
    generator = torch.Generator().manual_seed(seed)
    placed = torch.cat([place_randomly(images, generator) for _ in range(2)])
    arrays = data.Arrays(placed[:, 0], labels.repeat(2), normalise=None, classes=[str(k) for k in range(10)])
    return data.Batches(arrays, batch_size=_BATCH_SIZE, shuffle=True)


def place_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Place each image at random on a noisy canvas: [B, 1, 8, 8] -> [B, 1, 12, 12]."""
    places = _CANVAS - images.shape[-1] + 1
    canvases = torch.zeros(len(images), 1, _CANVAS, _CANVAS)
    corners = torch.randint(places, (len(images), 2), generator=generator).tolist()
    for image, canvas, (top, left) in zip(images, canvases, corners, strict=True):
        canvas[:, top : top + images.shape[-2], left : left + images.shape[-1]] = image
    return (canvases + _NOISE * torch.randn(canvases.shape, generator=generator)).clamp(0, 1)


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        out: Tensor = (y + self.shortcut(x)).relu()
        return out


def residual_network(width: int = 16, blocks: int = 4) -> nn.Module:
    """Return a network of a stem, residual blocks on 12x12 and on 6x6, and a classifier.

    Args:
        width: Channels on 12x12; on 6x6 there are twice as many.
        blocks: Number of blocks on 12x12, and on 6x6.
    """
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    large = (ResidualBlock(width, width, 1) for _ in range(blocks))
    small = (ResidualBlock(2 * width if j else width, 2 * width, 1 if j else 2) for j in range(blocks))
    return nn.Sequential(stem, *large, *small, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def train(model: nn.Module, batches: data.Batches, epochs: int, progress: bool = True) -> nn.Module:
    """Train with Adam, a one-cycle learning rate and random shifts; return the model in eval mode. Deterministic."""
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    generator = torch.Generator().manual_seed(0)
    steps = epochs * math.ceil(len(images) / _BATCH_SIZE)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    model.train()
    for _ in tqdm(range(epochs), desc="train the network", unit="epoch", disable=not progress, leave=False):
        for rows in torch.split(torch.randperm(len(images), generator=generator), _BATCH_SIZE):
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            shifted = images[rows].roll((down, right), (2, 3))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shifted), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


class _ExitMethod(NamedTuple):
    name: str
    ee: EarlyExit
    search: Method | Callable[..., Curve]  # method of the threshold search, or a function of a record


def run(
    out: str | os.PathLike[str],
    *,
    flops: float = 0.5,
    small: bool = False,
    command: str = "e2cm demo",
    progress: bool = True,
) -> list[ComparisonRow]:
    """Run the demo, and write a report on whitened means.

    Args:
        out: File of the report.
        flops: Budget of all methods, as a fraction of the network's FLOPs.
        small: Take a smaller network and fewer epochs.
        command: Shown in the report.
        progress: Show progress bars.

    Returns:
        The rows of the report's table: first the network alone, then each method.

    Raises:
        ImportError: matplotlib or scikit-learn is missing.
    """
    report.check_matplotlib()
    parts = load_parts()
    torch.manual_seed(0)
    model = residual_network(8, 3) if small else residual_network()
    model = train(model, parts.train, epochs=3 if small else 12, progress=progress)
    methods = _fit_methods(model, parts, epochs=2 if small else 12, progress=progress)
    images = report.first_images(parts.test, _BATCH_SIZE)
    rows = [_network_alone(model, parts.test)]
    for name, ee, search in methods:
        record = ee.record(parts.held_out, progress)
        curve = ee.curve(record, progress, method=search) if isinstance(search, str) else search(record)
        thresholds = curve.best_within(flops).thresholds
        ee.thresholds = thresholds
        test_curve = curve.on(ee.record(parts.test, progress))
        found = ee.evaluate(parts.test, progress)
        used = f"{int((found.exits[:-1] > 0).sum())} of {len(ee.exit_names)}"
        time = report.measure_times(ee, images, {name: thresholds}, progress=progress)[name]
        rows.append(ComparisonRow(name, found.accuracy, found.flops, time, used, test_curve))
    report.write(
        Path(out),
        methods[-1].ee,
        parts.test,
        title="Handwritten digits, a small residual network",
        data="scikit-learn's digits on a noisy canvas, not used to train the network, fit exits or find thresholds",
        classes=parts.test.classes,
        restore=lambda images: images,
        batch_size=_BATCH_SIZE,
        compared=rows,
        command=command,
        progress=progress,
    )
    return rows


def _fit_methods(model: nn.Module, parts: Digits, epochs: int, progress: bool) -> list[_ExitMethod]:
    """Return the methods to compare. The report is about the last one."""
    example = report.first_images(parts.train, 1)
    sdn_exits = sdn.build(model, example)
    sdn.train(sdn_exits, parts.train, epochs=epochs, progress=progress)
    class_means = EarlyExit(model, example, head="class_means").fit(parts.train, progress)
    whitened_means = EarlyExit(model, example, head="whitened_means").fit(parts.train, progress)
    return [
        _ExitMethod("class means (the paper)", class_means, "paper"),
        _ExitMethod("SDN, trained exits", sdn_exits, sdn.curve),
        _ExitMethod("whitened means", whitened_means, "auto"),
    ]


def _network_alone(model: nn.Module, batches: data.Batches) -> ComparisonRow:
    correct = count = 0
    with torch.inference_mode():
        for images, labels in batches:
            correct += int((model(images).argmax(1) == labels).sum())
            count += len(labels)
    return ComparisonRow("the network alone", correct / count, 1.0, Ratio(1.0, 1.0, 1.0))
