"""Statistics of feature maps, and linear heads that read them, against torch's forms and the read bandwidth.

    python -m bench map_statistics --threads 2

The maps are those of a ResNet-56 on 32 x 32 images, whose 28 exits are added up at the end, the statistics those that
whitened_means chooses for them. Ways are interleaved, each on features that have mostly left the cache since they were
used last; a time is the least of all rounds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext.heads.whitened_means import statistics_of
from e2cm_ext.utils.timing import time_interleaved

from . import common, limits, markdown

EXITS = {(16, 32, 32): 10, (32, 16, 16): 9, (64, 8, 8): 9}  # shape of the maps: exits that have them
ORDERS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
CLASSES = 10
COPIES = 64 << 20  # bytes of features, more than a cache is likely to hold for one of them


def statistics_in_torch(x: Tensor, wanted: e2cm.Statistics) -> Tensor:
    parts = [F.adaptive_avg_pool2d(x, wanted.mean)]
    if any(wanted.rms):
        parts += [F.adaptive_avg_pool2d(x.square(), wanted.rms).sqrt(), F.adaptive_max_pool2d(x, wanted.max)]
    for offset in range(wanted.pairs):
        products = (x * x.roll(-offset, 1)).mean((2, 3))
        parts.append(products.abs().sqrt().copysign(products))
    return torch.cat([part.flatten(1) for part in parts], 1)


def ways_for(shape: tuple[int, int, int], batch: int, order: torch.memory_format) -> dict[str, Callable[[], object]]:
    wanted = statistics_of(shape)
    size = wanted.size(shape)
    count = max(2, COPIES // (4 * batch * shape[0] * shape[1] * shape[2]))
    copies = [torch.randn(batch, *shape).contiguous(memory_format=order) for _ in range(min(count, 8))]
    weight, bias = torch.randn(CLASSES, size) / size**0.5, torch.zeros(CLASSES)
    ids, out = torch.arange(batch), e2cm.Decisions.empty(batch, CLASSES)
    # The root of a mean product near zero is far less exact than the product.
    in_torch, native = statistics_in_torch(copies[0], wanted), e2cm.ops.statistics(copies[0], wanted)
    assert torch.allclose(in_torch, native, rtol=1e-4, atol=1e-3)

    def on_copies(function: Callable[[Tensor], object]) -> Callable[[], object]:
        features = itertools.cycle(copies)
        return lambda: function(next(features))

    return {
        "statistics": on_copies(lambda x: e2cm.ops.statistics(x, wanted)),
        "without pairs": on_copies(lambda x: e2cm.ops.statistics(x, replace(wanted, pairs=0))),
        "mean alone": on_copies(lambda x: e2cm.ops.statistics(x, e2cm.Statistics(mean=(1, 1)))),
        "linear_step": on_copies(lambda x: e2cm.ops.linear_step(x, weight, bias, 2.0, ids, out, wanted)),
        "torch": on_copies(lambda x: statistics_in_torch(x, wanted)),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds at best, and those that reading the features takes at least."""
    with limits.Limits(torch.get_num_threads()) as machine:
        probe = machine.read(COPIES)
        bandwidth = max(probe() for _ in range(5))
    rows = []
    for order, memory_format in ORDERS.items():
        for shape, exits in EXITS.items():
            seconds = time_interleaved(ways_for(shape, options.batch, memory_format), options.rounds)
            best = {name: 1e6 * float(values.min()) for name, values in seconds.items()}
            read = 4e6 * options.batch * shape[0] * shape[1] * shape[2] / bandwidth
            rows.append({"shape": shape, "order": order, "exits": exits, "microseconds": best | {"one read": read}})
    return {"batch": options.batch, "read_gigabytes_per_second": bandwidth / 1e9, "rows": rows}


def format_report(result: dict[str, Any]) -> str:
    rows = result["rows"]
    threads = torch.get_num_threads()
    lines = [
        f"{threads} threads, batch {result['batch']}; reading at {result['read_gigabytes_per_second']:.1f} GB/s",
        "",
        markdown.table(
            ["microseconds", *rows[0]["microseconds"]],
            [[f"{r['shape']} {r['order']}", *(f"{t:.0f}" for t in r["microseconds"].values())] for r in rows],
        ),
        "",
    ]
    for order in ORDERS:
        total = sum(r["exits"] * r["microseconds"]["linear_step"] for r in rows if r["order"] == order)
        lines.append(f"linear_step at all {sum(EXITS.values())} exits, {order}: {total / 1e3:.1f} ms")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("map_statistics", __doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    options = common.parse(parser, argv)
    result = measure(options)
    print(format_report(result))
    common.save(options, result)
