"""DEC with early exits on real images: clustering accuracy over FLOPs, mean over seeds, and the time it takes.

    python -m bench dec mnist.npz --seeds 0 1 2 --work runs --json FILE --picture dec-mnist.svg

The images are a .npz file as `e2cm_ext.data.load` reads it, or the name of a torchvision data set such as FashionMNIST.
Encoders are trained, and thresholds are found, on the training images without their labels; clustering accuracy, NMI
and ARI are of the test images. A run that is stopped continues from what is in --work.

Budgets are met on the training images, by the paper's search, with a single vector of thresholds; FLOPs and accuracy
are then those of the test images. "cost": of an encoder by itself, as the paper draws it, over that of the large one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext import clusters
from e2cm_ext.methods import dec
from e2cm_ext.utils.timing import ratio, time_interleaved

from . import common

BUDGETS = [0.24, 0.26, 0.28, 0.3, 0.325, 0.35, 0.375, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
TIMED = [0.3, 0.4, 0.5, 0.7]
Images = tuple[Tensor, Tensor]  # and their labels


# ---- training -------------------------------------------------------------------------------------------------------


def trained(options: argparse.Namespace, seed: int, images: Tensor) -> tuple[e2cm.EarlyExit, dec.TrainingResult, float]:
    """And the seconds of this process that the training took, over all runs."""
    clock = options.work / f"seed-{seed}.seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0
    start = time.process_time()
    ee = dec.build(images[:1], clusters=options.clusters, seed=seed)
    try:
        found = dec.train(
            ee,
            images.split(1000),
            distort=None if options.plain else dec.shifted,
            schedule=schedule(options),
            seed=seed,
            checkpoint=options.work / f"seed-{seed}.dec",
            precision=torch.bfloat16 if options.bfloat16 else None,
        )
    finally:
        seconds = before + time.process_time() - start
        clock.write_text(str(seconds))
    return ee, found, seconds


def schedule(options: argparse.Namespace) -> dec.Schedule:
    return dec.Schedule(**json.loads(options.schedule))


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure_seed(options: argparse.Namespace, seed: int, train: Images, test: Images) -> dict[str, Any]:
    ee, found, seconds = trained(options, seed, train[0])
    on_train, on_test = (ee.record(list(images.split(1000))) for images, _ in (train, test))
    searched = e2cm.curve(on_train, method="paper")
    result = {
        "seed": seed,
        "seconds of training": seconds,
        "of the training images": encoders(ee, found, train[1]),
        "exits": exits(ee, on_test, test[1]),
        "curve": curve_on_test(searched, on_test, test[1]),
    }
    if options.time and seed == options.seeds[0]:
        result["time"] = times(options, ee, searched, test[0])
    return result


def encoders(ee: e2cm.EarlyExit, found: dec.Trained, truth: Tensor) -> list[dict[str, Any]]:
    """Clustering of the training images by every encoder, at the start of DEC and at its end."""
    names = ["large", *reversed(ee.exit_names)]
    return [
        {
            "encoder": name,
            "k-means": clusters.scores(start, truth)._asdict(),
            "DEC": clusters.scores(end, truth)._asdict(),
            "changed between targets": changed,
        }
        for name, start, end, changed in zip(names, found.start, found.assignment, found.changed, strict=True)
    ]


def exits(ee: e2cm.EarlyExit, on_test: e2cm.Record, truth: Tensor) -> list[dict[str, Any]]:
    names, columns = [*ee.exit_names, "large"], on_test.prediction.long().unbind(1)
    return [
        {"exit": name, "cost": cost, "cost of leaving": leaving, **clusters.scores(column, truth)._asdict()}
        for name, cost, leaving, column in zip(
            names, single_costs(ee), ee.costs.fractions.tolist(), columns, strict=True
        )
    ]


def curve_on_test(searched: e2cm.Curve, on_test: e2cm.Record, truth: Tensor) -> list[dict[str, Any]]:
    points = []
    for budget in BUDGETS:
        if budget < searched.front.flops.min():
            continue
        thresholds = searched.best_within(budget).thresholds
        run = on_test.replay(thresholds)
        scores = clusters.scores(run.prediction, truth)
        points.append({"budget": budget, "flops": run.flops, **scores._asdict(), "thresholds": thresholds.tolist()})
    return points


def single_costs(ee: e2cm.EarlyExit) -> list[float]:
    """Of each encoder by itself."""
    own = [sum(ee.costs.stages[: j + 1]) + head for j, head in enumerate(ee.costs.heads)]
    return [cost / ee.costs.base for cost in (*own, ee.costs.base)]


@torch.inference_mode()
def times(options: argparse.Namespace, ee: e2cm.EarlyExit, curve: e2cm.Curve, images: Tensor) -> list[dict[str, Any]]:
    """Batches of test images through the network and through its exits, interleaved."""
    batches = images.split(options.batch)[:16]

    def run(network: Callable[[Tensor], Any]) -> Callable[[], None]:
        def all_batches() -> None:
            for batch in batches:
                network(batch)

        return all_batches

    rows = []
    for budget in TIMED:
        ee.thresholds = curve.best_within(budget).thresholds
        fraction = ee.evaluate(batches, progress=False).flops
        seconds = time_interleaved({"network": run(ee.stages), "exits": run(ee.predict)}, options.rounds)
        found = ratio(seconds["exits"], seconds["network"])
        rows.append({"flops": fraction, "time": found.median, "10th": found.p10, "90th": found.p90})
    return rows


def mean_curve(seeds: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Over the seeds, at every budget that all of them can meet."""
    points = []
    for budget in BUDGETS:
        found = [point for one in seeds for point in one["curve"] if point["budget"] == budget]
        if len(found) == len(seeds):
            mean = {key: statistics.mean(point[key] for point in found) for key in ("flops", "accuracy", "nmi", "ari")}
            points.append({"budget": budget, **mean})
    return points


def draw(path: Path, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for one in result["seeds"]:
        ax.plot(*zip(*[(p["flops"], p["accuracy"]) for p in one["curve"]], strict=True), color="0.7", lw=1)
    mean = [(p["flops"], p["accuracy"]) for p in result["mean"]]
    ax.plot(*zip(*mean, strict=True), color="C3", marker=".", label="mean")
    for exit in result["seeds"][0]["exits"]:
        ax.axvline(exit["cost"], color="0.3", ls=":", lw=1)
        ax.annotate(exit["exit"], (exit["cost"], ax.get_ylim()[0]), rotation=90, ha="right", va="bottom")
    ax.set(xlabel="FLOPs, of the large encoder's", ylabel="clustering accuracy", title=result["data"])
    ax.legend()
    figure.savefig(path, dpi=120)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    def images(split: str, part: slice | None = None) -> Images:
        return common.concatenated(common.images(options, split, part, channels_last=False))

    train, test = images("train", slice(options.images) if options.images else None), images("test")
    seeds = [measure_seed(options, seed, train, test) for seed in options.seeds]
    return {
        "data": Path(options.data).stem.lower(),
        "training images": len(train[1]),
        "test images": len(test[1]),
        "distorted": not options.plain,
        "schedule": asdict(schedule(options)),
        "bfloat16": options.bfloat16,
        "mean": mean_curve(seeds),
        "seeds": seeds,
    }


def arguments() -> argparse.ArgumentParser:
    parser = common.argument_parser("dec", __doc__, seed=False)
    common.add_images(parser)
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs"), help="checkpoints")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--images", type=int, help="the first so many training images; default: all")
    add("--clusters", type=int, default=10)
    add("--schedule", default="{}", help="JSON, of the fields of dec.Schedule that are to be others")
    add("--plain", action="store_true", help="as in the paper: no distorted images")
    add("--bfloat16", action="store_true", help="for the products of matrices in training")
    add("--time", action="store_true", help="measure times with the first seed, too")
    add("--batch", type=int, default=256)
    add("--rounds", type=int, default=11)
    add("--picture", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = common.parse(arguments(), argv)
    options.work.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    for point in result["mean"]:
        print(f"budget {point['budget']:.3f}: FLOPs {point['flops']:.4f}, accuracy {point['accuracy']:.4f}")
    common.save(options, result)
    if options.picture:
        draw(options.picture, result)
