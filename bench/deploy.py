"""A network with early exits on ONNX Runtime: its answers beside torch's, and its time beside the network's own there.

    python bench/deploy.py networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 \
        --packages FOLDER --json FILE

Exits are selected and thresholds found on the first test images; answers are compared, and times taken, on later ones.
Both networks run on ONNX Runtime, in turns, the network without exits as a package of one stage. Packages are kept in
the folder, and taken from there if they are there already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from curves import arguments, network, write
from e2cm_ext.turns import in_turns, ratio

import e2cm_ext as e2cm
from e2cm_ext.runner import Answers, OnnxCascade

BASE = "base.zip"
BUDGETS = (0.25, 0.5, 0.75)
CLOSE = 1e-3  # of certainties to a threshold, and of the two best probabilities, that rounding may tell apart or not


def images(options: argparse.Namespace, split: str, part: slice) -> e2cm.data.Batches:
    normalise = (options.mean, options.std) if options.mean else None
    return e2cm.data.load(options.data, split=split, normalise=normalise, part=part, batch_size=options.batch)


def prepare(options: argparse.Namespace, tested: torch.Tensor) -> None:
    """Packages, and beside them what torch answers, and every exit's certainty there."""
    model = network(options.networks, options.call)
    ee = e2cm.EarlyExit(model, tested[:1]).fit(images(options, "train", slice(options.fit)))
    few = ee.select(ee.record(images(options, "test", slice(options.found))), options.count)
    assert few.selection is not None
    few.export(options.packages / BASE)
    nobody = torch.zeros(len(tested), dtype=torch.int64)
    certainty = few.record([(x, y) for x, y in zip(tested.split(128), nobody.split(128), strict=True)]).confidence
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
    other = (found.prediction != expected["prediction"]) | other_exit
    limits = np.append(expected["limits"], -np.inf)
    rounding = 0
    for i in other.nonzero()[0]:
        if other_exit[i]:
            j = min(found.exit[i], expected["exit"][i])
            rounding += abs(float(expected["certainty"][i, j]) - limits[j]) < CLOSE
        else:
            second, first = np.sort(np.exp(expected["log_probs"][i]))[-2:]
            rounding += first - second < CLOSE
    same = ~other_exit
    return {
        "images": len(other),
        "other predictions": int((found.prediction != expected["prediction"]).sum()),
        "other exits": int(other_exit.sum()),
        "of these by rounding": int(rounding),
        "largest difference of probabilities": float(
            np.abs(np.exp(found.log_probs[same]) - np.exp(expected["log_probs"][same])).max()
        ),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    first, last = options.found, options.found + options.images
    tested = torch.cat([x for x, _ in images(options, "test", slice(first, last))])
    options.packages.mkdir(exist_ok=True)
    if not all((options.packages / name).exists() for name in (BASE, *(f"{b}.npz" for b in BUDGETS))):
        prepare(options, tested)
    if options.prepare:
        return []
    x = tested.numpy()
    rows = []
    for threads in options.threads:
        base = OnnxCascade.load(options.packages / BASE, threads=threads)
        for budget in BUDGETS:
            expected = np.load(options.packages / f"{budget}.npz")
            cascade = OnnxCascade.load(options.packages / f"{budget}.zip", threads=threads)
            answers = compare(cascade.predict(x), expected) if threads == options.threads[0] else None
            for batch, count in zip((1, 32), options.timed, strict=True):
                some = x[:count]
                parts = [some[i : i + batch] for i in range(0, count, batch)]
                exits = np.concatenate([cascade.predict(part).exit for part in parts])
                on = np.isfinite(expected["limits"])

                def run(one: OnnxCascade, parts: list[np.ndarray] = parts) -> Callable[[], None]:
                    return lambda: [one.predict(part) for part in parts] and None

                seconds = in_turns({"base": run(base), "ours": run(cascade)}, options.rounds)
                rows.append(
                    {
                        "threads": threads,
                        "batch": batch,
                        "asked for": budget,
                        "exits on": int(on.sum()),
                        "flops": float(expected["flops"][exits].mean()),
                        "time": asdict(ratio(seconds["ours"], seconds["base"])),
                        "base ms per image": float(seconds["base"].median()) / count * 1e3,
                        "answers": answers,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| threads | batch | exits | FLOPs | time / base time | beyond FLOPs | base, ms per image |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        t = row["time"]
        spread = f"{t['median']:.3f} [{t['p10']:.3f}, {t['p90']:.3f}]"
        beyond = t["median"] - row["flops"]
        lines.append(
            f"| {row['threads']} | {row['batch']} | {row['exits on']} | {row['flops']:.3f} | {spread} | {beyond:+.3f} "
            f"| {row['base ms per image']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--fit", type=int, default=2000, help="training images to fit on: time does not depend on it")
    parser.add_argument("--found", type=int, default=2048, help="test images to find thresholds on")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of ONNX Runtime")
    parser.add_argument("--packages", type=Path, required=True, help="a folder to keep packages in")
    parser.add_argument("--prepare", action="store_true", help="make the packages, and no more")
    parser.add_argument("--images", type=int, default=2000, help="to compare answers on")
    parser.add_argument("--timed", type=int, nargs=2, default=(200, 320), help="images per round, at batch 1 and 32")
    parser.add_argument("--count", type=int, default=6, help="exits to select")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = measure(options)
    print(table(rows))
    if options.json and rows:
        about = {"onnxruntime": onnxruntime.__version__, "cores": os.cpu_count(), "system": platform.platform()}
        write(options.json, {"network": options.call, **about, "rows": rows})


if __name__ == "__main__":
    main()
