"""DEC with early exits on real images: clustering accuracy over FLOPs, mean over seeds, and the time it takes.

    python bench/dec.py mnist.npz --seeds 0 1 2 --work runs --picture bench/results/dec-mnist.png

The images are a .npz file as `e2cm_ext.data.load` reads it, or the name of a torchvision data set such as FashionMNIST.
Encoders are trained, and thresholds are found, on the training images without a look at their labels; clustering
accuracy, NMI and ARI are of the test images. A run that is stopped goes on from what is in --work.

Budgets are met on the training images, by the paper's search, with a single vector of thresholds; FLOPs and accuracy
are then those of the test images. "cost": of an encoder by itself, as the paper draws it, over that of the large one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from curves import write
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext import clusters
from e2cm_ext.methods import dec

BUDGETS = [0.24, 0.26, 0.28, 0.3, 0.325, 0.35, 0.375, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
TIMED = [0.3, 0.4, 0.5, 0.7]


def all_of(batches: e2cm.data.Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def trained(options: argparse.Namespace, seed: int, images: Tensor) -> tuple[e2cm.EarlyExit, dec.TrainingResult, float]:
    """And the seconds of this process that the training took, over all runs."""
    schedule = dec.Schedule(**json.loads(options.schedule))
    clock = options.work / f"seed-{seed}.seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0
    start = time.process_time()
    ee = dec.build(images[:1], clusters=options.clusters, seed=seed)
    try:
        found = dec.train(
            ee,
            images.split(1000),
            distort=None if options.plain else dec.shifted,
            schedule=schedule,
            seed=seed,
            checkpoint=options.work / f"seed-{seed}.dec",
            precision=torch.bfloat16 if options.bfloat16 else None,
        )
    finally:
        seconds = before + time.process_time() - start
        clock.write_text(str(seconds))
    return ee, found, seconds


def of_seed(options: argparse.Namespace, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Any:
    ee, found, seconds = trained(options, seed, train[0])
    truth = test[1]
    names = ["large", *reversed(ee.exit_names)]
    on_train = ee.record([images for images in train[0].split(1000)])
    on_test = ee.record([images for images in test[0].split(1000)])
    searched = e2cm.curve(on_train, method="paper")
    curve = []
    for budget in BUDGETS:
        if budget < searched.front.flops.min():
            continue
        thresholds = searched.best_within(budget).thresholds
        run = on_test.replay(thresholds)
        scores = clusters.scores(run.prediction, truth)
        curve.append({"budget": budget, "flops": run.flops, **scores._asdict(), "thresholds": thresholds.tolist()})
    columns = on_test.prediction.long().unbind(1)
    result = {
        "seed": seed,
        "seconds of training": seconds,
        "of the training images": [
            {
                "encoder": name,
                "k-means": clusters.scores(start, train[1])._asdict(),
                "DEC": clusters.scores(end, train[1])._asdict(),
                "changed between targets": changed,
            }
            for name, start, end, changed in zip(names, found.start, found.assignment, found.changed, strict=True)
        ],
        "exits": [
            {"exit": name, "cost": cost, "cost of leaving": leaving, **clusters.scores(column, truth)._asdict()}
            for name, cost, leaving, column in zip(
                [*ee.exit_names, "large"], single_costs(ee), ee.costs.fractions.tolist(), columns, strict=True
            )
        ],
        "curve": curve,
    }
    if options.time and seed == options.seeds[0]:
        result["time"] = timed(options, ee, searched, test[0])
    return result


def single_costs(ee: e2cm.EarlyExit) -> list[float]:
    """Of each encoder by itself."""
    own = [sum(ee.costs.stages[: j + 1]) + head for j, head in enumerate(ee.costs.heads)]
    return [cost / ee.costs.base for cost in (*own, ee.costs.base)]


@torch.inference_mode()
def timed(options: argparse.Namespace, ee: e2cm.EarlyExit, curve: e2cm.Curve, images: Tensor) -> list[dict[str, Any]]:
    """Batches of test images through the network and through its exits, in turns."""
    batches = images.split(options.batch)[:16]
    rows = []
    for budget in TIMED:
        ee.thresholds = curve.best_within(budget).thresholds
        fraction = ee.evaluate(batches, progress=False).flops
        ratios = []
        for _ in range(options.rounds):
            whole, early = (seconds(run, batches) for run in (ee.stages, ee.predict))
            ratios.append(early / whole)
        low, *_, high = statistics.quantiles(ratios, n=10)
        rows.append({"flops": fraction, "time": statistics.median(ratios), "10th": low, "90th": high})
    return rows


def seconds(run: Callable[[Tensor], Any], batches: tuple[Tensor, ...]) -> float:
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    return time.perf_counter() - start


def mean_curve(seeds: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Over the seeds, at every budget that all of them can meet."""
    points = []
    for budget in BUDGETS:
        there = [point for one in seeds for point in one["curve"] if point["budget"] == budget]
        if len(there) == len(seeds):
            mean = {key: statistics.mean(point[key] for point in there) for key in ("flops", "accuracy", "nmi", "ari")}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a .npz file, or the name of a torchvision data set")
    parser.add_argument("--root", default="data", help="of torchvision data sets")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, help="the first so many training images; default: all")
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--schedule", default="{}", help="JSON, of the fields of dec.Schedule that are to be others")
    parser.add_argument("--plain", action="store_true", help="as in the paper: no distorted images")
    parser.add_argument("--bfloat16", action="store_true", help="for the products of matrices in training")
    parser.add_argument("--time", action="store_true", help="measure times with the first seed, too")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)

    def images(split: str, part: slice | None = None) -> tuple[Tensor, Tensor]:
        return all_of(e2cm.data.load(options.data, split=split, root=options.root, normalise=None, part=part))

    train, test = images("train", slice(options.images) if options.images else None), images("test")
    seeds = [of_seed(options, seed, train, test) for seed in options.seeds]
    name = Path(options.data).stem.lower()
    result = {
        "data": name,
        "training images": len(train[1]),
        "test images": len(test[1]),
        "distorted": not options.plain,
        "schedule": asdict(dec.Schedule(**json.loads(options.schedule))),
        "bfloat16": options.bfloat16,
        "mean": mean_curve(seeds),
        "seeds": seeds,
    }
    for point in result["mean"]:
        print(f"budget {point['budget']:.3f}: FLOPs {point['flops']:.4f}, accuracy {point['accuracy']:.4f}")
    write(options.out or Path(__file__).parent / "results" / f"dec-{name}.json", result)
    if options.picture:
        draw(options.picture, result)


if __name__ == "__main__":
    main()
