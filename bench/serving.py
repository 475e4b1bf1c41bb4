"""A server of a network with early exits beside one of the network without them, under the same load.

    python bench/serving.py cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 --packages FOLDER --json FILE

Packages are those that bench/deploy.py has made. Each server runs alone, with one worker of one thread, which the
clients on the same machine share the cores with; each client sends its next image when it has the answer to the last.
The order is base, exits, base, exits, ...; in every run all answers are compared with those of the package offline.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import clients
import numpy as np
import onnxruntime
import torch
from curves import write

import e2cm_ext as e2cm
from e2cm_ext.runner import OnnxCascade


def run(package: Path, images: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    expected = OnnxCascade.load(package, threads=1).predict(images)
    bodies = [clients.body_of(image) for image in images]
    requests = [lambda c, body=body: clients.post(port, body, c) for body in bodies]
    with (
        tempfile.TemporaryDirectory() as folder,
        clients.serving(package, Path(folder), threads=1, timeout=300.0, max_batch_size=options.batch) as port,
    ):
        clients.all_at_once(requests[: 4 * options.clients], port, options.clients)
        start = time.perf_counter()
        replies, seconds = clients.all_at_once(requests, port, options.clients)
        took = time.perf_counter() - start
        _, metrics = clients.get(port, "/metrics")
    wrong = sum(
        status != 200 or answer["prediction"] != prediction
        for (status, answer), prediction in zip(replies, expected.prediction, strict=True)
    )
    said = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    p50, p99 = map(float, np.percentile(seconds, [50, 99]))
    return {
        "p50 ms": p50 * 1e3,
        "p99 ms": p99 * 1e3,
        "requests per second": len(images) / took,
        "mean batch": float(said["e2cm_batch_size_sum"]) / float(said["e2cm_batch_size_count"]),
        "answers that differ from offline": int(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--mean", type=float, nargs="+")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--budget", default="0.5", help="of FLOPs: which package of bench/deploy.py (default: 0.5)")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="that a server puts together at most (default: 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    batches = e2cm.data.load(
        options.data, split="test", normalise=(options.mean, options.std), part=slice(5000, 5000 + options.requests)
    )
    images = torch.cat([x for x, _ in batches]).numpy()
    rows: list[dict[str, Any]] = []
    for turn in range(options.rounds):
        for name in ("base", options.budget):
            rows.append({"round": turn, "package": name} | run(options.packages / f"{name}.zip", images, options))
            print(rows[-1], flush=True)
    if options.json:
        about = {"onnxruntime": onnxruntime.__version__, "cores": os.cpu_count(), "system": platform.platform()}
        about |= {"clients": options.clients, "requests": options.requests, "batch": options.batch}
        write(options.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
