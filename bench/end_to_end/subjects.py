"""The networks that are timed: their exits, thresholds and images."""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import e2cm_ext as e2cm
from e2cm_ext.cli import model_loader

from .. import common

EVEN_EXITS = 6  # of a network of torchvision


class Subject(NamedTuple):
    name: str
    model: nn.Module
    images: Tensor
    exits: dict[str, e2cm.EarlyExit]
    thresholds: dict[tuple[str, float], Tensor]  # for which exits and FLOPs


def trained(options: argparse.Namespace) -> Subject:
    """The network that the arguments name; exits and thresholds from the first test images."""
    model = common.network(options).to(options.device)
    part = slice(options.found, options.found + options.images)
    others, _ = common.concatenated(common.images(options, "test", part))
    ee = e2cm.EarlyExit(model, others[:1].to(options.device), head=options.head)
    ee.fit(common.images(options, "train", slice(options.fit)), progress=False)
    record = ee.record(common.images(options, "test", slice(options.found)), progress=False)
    few = ee.select(record, options.count, progress=False)
    assert few.selection is not None
    found = [(f"{options.count} selected", few, few.selection.curve)]
    if not options.selected:
        found.append((f"all {len(ee.heads)}", ee, ee.curve(record, progress=False)))
    exits, thresholds = {}, {}
    for name, some, curve in found:
        exits[name] = some
        thresholds |= {(name, budget): curve.best_within(budget).thresholds for budget in options.budgets}
    return Subject(options.call, model, placed(others, options), exits, thresholds)


def untrained(name: str, options: argparse.Namespace) -> Subject:
    """A network of torchvision with random weights, exits of random weights, and images of noise."""
    torch.manual_seed(options.seed)
    model, _ = model_loader.load(f"torchvision/{name}", weights="random")
    model = model.to(options.device, memory_format=torch.channels_last)
    images = placed(torch.randn(options.images, 3, options.size, options.size), options)
    ee = e2cm.EarlyExit(model, images[:1], exits=EVEN_EXITS, head=options.head)
    fit_randomly(ee, images[:32])
    record = ee.record([(x, torch.zeros(len(x), dtype=torch.int64)) for x in images.split(32)], progress=False)
    thresholds = {(str(EVEN_EXITS), budget): even_thresholds(record, budget) for budget in options.budgets}
    return Subject(name, model, images, {str(EVEN_EXITS): ee}, thresholds)


@torch.no_grad()
def fit_randomly(ee: e2cm.EarlyExit, x: Tensor) -> None:
    """Logits that differ from image to image by much more than rounding does, so that all ways decide alike."""
    for stage, head in zip(ee.stages, ee.heads, strict=False):
        x = stage(x)
        features = e2cm.ops.statistics(x, head.statistics)
        deviation, mean = torch.std_mean(features, 0)
        head.weight.normal_().div_(deviation.clamp(min=1e-3 * deviation.max()) * len(mean) ** 0.5 / 3)
        head.bias.copy_(-head.weight @ mean)
        head.fitted = True


def placed(images: Tensor, options: argparse.Namespace) -> Tensor:
    return images.to(options.device).contiguous(memory_format=torch.channels_last)


def even_thresholds(record: e2cm.Record, flops: float) -> Tensor:
    """Thresholds at which the same share of the remaining samples leaves at every exit."""
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        remaining = torch.ones(len(record), dtype=torch.bool)
        limits = []
        for certainty in record.confidence.T[:-1]:
            limits.append(certainty[remaining].quantile(1 - share).item() if remaining.any() else math.inf)
            remaining &= certainty <= limits[-1]
        low, high = (share, high) if record.replay(limits).flops > flops else (low, share)
    return torch.tensor(limits)
