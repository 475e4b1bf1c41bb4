"""A server of a network with early exits beside one of the network without them, under the same load.

    python -m bench serving cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 --packages FOLDER --json FILE

Packages are those that `python -m bench deploy` has made. Each server runs alone, with one worker of one thread, and
shares the cores of this machine with its clients; each client sends its next image when it has the answer to the last.
The order is base, exits, base, exits, ...; in every run all answers are compared with those of the package offline.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2cm_ext.runner import OnnxCascade

from . import clients, common

FIRST = 5000  # of the test images; those before it have found the thresholds


def measure_package(package: Path, images: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    expected = OnnxCascade.load(package, threads=1).predict(images)
    with (
        tempfile.TemporaryDirectory() as folder,
        clients.serving(package, Path(folder), threads=1, timeout=300.0, max_batch_size=options.batch) as port,
    ):
        replies, found = clients.load_test(port, images, options.clients)
        _, text = clients.get(port, "/metrics")
    wrong = sum(
        status != 200 or answer["prediction"] != prediction
        for (status, answer), prediction in zip(replies, expected.prediction, strict=True)
    )
    metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    batch = float(metrics["e2cm_batch_size_sum"]) / float(metrics["e2cm_batch_size_count"])
    return found | {"mean batch": batch, "answers that differ from offline": int(wrong)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("serving", __doc__, threads=False, seed=False)
    clients.add_load(parser, first=FIRST)
    parser.add_argument("--packages", type=Path, required=True, help="the folder of `python -m bench deploy`")
    parser.add_argument("--budget", default="0.5", help="of FLOPs: which of the packages (default: 0.5)")
    parser.add_argument("--batch", type=int, default=16, help="that a server puts together at most (default: 16)")
    parser.add_argument("--rounds", type=int, default=3)
    options = common.parse(parser, argv)
    images = clients.images_of(options)
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for name in ("base", options.budget):
            found = measure_package(options.packages / f"{name}.zip", images, options)
            rows.append({"round": number, "package": name} | found)
            print(rows[-1], flush=True)
    about = {"clients": options.clients, "requests": len(images), "batch": options.batch}
    common.save(options, about | {"rows": rows}, "onnxruntime", "litserve")
