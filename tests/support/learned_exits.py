"""What any network with learned exits must do, whatever has trained it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from e2cm_ext import EarlyExit, OperatingPoint
from support.networks import all_of
from support.tensors import assert_same_decisions, same_bits


def check_all_ways(ee: EarlyExit, loader, path: Path, flops: float = 0.7) -> OperatingPoint:
    """Record, curve, calibrate, predict, evaluate, save and load: that they work, and agree with each other."""
    record = ee.record(loader, progress=False)
    assert ee.curve(record, progress=False).at(flops).flops <= flops
    point = ee.calibrate(record, flops=flops, progress=False)
    assert point.flops <= flops
    replay = record.replay(ee.thresholds)
    images, labels = all_of(loader)
    decisions = ee.predict(images)
    # In smaller batches convolutions round otherwise.
    assert (decisions.exit == replay.exit).double().mean() > 0.99
    assert (decisions.prediction == replay.prediction).double().mean() > 0.99
    found = ee.evaluate(loader, progress=False)
    assert abs(found.accuracy - float((decisions.prediction == labels).double().mean())) < 0.01
    assert abs(found.flops - point.flops) < 0.01
    assert abs(found.flops - replay.flops) < 0.01
    ee.save(path)
    model = copy.deepcopy(ee.stages)
    again = EarlyExit.load(path, model)
    assert same_bits(again.thresholds, ee.thresholds)
    assert (again.rule, again.combination) == (ee.rule, ee.combination)
    assert_same_decisions(again.predict(images), decisions)
    assert torch.equal(again(images), ee(images))
    return point
