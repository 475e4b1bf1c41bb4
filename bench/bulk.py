"""Bulk inference with Ray Data, two workers, one of which is killed in the middle: is every image answered once?

    python -m bench bulk cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 --package FILE --json FILE

The package is one that `python -m bench deploy` has made.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from e2cm_ext.integrations.ray import Predictor
from e2cm_ext.runner import OnnxCascade

from . import common

BLOCKS = 40  # of the data set


class Signed(Predictor):
    """Leaves the number of its process in a folder, and a mark for every batch."""

    def __init__(self, *args: Any, folder: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = Path(folder)
        (self.folder / f"worker {os.getpid()}").touch()

    def __call__(self, batch: Any) -> dict[str, Any]:
        answers = super().__call__(batch)
        (self.folder / f"batch {batch['id'][0]} by {os.getpid()}").touch()
        return answers


class Preparation(NamedTuple):
    """Normalisation of uint8 images."""

    mean: np.ndarray
    std: np.ndarray

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return (images.astype(np.float32) / 255 - self.mean) / self.std


class Run(NamedTuple):
    columns: dict[str, np.ndarray]  # id, exit, prediction
    seconds: float
    workers: int
    killed: int


def run_with_ray(pixels: np.ndarray, prepare: Preparation, options: argparse.Namespace) -> Run:
    import ray

    # Workers get this module by value: it need not be on their path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    rows = [{"id": i, "image": image} for i, image in enumerate(pixels)]
    with tempfile.TemporaryDirectory() as name:
        folder, killed = Path(name), []  # type: ignore[var-annotated]
        done = len(pixels) // options.batch // 2
        threading.Thread(target=kill_one, args=(folder, done, killed), daemon=True).start()
        start = time.perf_counter()
        answers = ray.data.from_items(rows, override_num_blocks=BLOCKS).map_batches(
            Signed,
            fn_constructor_kwargs={"network": str(options.package), "prepare": prepare, "folder": name, "threads": 1},
            batch_size=options.batch,
            concurrency=2,
            num_cpus=1,
        )
        found = list(answers.iter_batches(batch_size=None))
        seconds = time.perf_counter() - start
        workers = len(list(folder.glob("worker *")))
    columns = {name: np.concatenate([batch[name] for batch in found]) for name in ("id", "exit", "prediction")}
    return Run(columns, seconds, workers, len(killed))


def kill_one(folder: Path, after: int, killed: list[int]) -> None:
    """Kills a worker of this bench, when so many batches are done."""
    while len(list(folder.glob("batch *"))) < after:
        time.sleep(0.01)
    workers = sorted(int(path.name.split()[1]) for path in folder.glob("worker *"))
    os.kill(workers[0], signal.SIGKILL)
    killed.append(workers[0])


def start_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=1 << 30,
        _node_ip_address="127.0.0.1",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def predict_offline(pixels: np.ndarray, prepare: Preparation, options: argparse.Namespace) -> dict[str, np.ndarray]:
    cascade = OnnxCascade.load(options.package, threads=2)
    expected = [cascade.predict(prepare(part)) for part in np.array_split(pixels, max(1, len(pixels) // 500))]
    return {name: np.concatenate([getattr(part, name) for part in expected]) for name in ("exit", "prediction")}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    batches = common.images(options, "train", slice(options.images), normalise=None, batch_size=500)
    scaled, _ = common.concatenated(batches)
    pixels = (255 * scaled).round().byte().numpy()
    prepare = Preparation(*(np.array(v, np.float32).reshape(-1, 1, 1) for v in (options.mean, options.std)))
    ray = start_ray()
    run = run_with_ray(pixels, prepare, options)
    ray.shutdown()
    ids, expected = run.columns["id"], predict_offline(pixels, prepare, options)
    different = {name: int((run.columns[name] != expected[name][ids]).sum()) for name in expected}
    return {
        "images": options.images,
        "answers": len(ids),
        "images answered": len(np.unique(ids)),
        "workers killed": run.killed,
        "workers that ran": run.workers,
        "other predictions than offline": different["prediction"],
        "other exits than offline": different["exit"],
        "seconds": run.seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("bulk", __doc__, threads=False, seed=False)
    common.add_images(parser)
    parser.add_argument(
        "--package", type=Path, required=True, help="such as FOLDER/0.5.zip of `python -m bench deploy`"
    )
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=128)
    options = common.parse(parser, argv)
    if options.mean is None:
        parser.error("--mean and --std are wanted: workers normalise images by them")
    result = measure(options)
    print(result)
    common.save(options, result, "ray", "onnxruntime")
