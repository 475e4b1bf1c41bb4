"""E2CM on a trained network and real images: accuracy at every exit, and the curve of accuracy over FLOPs.

    python bench/curves.py networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

`networks.py` is a file of yours; the call in quotes is made in it, and returns a network in eval mode (or a tuple that
begins with one). The images are a .npz file as `e2cm_ext.data.load` reads it, or the name of a torchvision data set.

Heads are fitted on the first --fit training images (default: all). Thresholds are searched twice: on the other
training images (on all, as the paper does, if there are no others), and on --held-out test images drawn with a fixed
seed, which the network has never seen; the first are measured on all test images, the second on the other test images.
Nothing is chosen on the images that are reported on, but for "lossless": the lowest budget, in steps of .01, at which
the accuracy measured is within .001 of the network's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

import e2cm_ext as e2cm

BUDGETS = [0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
LOSSLESS = 0.001
SEED = 0
T = TypeVar("T")


def network(path: Path, call: str) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # torch.compile imports what a forward() uses by the name of its module
    spec.loader.exec_module(module)
    made = eval(call, vars(module))
    return made[0] if isinstance(made, tuple) else made


def timed(seconds: dict[str, float], name: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result


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


def write(path: Path, result: dict[str, Any]) -> None:
    """The figures, and where they come from."""
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": e2cm.build_info(),
    }
    path.write_text(json.dumps(about | result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    normalise = (options.mean, options.std) if options.mean else None

    def images(split: str, part: slice | None = None) -> e2cm.data.Batches:
        return e2cm.data.load(
            options.data, split=split, normalise=normalise, part=part, batch_size=options.batch, channels_last=True
        )

    train, test = images("train"), images("test")
    model = network(options.networks, options.call).to(memory_format=torch.channels_last)
    example, _ = next(iter(test))
    ee = e2cm.EarlyExit(model, example[:1], exits=options.exits, head=options.head)
    seconds: dict[str, float] = {}
    fitted_on = images("train", slice(options.fit)) if options.fit else train
    if options.time_forward:
        timed(seconds, "the network alone on the images of fit", lambda: forward(model, fitted_on))
    timed(seconds, "fit", lambda: ee.fit(fitted_on))
    on_test = timed(seconds, "record of the test images", lambda: ee.record(test))
    accuracy = on_test.accuracy.tolist()
    result: dict[str, Any] = {
        "network": options.call,
        "data": Path(options.data).name,
        "head": options.head,
        "search": options.method,
        "fitted on": len(fitted_on.dataset),
        "exits": list(ee.exit_names),
        "cost of leaving": ee.costs.fractions.tolist(),
        "cost of all heads": sum(ee.costs.heads) / ee.costs.base,
        "accuracy at the exits": accuracy[:-1],
        "accuracy of the network": accuracy[-1],
    }
    order = torch.randperm(len(on_test), generator=torch.Generator().manual_seed(SEED))
    held_out, others = on_test.part(order[: options.held_out]), on_test.part(order[options.held_out :])
    searched = timed(seconds, "search on held-out images", lambda: e2cm.curve(held_out, method=options.method))
    result["thresholds from held-out images"] = outcome(searched, others)
    if options.select:
        chosen = timed(seconds, "selection on held-out images", lambda: e2cm.select(held_out, options.select))
        result[f"{options.select} exits and thresholds from held-out images"] = selected(chosen, held_out, others)
    if options.fit or not options.skip_train:
        rest = images("train", slice(options.fit, None)) if options.fit else train
        on_train = timed(seconds, "record of training images", lambda: ee.record(rest))
        searched = timed(seconds, "search on training images", lambda: e2cm.curve(on_train, method=options.method))
        result["thresholds from training images"] = outcome(searched, on_test)
        if options.select:
            chosen = timed(seconds, "selection on training images", lambda: e2cm.select(on_train, options.select))
            result[f"{options.select} exits and thresholds from training images"] = selected(chosen, on_train, on_test)
        if options.records:
            on_train.save(options.records / "train.record")
    if options.records:
        on_test.save(options.records / "test.record")
    return result | {"seconds": seconds}


def selected(chosen: e2cm.Selection, record: e2cm.Record, others: e2cm.Record) -> dict[str, Any]:
    """Some exits, with thresholds from the whole of the record that has chosen them."""
    found = outcome(e2cm.curve(record.at_exits(chosen.names)), others.at_exits(chosen.names))
    return found | {"exits": list(chosen.names)}


@torch.inference_mode()
def forward(model: torch.nn.Module, batches: e2cm.data.Batches) -> None:
    for images, _ in batches:
        model(images)


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['network']}, {result['data']}, {result['head']} fitted on {result['fitted on']} images; "
        f"the network alone: {result['accuracy of the network']:.4f}; all heads together cost "
        f"{result['cost of all heads']:.4f} of it",
        "",
        "| exit | cost of leaving there | accuracy if all do |",
        "| :-- | --: | --: |",
    ]
    rows = zip(result["exits"], result["cost of leaving"], result["accuracy at the exits"], strict=False)
    lines += [f"| {name} | {cost:.4f} | {accuracy:.4f} |" for name, cost, accuracy in rows]
    for name, found in result.items():
        if isinstance(found, dict) and "points" in found:
            lines += ["", f"| FLOPs asked for, {name} | FLOPs | accuracy on {found['samples']} others |"]
            lines += ["| --: | --: | --: |"]
            lines += [f"| {p['budget']:.2f} | {p['flops']:.4f} | {p['accuracy']:.4f} |" for p in found["points"] if p]
            lossless = found["lossless at"]
            lines += ["", f"within {LOSSLESS} of {found['network']:.4f} at {lossless and round(lossless, 4)}"]
    lines += ["", ", ".join(f"{name}: {seconds:.1f} s" for name, seconds in result["seconds"].items())]
    return "\n".join(lines)


def arguments(description: str | None, optional: bool = False) -> argparse.ArgumentParser:
    """What every bench of a network on data wants to know; optional: if there is another way to name a network."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = {"nargs": "?"} if optional else {}
    parser.add_argument("networks", type=Path, help="a Python file", **count)
    parser.add_argument("call", help="what to call in it, such as 'cifar10_resnet(56)'", **count)
    parser.add_argument("data", help="a .npz file or the name of a torchvision data set", **count)
    parser.add_argument("--mean", type=float, nargs="+", help="of the network's training images, in [0, 1]")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--batch", type=int, default=128, help="images in one (default: 128)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--exits", default="blocks")
    parser.add_argument("--head", default="class_means")
    parser.add_argument("--method", default="auto", choices=["auto", "paper", "coordinate"], help="of threshold search")
    parser.add_argument("--fit", type=int, help="training images to fit on (default: all)")
    parser.add_argument("--held-out", type=int, default=2000, help="test images for thresholds (default: 2000)")
    parser.add_argument("--select", type=int, help="so many exits, too: chosen where thresholds are found")
    parser.add_argument("--skip-train", action="store_true", help="without --fit: no thresholds from training images")
    parser.add_argument("--time-forward", action="store_true", help="time the network without exits, too")
    parser.add_argument("--records", type=Path, help="a folder to keep the records in")
    options = parser.parse_args()
    result = measure(options)
    print(table(result))
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
