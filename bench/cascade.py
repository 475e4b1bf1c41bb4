"""Wall-clock of a wrapped network against the network itself, in turns, on the same batches.

    python bench/cascade.py networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

First with every exit on and none of them firing: what the exits cost. Then at operating points of given FLOPs, with
thresholds found on the first half of the images and time measured on the second: what they save. Arguments as in
curves.py.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import network, write

import e2cm_ext as e2cm

HEADS = ("class_means", "pooled_means")
BUDGETS = (0.25, 0.5, 0.75)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        start = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(ours: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Of neighbours in time, so that a machine that changes its speed changes both."""
    low, middle, high = np.percentile(ours / base, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    def images(split: str, part: slice) -> e2cm.data.Batches:
        return e2cm.data.load(
            options.data, split=split, normalise=(options.mean, options.std), part=part, batch_size=options.batch,
            channels_last=True,
        )  # fmt: skip

    model = network(options.networks, options.call).to(memory_format=torch.channels_last)
    fitted_on, found_on = images("train", slice(options.fit)), images("test", slice(1024))
    batches = [x for x, _ in images("test", slice(5000, 5000 + options.batches * options.batch))]

    def run(f: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
        def way() -> None:
            with torch.inference_mode():
                for x in batches:
                    f(x)

        return way

    rows = []
    for kind in HEADS:
        ee = e2cm.EarlyExit(model, batches[0][:1], head=kind).fit(fitted_on, progress=False)
        ee.thresholds = 1e30  # on, and never above it
        seconds = in_turns({"base": run(model), "ours": run(ee)}, options.rounds)
        rows.append({"head": kind, "flops": 1.0, "what": "all exits on, none fires"})
        rows[-1] |= {
            "time": ratio(seconds["ours"], seconds["base"]),
            "base ms": float(np.median(seconds["base"])) * 1e3,
        }
        curve = ee.curve(found_on, progress=False)
        for budget in BUDGETS:
            point = curve.best_within(budget)
            ee.thresholds = point.thresholds
            spent = ee.evaluate([(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches], progress=False).flops
            seconds = in_turns({"base": run(model), "ours": run(ee)}, options.rounds)
            rows.append({"head": kind, "flops": spent, "what": f"FLOPs {budget} asked for"})
            rows[-1]["time"] = ratio(seconds["ours"], seconds["base"])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| head | | FLOPs | time / base time | beyond FLOPs |", "| :-- | :-- | --: | --: | --: |"]
    for row in rows:
        t = row["time"]
        spread = f"{t['median']:.3f} [{t['p10']:.3f}, {t['p90']:.3f}]"
        beyond = t["median"] - row["flops"]
        lines.append(f"| {row['head']} | {row['what']} | {row['flops']:.3f} | {spread} | {beyond:+.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path)
    parser.add_argument("call")
    parser.add_argument("data")
    parser.add_argument("--mean", type=float, nargs="+", required=True)
    parser.add_argument("--std", type=float, nargs="+", required=True)
    parser.add_argument("--fit", type=int, default=2000, help="training images to fit on: time does not depend on it")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2, help="per round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(table(rows))
    if options.json:
        write(options.json, {"network": options.call, "batch": options.batch, "rows": rows})


if __name__ == "__main__":
    main()
