"""E2CM on a trained network and real images: accuracy at every exit, and the curve of accuracy over FLOPs.

    python -m bench curves networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

`networks.py` is a file of yours; the call in quotes is made in it, and returns a network in eval mode (or a tuple that
begins with one). The images are a .npz file as `e2cm_ext.data.load` reads it, or the name of a torchvision data set.

Heads are fitted on the first --fit training images (default: all). Thresholds are searched twice: on the other
training images (on all, as the paper does, if there are no others), and on --held-out test images drawn with a fixed
seed, which the network has never seen; the first are measured on all test images, the second on the other test images.
Nothing is chosen on the images that are reported on, except "lossless": the lowest budget, in steps of .01, at which
the accuracy measured is within .001 of the network's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

import e2cm_ext as e2cm

from . import common, markdown

BUDGETS = [0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
LOSSLESS = 0.001
T = TypeVar("T")


# ---- what thresholds give -------------------------------------------------------------------------------------------


def measured_at(budgets: list[float], curve: e2cm.Curve, record: e2cm.Record) -> list[dict[str, float] | None]:
    """What the thresholds found for each budget do on another record; by time sharing, as the paper draws curves."""

    def measured(budget: float) -> dict[str, float] | None:
        if budget < curve.flops[0]:
            return None  # cheaper than the first exit
        point = curve.at(budget)
        found = record.replay(point.thresholds)
        flops, accuracy = found.flops, found.accuracy
        if point.other is not None:
            other = record.replay(point.other.thresholds)
            flops = point.probability * flops + (1 - point.probability) * other.flops
            accuracy = point.probability * accuracy + (1 - point.probability) * other.accuracy
        return {"budget": budget, "flops": flops, "accuracy": accuracy}

    return [measured(budget) for budget in budgets]


def outcome(curve: e2cm.Curve, record: e2cm.Record) -> dict[str, Any]:
    """The thresholds of a curve, on another record."""
    base = float(record.accuracy[-1])
    fine = measured_at([i / 100 for i in range(1, 101)], curve, record)
    lossless = [point["flops"] for point in fine if point and point["accuracy"] >= base - LOSSLESS]
    return {
        "samples": len(record),
        "network": base,
        "lossless at": min(lossless, default=None),
        "points": measured_at(BUDGETS, curve, record),
    }


def outcome_of_selection(chosen: e2cm.Selection, record: e2cm.Record, others: e2cm.Record) -> dict[str, Any]:
    """Some exits, with thresholds from the whole of the record that has chosen them."""
    found = outcome(e2cm.curve(record.at_exits(chosen.names)), others.at_exits(chosen.names))
    return found | {"exits": list(chosen.names)}


# ---- measuring ------------------------------------------------------------------------------------------------------


class Measurement:
    """One network with exits, its records, and the seconds that each step took."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seconds: dict[str, float] = {}
        self.train, self.test = self.images("train"), self.images("test")
        self.fitted_on = self.images("train", slice(options.fit)) if options.fit else self.train
        self.model = common.network(options)
        example, _ = next(iter(self.test))
        self.ee = e2cm.EarlyExit(self.model, example[:1], exits=options.exits, head=options.head)

    def images(self, split: str, part: slice | None = None) -> e2cm.data.Batches:
        return common.images(self.options, split, part, batch_size=self.options.batch)

    def timed(self, name: str, work: Callable[[], T]) -> T:
        found: list[T] = []
        self.seconds[name] = common.seconds_of(lambda: found.append(work()))
        return found[0]

    def fit(self) -> None:
        if self.options.time_forward:
            self.timed("the network alone on the images of fit", lambda: forward(self.model, self.fitted_on))
        self.timed("fit", lambda: self.ee.fit(self.fitted_on))

    def record(self, what: str, batches: e2cm.data.Batches) -> e2cm.Record:
        return self.timed(f"record of {what}", lambda: self.ee.record(batches))

    def thresholds(self, where: str, record: e2cm.Record, others: e2cm.Record) -> dict[str, Any]:
        """Those found on `record`, for all exits and for --select of them, measured on `others`."""
        count = self.options.select
        searched = self.timed(f"search on {where}", lambda: e2cm.curve(record, method=self.options.method))
        result = {f"thresholds from {where}": outcome(searched, others)}
        if count:
            chosen = self.timed(f"selection on {where}", lambda: e2cm.select(record, count))
            result[f"{count} exits and thresholds from {where}"] = outcome_of_selection(chosen, record, others)
        return result


@torch.inference_mode()
def forward(model: torch.nn.Module, batches: e2cm.data.Batches) -> None:
    for images, _ in batches:
        model(images)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    this = Measurement(options)
    this.fit()
    on_test = this.record("the test images", this.test)
    result = about(this, on_test)
    order = torch.randperm(len(on_test), generator=torch.Generator().manual_seed(options.seed))
    held_out, others = on_test.part(order[: options.held_out]), on_test.part(order[options.held_out :])
    result |= this.thresholds("held-out images", held_out, others)
    if options.fit or not options.skip_train:
        rest = this.images("train", slice(options.fit, None)) if options.fit else this.train
        on_train = this.record("training images", rest)
        result |= this.thresholds("training images", on_train, on_test)
        if options.records:
            on_train.save(options.records / "train.record")
    if options.records:
        on_test.save(options.records / "test.record")
    return result | {"seconds": this.seconds}


def about(this: Measurement, on_test: e2cm.Record) -> dict[str, Any]:
    options, costs = this.options, this.ee.costs
    accuracy = on_test.accuracy.tolist()
    return {
        "network": options.call,
        "data": Path(options.data).name,
        "head": options.head,
        "search": options.method,
        "fitted on": len(this.fitted_on.dataset),
        "exits": list(this.ee.exit_names),
        "cost of leaving": costs.fractions.tolist(),
        "cost of all heads": sum(costs.heads) / costs.base,
        "accuracy at the exits": accuracy[:-1],
        "accuracy of the network": accuracy[-1],
    }


# ---- the report -----------------------------------------------------------------------------------------------------


def format_report(result: dict[str, Any]) -> str:
    rows = zip(result["exits"], result["cost of leaving"], result["accuracy at the exits"], strict=False)
    lines = [
        f"{result['network']}, {result['data']}, {result['head']} fitted on {result['fitted on']} images; "
        f"the network alone: {result['accuracy of the network']:.4f}; all heads together cost "
        f"{result['cost of all heads']:.4f} of it",
        "",
        markdown.table(
            ["exit", "cost of leaving there", "accuracy if all samples exit there"],
            [[name, f"{cost:.4f}", f"{accuracy:.4f}"] for name, cost, accuracy in rows],
        ),
    ]
    for name, found in result.items():
        if isinstance(found, dict) and "points" in found:
            header = [f"FLOPs asked for, {name}", "FLOPs", f"accuracy on {found['samples']} others"]
            points = [[f"{p['budget']:.2f}", f"{p['flops']:.4f}", f"{p['accuracy']:.4f}"] for p in found["points"] if p]
            lossless = found["lossless at"]
            lines += ["", markdown.table(header, points, left=0)]
            lines += ["", f"within {LOSSLESS} of {found['network']:.4f} at {lossless and round(lossless, 4)}"]
    return "\n".join([*lines, "", ", ".join(f"{name}: {took:.1f} s" for name, took in result["seconds"].items())])


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("curves", __doc__)
    common.add_network(parser)
    parser.add_argument("--batch", type=int, default=128, help="images in one (default: 128)")
    parser.add_argument("--exits", default="blocks")
    parser.add_argument("--head", default="class_means")
    parser.add_argument("--method", default="auto", choices=["auto", "paper", "coordinate"], help="of threshold search")
    parser.add_argument("--fit", type=int, help="training images to fit on (default: all)")
    parser.add_argument("--held-out", type=int, default=2000, help="test images for thresholds (default: 2000)")
    parser.add_argument("--select", type=int, help="so many exits, too: chosen where thresholds are found")
    parser.add_argument("--skip-train", action="store_true", help="without --fit: no thresholds from training images")
    parser.add_argument("--time-forward", action="store_true", help="time the network without exits, too")
    parser.add_argument("--records", type=Path, help="a folder to keep the records in")
    options = common.parse(parser, argv)
    result = measure(options)
    print(format_report(result))
    common.save(options, result)
