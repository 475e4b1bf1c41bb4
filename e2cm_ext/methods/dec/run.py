"""The training of DEC, step by step, with checkpoints."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...early_exit import EarlyExit
from ...utils import serialization
from . import pretraining
from .clustering import Distort, cluster, store_clusters
from .encoders import Encoders
from .schedule import Schedule

__all__ = ["TrainingResult", "TrainingRun", "train"]

_KIND = "DEC training"


@dataclass
class TrainingResult:
    """What was learned by each encoder, the largest first. Clusters are numbered as the large encoder numbers them.

    Args:
        assignment: For each encoder, the cluster of every training sample [N] int64.
        start: The same, by k-means before DEC.
        changed: For each encoder, shares of the samples that changed their cluster between two targets.
    """

    assignment: list[Tensor] = field(default_factory=list)
    start: list[Tensor] = field(default_factory=list)
    changed: list[list[float]] = field(default_factory=list)


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    distort: Distort | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Pretrain and cluster all encoders of a network. Calibrate it afterwards, on any images.

    torch's random number generators are left as they were.

    Args:
        ee: What `build` returned; it is trained in place.
        loader: Yields images or (images, labels); labels are not used. All images are held in memory, as float32.
        distort: Alters images [B, ...] at random, so that each stays in its cluster, such as `shifted`. DEC then learns
            from the codes of altered images; targets and centres are always computed from unaltered ones. None: as in
            the paper.
        schedule: How long and how fast. None: the defaults of `Schedule`.
        seed: Of all random numbers.
        checkpoint: A file to continue from, if it exists. It is written after every step: pretraining, fine-tuning and
            clustering of each encoder.
        precision: Of matrix products, by autocast, such as torch.bfloat16. None: float32.
        progress: Show progress bars.

    Returns:
        The clusters of the training samples.

    Raises:
        TypeError: `build` has not made the network.
        ValueError: Images hold NaN or infinity, there are fewer different images than clusters, weights became
            infinite, or the checkpoint belongs to another run.

    Example:
        ee = dec.build(images[:1], clusters=10, widths=(50, 50, 100))
        short = dec.Schedule(layer_epochs=1, epochs=1, exit_epochs=1, k_means_starts=1, max_targets=2)
        dec.train(ee, [images], schedule=short, progress=False)
        ee.calibrate([images], flops=0.5, progress=False)
    """
    images = _all_images(ee, loader, progress)
    with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.enable_grad():
        run = TrainingRun(ee, images, distort, schedule or Schedule(), seed, precision, progress)
        done = run.load(checkpoint) if checkpoint is not None and Path(checkpoint).exists() else 0
        for number, (step, which) in enumerate(run.steps()):
            if number < done:
                continue
            torch.manual_seed(1000 * seed + number)  # so that a run that continues draws the same random numbers
            step(which)
            if checkpoint is not None:
                run.save(checkpoint, number + 1)
    ee.thresholds = math.inf
    ee.eval()
    return run.result


def _all_images(ee: EarlyExit, loader: Iterable[Any], progress: bool) -> Tensor:
    batches = ee.batches(loader, progress)
    images = torch.cat([batch.float() for batch in batches.images("images")])
    if not images.isfinite().all():
        raise ValueError("the images hold NaN or infinity: all that is learned would be spoiled")
    return images


class TrainingRun:
    """The steps of a training, and its checkpoint.

    Args:
        ee: What `build` returned.
        images: All training images, float32.
        distort: See `train`.
        schedule: How long and how fast.
        seed: Of k-means.
        precision: Of matrix products, by autocast.
        progress: Show progress bars.
    """

    def __init__(
        self,
        ee: EarlyExit,
        images: Tensor,
        distort: Distort | None,
        schedule: Schedule,
        seed: int,
        precision: torch.dtype | None,
        progress: bool,
    ) -> None:
        self.encoders = Encoders(ee, images, precision)
        self.result = TrainingResult()
        self._distort, self._schedule, self._seed, self._progress = distort, schedule, seed, progress
        # Not a sum of the images, whose last bits depend on the number of threads.
        checksum = zlib.crc32(serialization.bytes_of(self.encoders.rows))
        self._about = [
            self.encoders.sizes, len(images), checksum, asdict(schedule), seed, str(precision), distort is not None
        ]  # fmt: skip

    def steps(self) -> list[tuple[Callable[[int], None], int]]:
        """Return all steps in order: functions, and the number of the encoder to call each with."""
        of_each = (self._pretrain, self._fine_tune, self._cluster)
        return [(step, which) for which in range(len(self.encoders.names)) for step in of_each]

    def _pretrain(self, which: int) -> None:
        pretraining.pretrain(self.encoders, which, self._schedule, self._progress)

    def _fine_tune(self, which: int) -> None:
        pretraining.fine_tune(self.encoders, which, self._schedule, self._progress)

    def _cluster(self, which: int) -> None:
        clusters = cluster(self.encoders, which, self._schedule, self._seed, self._distort, self._progress)
        reference = self.result.assignment[0] if which else None
        assignment, start = store_clusters(self.encoders, which, clusters, reference)
        self.result.assignment.append(assignment)
        self.result.start.append(start)
        self.result.changed.append(clusters.changed)

    def save(self, path: str | os.PathLike[str], done: int) -> None:
        """Write a checkpoint, after so many steps."""
        results = {
            f"result.{name}.{which}": value
            for name in ("assignment", "start")
            for which, value in enumerate(getattr(self.result, name))
        }
        tensors = {f"encoders.{name}": value.contiguous() for name, value in self.encoders.state_dict().items()}
        info = {"about": self._about, "done": done, "changed": self.result.changed}
        serialization.write(path, _KIND, tensors | results, info)

    def load(self, path: str | os.PathLike[str]) -> int:
        """Read a checkpoint, and return how many steps are done.

        Raises:
            ValueError: The file is damaged, or belongs to another run.
        """
        tensors, info = serialization.read(path, _KIND)
        if info["about"] != json.loads(json.dumps(self._about)):
            raise ValueError(f"{path} is of another training (images, sizes, schedule, seed ...): give another file")
        prefix = "encoders."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        self.encoders.load_state_dict(state)
        device = self.encoders.rows.device
        for name in ("assignment", "start"):
            values = [tensors[f"result.{name}.{which}"].to(device) for which in range(len(info["changed"]))]
            setattr(self.result, name, values)
        self.result.changed = info["changed"]
        return int(info["done"])
