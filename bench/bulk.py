"""Bulk inference with Ray Data, two workers, one of which is killed in the middle: is every image answered once?

python bench/bulk.py cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 --package FILE --json FILE
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from curves import write

from e2cm_ext.integrations.ray import Predictor
from e2cm_ext.runner import OnnxCascade


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


def kill_one(folder: Path, after: int, killed: list[int]) -> None:
    """A worker of this bench, when so many batches are done."""
    while len(list(folder.glob("batch *"))) < after:
        time.sleep(0.01)
    workers = sorted(int(path.name.split()[1]) for path in folder.glob("worker *"))
    os.kill(workers[0], signal.SIGKILL)
    killed.append(workers[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a .npz file with x_train, as bench/curves.py takes it")
    parser.add_argument("--mean", type=float, nargs="+")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with np.load(options.data) as data:
        pixels = data["x_train"][: options.images]
    mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (options.mean, options.std))

    def prepare(images: np.ndarray) -> np.ndarray:
        if images.shape[-1] == 3:
            images = images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray((images.astype(np.float32) / 255 - mean) / std, np.float32)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=500 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"id": i, "image": image} for i, image in enumerate(pixels)]
    with tempfile.TemporaryDirectory() as name:
        folder, killed = Path(name), []  # type: ignore[var-annotated]
        done = options.images // options.batch // 2
        threading.Thread(target=kill_one, args=(folder, done, killed), daemon=True).start()
        start = time.perf_counter()
        answers = ray.data.from_items(rows, override_num_blocks=40).map_batches(
            Signed,
            fn_constructor_kwargs={"network": str(options.package), "prepare": prepare, "folder": name, "threads": 1},
            batch_size=options.batch,
            concurrency=2,
            num_cpus=1,
        )
        batches = list(answers.iter_batches(batch_size=None))
        seconds = time.perf_counter() - start
        workers = len(list(folder.glob("worker *")))
    ids, exits, predictions = (np.concatenate([b[n] for b in batches]) for n in ("id", "exit", "prediction"))
    cascade = OnnxCascade.load(options.package, threads=2)
    expected = [cascade.predict(prepare(part)) for part in np.array_split(pixels, max(1, len(pixels) // 500))]
    exit, prediction = (np.concatenate([getattr(e, n) for e in expected]) for n in ("exit", "prediction"))
    result = {
        "images": options.images,
        "answers": len(ids),
        "images answered": len(np.unique(ids)),
        "workers killed": len(killed),
        "workers that ran": workers,
        "other predictions than offline": int((predictions != prediction[ids]).sum()),
        "other exits than offline": int((exits != exit[ids]).sum()),
        "seconds": seconds,
        "ray": ray.__version__,
    }
    print(result)
    if options.json:
        write(options.json, result)
    ray.shutdown()


if __name__ == "__main__":
    main()
