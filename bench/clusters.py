"""Exits of a trained network that were fitted without a label: to the network's predictions, or to clusters of them.

    python -m bench clusters networks.py "cifar10_resnet(20)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

`networks.py`, the call and the data are those of `python -m bench curves`. Exits are fitted on the first --fit training
images and thresholds found on the next --held-out; accuracy is that of the first --test test images: where there are
clusters, clustering accuracy, under the best one-to-one matching with the classes.

"k-means of its own": in place of clusters of the network's outputs, k-means of the features at each exit (the
statistics that its head reads, each divided by its standard deviation), with numbers matched to those of the network's
clusters. It is measured to show what learning from the clusters of the whole network is worth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext import clusters, ops

from . import common

BUDGETS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def measure_exits(ee: e2cm.EarlyExit, held_out: list[Tensor], test: list[Tensor], truth: Tensor) -> dict[str, Any]:
    """Clustering accuracy of every exit and at every budget; thresholds are found without labels."""
    curve = ee.curve(held_out)
    on_test = ee.record(test)
    points = []
    for budget in BUDGETS:
        run = on_test.replay(curve.best_within(budget).thresholds)
        points.append({"budget": budget, "flops": run.flops, "accuracy": clustering_accuracy(run.prediction, truth)})
    return {
        "cost of leaving": ee.costs.fractions.tolist(),
        "accuracy at the exits": [clustering_accuracy(column, truth) for column in on_test.prediction.unbind(1)],
        "agreement at the exits": on_test.accuracy.tolist(),
        "points": points,
    }


def clustering_accuracy(found: Tensor, truth: Tensor) -> float:
    return clusters.scores(found.long(), truth).accuracy


@torch.no_grad()
def k_means_at_exits(ee: e2cm.EarlyExit, fit: list[Tensor], test: list[Tensor], truth: Tensor) -> list[float]:
    """Clustering accuracy of every exit, with clusters of its own features."""
    whole = torch.cat([ee.stages(images).argmax(1) for images in fit])
    accuracies = []
    for fitted, tested in zip(features(ee, fit), features(ee, test), strict=True):
        deviation = fitted.std(0).where(fitted.std(0) > 0, 1.0)
        means, found = clusters.k_means(fitted / deviation, ee.num_classes)
        numbers = clusters.matching(found, whole, ee.num_classes)
        predictions = numbers[ops.class_distances(tested / deviation, means).argmin(1)]
        accuracies.append(clustering_accuracy(predictions, truth))
    return accuracies


def features(ee: e2cm.EarlyExit, batches: list[Tensor]) -> list[Tensor]:
    """What the head of each exit reads."""
    rows: list[list[Tensor]] = [[] for _ in ee.heads]
    for images in batches:
        x = images
        for j, (stage, head) in enumerate(zip(ee.stages, ee.heads, strict=False)):
            x = stage(x)
            rows[j].append(ops.statistics(x, head.statistics))
    return [torch.cat(each) for each in rows]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    def images(split: str, part: slice) -> tuple[list[Tensor], Tensor]:
        pairs = list(common.images(options, split, part))
        return [x for x, _ in pairs], torch.cat([y for _, y in pairs])

    fit, _ = images("train", slice(options.fit))
    held_out, _ = images("train", slice(options.fit, options.fit + options.held_out))
    test, truth = images("test", slice(options.test))
    ee = e2cm.EarlyExit(common.network(options), fit[0][:1], exits=options.exits)
    result: dict[str, Any] = {"network": options.call, "data": Path(options.data).name, "exits": list(ee.exit_names)}
    result |= {"fitted on": options.fit, "thresholds from": options.held_out, "test images": options.test}
    result["own answers"] = measure_exits(ee.fit(fit, labels=None), held_out, test, truth)
    ee.fit(fit, labels=None, clusters=options.clusters)
    result["clusters"] = measure_exits(ee, held_out, test, truth)
    result["k-means of its own"] = {"accuracy at the exits": k_means_at_exits(ee, fit, test, truth)}
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("clusters", __doc__)
    common.add_network(parser)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--exits", type=int, default=6)
    parser.add_argument("--fit", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--test", type=int, default=4000)
    options = common.parse(parser, argv)
    result = measure(options)
    print(json.dumps(result, indent=1))
    common.save(options, result, "scikit-learn")
