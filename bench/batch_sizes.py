"""What it costs that survivors come in many batch sizes, and what room for prepared convolutions saves of it.

    python bench/batch_sizes.py networks.py "cifar10_resnet(56)"

Batches of 1 to --most random images run through the whole network in random order, after one batch of each size that
does not count: with the room that oneDNN has by default, and with what importing e2cm_ext asks for. In turns, each in a
process of its own, since the room is set once. MiB: the peak memory of the process.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
DEFAULT = "1024"


def seconds(options: argparse.Namespace) -> float:
    import torch
    from curves import network

    model = network(options.networks, options.call).to(memory_format=torch.channels_last)
    sizes = [random.Random(0).randint(1, options.most) for _ in range(options.batches)]
    images = torch.randn(options.most, *options.shape).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for size in range(1, options.most + 1):
            model(images[:size])
        start = time.perf_counter()
        for size in sizes:
            model(images[:size])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, help="a Python file")
    parser.add_argument("call", help="what to call in it, such as 'cifar10_resnet(56)'")
    parser.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32])
    parser.add_argument("--most", type=int, default=32)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(seconds(options), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    # Without it in the environment, importing the package sets it.
    rooms = {DEFAULT: {**os.environ, VARIABLE: DEFAULT}, "as e2cm_ext asks": {**os.environ}}
    rooms["as e2cm_ext asks"].pop(VARIABLE, None)
    took: dict[str, list[float]] = {name: [] for name in rooms}
    held: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, environment in rooms.items():
            command = [sys.executable, *sys.argv, "--once"]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            took[name].append(float(done.stdout.split()[-2]))
            held[name] = int(done.stdout.split()[-1])
    for name, values in took.items():
        print(
            f"room {name}: {statistics.median(values):.2f} s [{min(values):.2f}, {max(values):.2f}], {held[name]} MiB"
        )


if __name__ == "__main__":
    main()
