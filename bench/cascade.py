"""Wall-clock of a wrapped network against the network itself, in turns, on the same batches.

    python bench/cascade.py networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

First with every exit on and none of them firing: what the exits cost. Then at operating points of given FLOPs, with
thresholds found on the first images of the test split and time measured on others: what they save. With every exit, and
with those that ee.select keeps. Arguments as in curves.py.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from curves import arguments, network, write

import e2cm_ext as e2cm

HEADS = ("class_means", "pooled_means", "whitened_means")
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
    fitted_on, found_on = images("train", slice(options.fit)), images("test", slice(options.found))
    batches = [x for x, _ in images("test", slice(5000, 5000 + options.batches * options.batch))]

    def run(f: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
        def way() -> None:
            with torch.inference_mode():
                for x in batches:
                    f(x)

        return way

    rows = []

    def compare(kind: str, ee: e2cm.EarlyExit, curve: e2cm.Curve) -> None:
        def row(what: str, flops: float) -> None:
            seconds = in_turns({"base": run(model), "ours": run(ee)}, options.rounds)
            rows.append(
                {
                    "head": kind,
                    "exits": len(ee.exit_names),
                    "what": what,
                    "flops": flops,
                    "time": ratio(seconds["ours"], seconds["base"]),
                    "base ms": float(np.median(seconds["base"])) * 1e3,
                }
            )

        ee.thresholds = 1e30  # on, and never above it
        row("all exits on, none fires", 1.0)
        for budget in BUDGETS:
            ee.thresholds = curve.best_within(budget).thresholds
            spent = ee.evaluate([(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches], progress=False).flops
            row(f"FLOPs {budget} asked for", spent)

    for kind in options.heads:
        ee = e2cm.EarlyExit(model, batches[0][:1], head=kind).fit(fitted_on, progress=False)
        record = ee.record(found_on, progress=False)
        compare(kind, ee, ee.curve(record, progress=False))
        for count in options.counts:
            few = ee.select(record, count, progress=False)
            assert few.selection is not None
            compare(f"{kind}, selected", few, few.selection.curve)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| head | exits | | FLOPs | time / base time | beyond FLOPs |",
        "| :-- | --: | :-- | --: | --: | --: |",
    ]
    for row in rows:
        t = row["time"]
        spread = f"{t['median']:.3f} [{t['p10']:.3f}, {t['p90']:.3f}]"
        beyond = t["median"] - row["flops"]
        lines.append(
            f"| {row['head']} | {row['exits']} | {row['what']} | {row['flops']:.3f} | {spread} | {beyond:+.3f} |"
        )
    return "\n".join(lines)


def timing_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = arguments(description)
    parser.add_argument("--fit", type=int, default=2000, help="training images to fit on: time does not depend on it")
    parser.add_argument("--found", type=int, default=2048, help="test images to find thresholds on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def report(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], list[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(table(rows))
    if options.json:
        write(options.json, {"network": options.call, "batch": options.batch, "rows": rows})


def main() -> None:
    parser = timing_arguments(__doc__)
    parser.add_argument("--heads", nargs="+", default=HEADS)
    parser.add_argument("--counts", type=int, nargs="*", default=[6], help="exits to select")
    parser.add_argument("--batches", type=int, default=2, help="per round")
    parser.add_argument("--rounds", type=int, default=15)
    report(parser.parse_args(), measure, table)


if __name__ == "__main__":
    main()
