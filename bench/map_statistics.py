"""Statistics of feature maps, and linear heads that look at them, against torch's forms and the read bandwidth.

    python bench/map_statistics.py --threads 2

The maps are those of a ResNet-56 on 32 x 32 images, whose 28 exits are added up at the end, the statistics those that
whitened_means chooses for them. Ways take turns, round by
round, so that noise hits all alike, each on features that have mostly left the cache since they were used last; a time
is the least of all rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import limits
import torch
import torch.nn.functional as F
from e2cm_ext.whitened import statistics_of
from torch import Tensor

import e2cm_ext as e2cm

EXITS = {(16, 32, 32): 10, (32, 16, 16): 9, (64, 8, 8): 9}  # shape of the maps: exits that have them
ORDERS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
CLASSES = 10
COPIES = 64 << 20  # bytes of features, more than a cache is likely to hold for one of them


def by_torch(x: Tensor, wanted: e2cm.Statistics) -> Tensor:
    parts = [F.adaptive_avg_pool2d(x, wanted.mean)]
    if any(wanted.rms):
        parts += [F.adaptive_avg_pool2d(x.square(), wanted.rms).sqrt(), F.adaptive_max_pool2d(x, wanted.max)]
    for offset in range(wanted.pairs):
        products = (x * x.roll(-offset, 1)).mean((2, 3))
        parts.append(products.abs().sqrt().copysign(products))
    return torch.cat([part.flatten(1) for part in parts], 1)


def ways(shape: tuple[int, int, int], batch: int, order: torch.memory_format) -> dict[str, Callable[[], object]]:
    wanted = statistics_of(shape)
    size = wanted.size(shape)
    count = max(2, COPIES // (4 * batch * shape[0] * shape[1] * shape[2]))
    copies = [torch.randn(batch, *shape).contiguous(memory_format=order) for _ in range(min(count, 8))]
    weight, bias = torch.randn(CLASSES, size) / size**0.5, torch.zeros(CLASSES)
    ids, out = torch.arange(batch), e2cm.Decisions.empty(batch, CLASSES)
    # The root of a mean product near zero is far less exact than the product.
    assert torch.allclose(by_torch(copies[0], wanted), e2cm.ops.statistics(copies[0], wanted), rtol=1e-4, atol=1e-3)

    def in_turn(function: Callable[[Tensor], object]) -> Callable[[], object]:
        turn = iter(range(1 << 60))
        return lambda: function(copies[next(turn) % len(copies)])

    return {
        "statistics": in_turn(lambda x: e2cm.ops.statistics(x, wanted)),
        "without pairs": in_turn(lambda x: e2cm.ops.statistics(x, replace(wanted, pairs=0))),
        "mean alone": in_turn(lambda x: e2cm.ops.statistics(x, e2cm.Statistics(mean=(1, 1)))),
        "linear_step": in_turn(lambda x: e2cm.ops.linear_step(x, weight, bias, 2.0, ids, out, wanted)),
        "torch": in_turn(lambda x: by_torch(x, wanted)),
    }


def least(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, at best."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with limits.Limits(options.threads) as limit:
        probe = limit.read(COPIES)
        bandwidth = max(probe() for _ in range(5))
    print(f"{options.threads} threads, batch {options.batch}; reading at {bandwidth / 1e9:.1f} GB/s")
    print(
        "microseconds".ljust(30), *(name.rjust(13) for name in (*ways((16, 4, 4), 1, torch.channels_last), "one read"))
    )
    for order, memory_format in ORDERS.items():
        total = 0.0
        for shape, exits in EXITS.items():
            took = least(ways(shape, options.batch, memory_format), options.rounds)
            read = 4 * options.batch * shape[0] * shape[1] * shape[2] / bandwidth
            print(f"{shape} {order}".ljust(30), *(f"{1e6 * t:13.0f}" for t in (*took.values(), read)))
            total += exits * took["linear_step"]
        print(f"linear_step at all {sum(EXITS.values())} exits: {1e3 * total:.1f} ms")


if __name__ == "__main__":
    main()
