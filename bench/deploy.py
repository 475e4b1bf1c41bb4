"""A network with early exits on ONNX Runtime: its answers beside torch's, and its time beside the network's own there.

    python -m bench deploy networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 \\
        --packages FOLDER --json FILE

Exits are selected and thresholds found on the first test images; answers are compared, and times taken, on later ones.
Both networks run on ONNX Runtime, interleaved, the network without exits as a package of one stage. Packages are kept
in the folder, and taken from there if they are there already.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import e2cm_ext as e2cm
from e2cm_ext.runner import Answers, OnnxCascade
from e2cm_ext.utils.timing import ratio, time_interleaved

from . import common, markdown

BASE = "base.zip"
BUDGETS = (0.25, 0.5, 0.75)
BATCHES = (1, 32)
CLOSE = 1e-3  # of certainties to a threshold, and of the two best probabilities, whose order rounding may change


# ---- packages -------------------------------------------------------------------------------------------------------


def images(options: argparse.Namespace, split: str, part: slice) -> e2cm.data.Batches:
    return common.images(options, split, part, batch_size=options.batch, channels_last=False)


def prepare(options: argparse.Namespace, tested: torch.Tensor) -> None:
    """Packages, and beside them the answers of torch, and the certainty of every exit."""
    model = common.network(options, channels_last=False)
    ee = e2cm.EarlyExit(model, tested[:1]).fit(images(options, "train", slice(options.fit)))
    few = ee.select(ee.record(images(options, "test", slice(options.found))), options.count)
    assert few.selection is not None
    few.export(options.packages / BASE)
    no_labels = torch.zeros(len(tested), dtype=torch.int64)
    certainty = few.record([(x, y) for x, y in zip(tested.split(128), no_labels.split(128), strict=True)]).confidence
    for budget in BUDGETS:
        few.calibrate(few.selection.curve, flops=budget)
        few.export(options.packages / f"{budget}.zip")
        decisions = few.predict(tested)
        np.savez(
            options.packages / f"{budget}.npz",
            **{name: column.numpy() for name, column in decisions._asdict().items()},
            certainty=certainty.numpy(),
            limits=few.thresholds.numpy(),
            flops=few.costs.fractions.numpy(),
        )


def compare(found: Answers, expected: Any) -> dict[str, Any]:
    """How many answers differ, and of how many the first difference is one of rounding."""
    other_exit = found.exit != expected["exit"]
    different = (found.prediction != expected["prediction"]) | other_exit
    same = ~other_exit
    return {
        "images": len(different),
        "other predictions": int((found.prediction != expected["prediction"]).sum()),
        "other exits": int(other_exit.sum()),
        "of these by rounding": sum(differs_by_rounding(int(i), found, expected) for i in different.nonzero()[0]),
        "largest difference of probabilities": float(
            np.abs(np.exp(found.log_probs[same]) - np.exp(expected["log_probs"][same])).max()
        ),
    }


def differs_by_rounding(i: int, found: Answers, expected: Any) -> bool:
    """Whether sample i was close to a threshold, or its two best classes to each other."""
    if found.exit[i] != expected["exit"][i]:
        limits = np.append(expected["limits"], -np.inf)
        j = min(found.exit[i], expected["exit"][i])
        return bool(abs(float(expected["certainty"][i, j]) - limits[j]) < CLOSE)
    second, first = np.sort(np.exp(expected["log_probs"][i]))[-2:]
    return bool(first - second < CLOSE)


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    first, last = options.found, options.found + options.images
    tested = torch.cat([x for x, _ in images(options, "test", slice(first, last))])
    options.packages.mkdir(exist_ok=True)
    if not all((options.packages / name).exists() for name in (BASE, *(f"{b}.npz" for b in BUDGETS))):
        prepare(options, tested)
    if options.prepare:
        return []
    x, rows = tested.numpy(), []
    for threads in options.threads:
        base = OnnxCascade.load(options.packages / BASE, threads=threads)
        for budget in BUDGETS:
            expected = np.load(options.packages / f"{budget}.npz")
            cascade = OnnxCascade.load(options.packages / f"{budget}.zip", threads=threads)
            answers = compare(cascade.predict(x), expected) if threads == options.threads[0] else None
            about = {"threads": threads, "asked for": budget, "answers": answers}
            for batch, count in zip(BATCHES, options.timed, strict=True):
                rows.append(about | measure_times(base, cascade, expected, x[:count], batch, options.rounds))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_times(
    base: OnnxCascade, cascade: OnnxCascade, expected: Any, x: np.ndarray, batch: int, rounds: int
) -> dict[str, Any]:
    parts = [x[i : i + batch] for i in range(0, len(x), batch)]

    def run(package: OnnxCascade) -> Callable[[], None]:
        def all_parts() -> None:
            for part in parts:
                package.predict(part)

        return all_parts

    exits = np.concatenate([cascade.predict(part).exit for part in parts])
    seconds = time_interleaved({"base": run(base), "ours": run(cascade)}, rounds)
    return {
        "batch": batch,
        "exits on": int(np.isfinite(expected["limits"]).sum()),
        "flops": float(expected["flops"][exits].mean()),
        "time": asdict(ratio(seconds["ours"], seconds["base"])),
        "base ms per image": float(seconds["base"].median()) / len(x) * 1e3,
    }


def format_report(rows: list[dict[str, Any]]) -> str:
    header = ["threads", "batch", "exits", "FLOPs", "time / base time", "beyond FLOPs", "base, ms per image"]
    lines = [
        [
            str(row["threads"]),
            str(row["batch"]),
            str(row["exits on"]),
            f"{row['flops']:.3f}",
            markdown.with_spread(row["time"], 3),
            f"{row['time']['median'] - row['flops']:+.3f}",
            f"{row['base ms per image']:.2f}",
        ]
        for row in rows
    ]
    return markdown.table(header, lines, left=0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("deploy", __doc__, threads=False)
    common.add_network(parser)
    parser.add_argument("--batch", type=int, default=128, help="images in one, for fit (default: 128)")
    parser.add_argument("--fit", type=int, default=2000, help="training images to fit on: time does not depend on it")
    parser.add_argument("--found", type=int, default=2048, help="test images to find thresholds on")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of ONNX Runtime")
    parser.add_argument("--packages", type=Path, required=True, help="a folder to keep packages in")
    parser.add_argument("--prepare", action="store_true", help="make the packages, and no more")
    parser.add_argument("--images", type=int, default=2000, help="to compare answers on")
    parser.add_argument("--timed", type=int, nargs=2, default=(200, 320), help="images per round, at batch 1 and 32")
    parser.add_argument("--count", type=int, default=6, help="exits to select")
    parser.add_argument("--rounds", type=int, default=15)
    options = common.parse(parser, argv)
    rows = measure(options)
    print(format_report(rows))
    if rows:
        common.save(options, {"network": options.call, "rows": rows}, "onnxruntime")
