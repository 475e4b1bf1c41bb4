"""Wall-clock of predict and of predict_stream on loaders of small and large batches, against the network itself.

    python bench/stream.py networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

All in turns, on the same images. The network itself runs at whichever of its batch sizes is the fastest; streams run
their stages at --batch, whatever their loader gives. Thresholds for FLOPs of about .3, .5 and .7 are found on the first
images of the test split, time is measured on others. Arguments as in curves.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cascade import in_turns, ratio, report, timing_arguments
from curves import network

import e2cm_ext as e2cm

LOADERS = (1, 8, 32, 128)
BASE = (32, 64, 128)
BUDGETS = (0.3, 0.5, 0.7)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    def images(split: str, part: slice) -> e2cm.data.Batches:
        return e2cm.data.load(
            options.data, split=split, normalise=(options.mean, options.std), part=part, batch_size=options.batch,
            channels_last=True,
        )  # fmt: skip

    model = network(options.networks, options.call).to(memory_format=torch.channels_last)
    others = torch.cat([x for x, _ in images("test", slice(options.found, options.found + options.images))])
    others = others.contiguous(memory_format=torch.channels_last)
    ee = e2cm.EarlyExit(model, others[:1], head=options.head)
    ee.fit(images("train", slice(options.fit)), progress=False)
    curve = ee.curve(images("test", slice(options.found)), progress=False)

    def run(f: Callable[[list[torch.Tensor]], Any], size: int) -> Callable[[], None]:
        batches = list(others.split(size))

        def way() -> None:
            with torch.inference_mode():
                for _ in f(batches):
                    pass

        return way

    def stream(batches: list[torch.Tensor]) -> Any:
        return ee.predict_stream(batches, batch_size=options.batch)

    rows = []
    for budget in options.budgets:
        ee.thresholds = curve.best_within(budget).thresholds
        flops = ee.evaluate([(others, torch.zeros(len(others), dtype=torch.int64))], progress=False).flops
        ways = {f"base {size}": run(lambda batches: map(model, batches), size) for size in BASE}
        for size in options.loaders:
            ways[f"predict {size}"] = run(lambda batches: map(ee.predict, batches), size)
            ways[f"stream {size}"] = run(stream, size)
        seconds = in_turns(ways, options.rounds)
        best = min((f"base {size}" for size in BASE), key=lambda name: float(np.median(seconds[name])))
        rows += [
            {
                "flops": flops,
                "loader": size,
                "predict": ratio(seconds[f"predict {size}"], seconds[best]),
                "stream": ratio(seconds[f"stream {size}"], seconds[best]),
                "base": best,
                "base ms per image": float(np.median(seconds[best])) * 1e3 / len(others),
            }
            for size in options.loaders
        ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| FLOPs | batches of the loader | predict / base time | predict_stream / base time | beyond FLOPs |",
        "| --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        predict, stream = (
            f"{t['median']:.3f} [{t['p10']:.3f}, {t['p90']:.3f}]" for t in (row["predict"], row["stream"])
        )
        beyond = row["stream"]["median"] - row["flops"]
        lines.append(f"| {row['flops']:.3f} | {row['loader']} | {predict} | {stream} | {beyond:+.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = timing_arguments(__doc__)
    parser.add_argument("--head", default="class_means")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--loaders", type=int, nargs="+", default=LOADERS, help="their batch sizes")
    parser.add_argument("--images", type=int, default=2048, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    report(parser.parse_args(), measure, table)


if __name__ == "__main__":
    main()
