"""Exits of a trained network that were fitted without a label: to its own answers, or to clusters of them.

    python bench/clusters.py networks.py "cifar10_resnet(20)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

`networks.py`, the call and the data are those of bench/curves.py. Exits are fitted on the first --fit training images
and thresholds found on the next --held-out; accuracy is that of the first --test test images: where there are clusters,
clustering accuracy, under the best one-to-one matching with the classes.

"k-means of its own": in place of clusters of the network's answers, k-means of what each exit's head looks at (its
statistics, each divided by its standard deviation), with numbers matched to those of the network's clusters. It is
measured to show what learning from the deepest clusters is worth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from curves import network, write
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext import clusters, ops

BUDGETS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def of_way(ee: e2cm.EarlyExit, held_out: list[Tensor], test: list[Tensor], truth: Tensor) -> dict[str, Any]:
    """Clustering accuracy of every exit and at every budget; thresholds from images whose labels nobody knows."""
    curve = ee.curve(held_out)
    on_test = ee.record(test)
    points = []
    for budget in BUDGETS:
        run = on_test.replay(curve.best_within(budget).thresholds)
        points.append({"budget": budget, "flops": run.flops, "accuracy": judged(run.prediction, truth)})
    return {
        "cost of leaving": ee.costs.fractions.tolist(),
        "accuracy at the exits": [judged(column, truth) for column in on_test.prediction.unbind(1)],
        "agreement at the exits": on_test.accuracy.tolist(),
        "points": points,
    }


def judged(found: Tensor, truth: Tensor) -> float:
    return clusters.scores(found.long(), truth).accuracy


@torch.no_grad()
def own_k_means(ee: e2cm.EarlyExit, fit: list[Tensor], test: list[Tensor], truth: Tensor) -> list[float]:
    """Clustering accuracy of every exit, had it clusters of its own."""
    whole = torch.cat([ee.stages(images).argmax(1) for images in fit])
    seen, unseen = features(ee, fit), features(ee, test)
    accuracies = []
    for mine, others in zip(seen, unseen, strict=True):
        spread = mine.std(0).where(mine.std(0) > 0, 1.0)
        means, found = clusters.k_means(mine / spread, ee.num_classes)
        numbers = clusters.matching(found, whole, ee.num_classes)
        answers = numbers[ops.class_distances(others / spread, means).argmin(1)]
        accuracies.append(judged(answers, truth))
    return accuracies


def features(ee: e2cm.EarlyExit, batches: list[Tensor]) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in ee.heads]
    for images in batches:
        x = images
        for j, (stage, head) in enumerate(zip(ee.stages, ee.heads, strict=False)):
            x = stage(x)
            rows[j].append(ops.statistics(x, head.statistics))
    return [torch.cat(each) for each in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path)
    parser.add_argument("call")
    parser.add_argument("data")
    parser.add_argument("--mean", type=float, nargs="+")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--exits", type=int, default=6)
    parser.add_argument("--fit", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--test", type=int, default=4000)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "clusters-resnet20-cifar10.json"
    )
    options = parser.parse_args()
    normalise = (options.mean, options.std) if options.mean else None

    def images(split: str, part: slice) -> tuple[list[Tensor], Tensor]:
        batches = e2cm.data.load(options.data, split=split, normalise=normalise, part=part, channels_last=True)
        pairs = list(batches)
        return [x for x, _ in pairs], torch.cat([y for _, y in pairs])

    fit, _ = images("train", slice(options.fit))
    held_out, _ = images("train", slice(options.fit, options.fit + options.held_out))
    test, truth = images("test", slice(options.test))
    model = network(options.networks, options.call).to(memory_format=torch.channels_last)
    ee = e2cm.EarlyExit(model, fit[0][:1], exits=options.exits)
    result: dict[str, Any] = {"network": options.call, "data": Path(options.data).name, "exits": list(ee.exit_names)}
    result |= {"fitted on": options.fit, "thresholds from": options.held_out, "test images": options.test}
    result["own answers"] = of_way(ee.fit(fit, labels=None), held_out, test, truth)
    ee.fit(fit, labels=None, clusters=options.clusters)
    result["clusters"] = of_way(ee, held_out, test, truth)
    result["k-means of its own"] = {"accuracy at the exits": own_k_means(ee, fit, test, truth)}
    print(json.dumps(result, indent=1))
    write(options.out, result)


if __name__ == "__main__":
    main()
