"""What all methods share: the network, the images, and a folder for what is computed once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext.methods import training

from .. import common
from .results import Curve, Option, options_of, record_from

PARTS = ("held_out", "test")


class Workspace:
    """The network and the images that the arguments name, and the folder --work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.work
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = self.network()
        self.fit = self._images("train", slice(-options.held_out))
        self.held_out = self._images("train", slice(-options.held_out, None))
        self.test = self._images("test")
        self.example = next(iter(self.test))[0][:1]
        self.precision = torch.bfloat16 if options.bfloat16 else None
        self.variants = 2 if options.mirror else 1  # of an image: as it is, and mirrored

    def network(self) -> torch.nn.Module:
        """A new one, as it was trained: for methods that change it."""
        return common.network(self.options)

    def _images(self, split: str, part: slice | None = None) -> e2cm.data.Batches:
        return common.images(self.options, split, part, batch_size=self.options.batch)

    def epochs(self, budget: str, long: int) -> int:
        return {"one": 1, "six": 6, "long": self.options.long or long}[budget]

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"{name}.checkpoint"

    def augmented(self) -> Augmented:
        """The training images as joint trainings use them: shuffled, shifted, mirrored."""
        return Augmented(*common.concatenated(self.fit), self.options.batch, self.options.mirror)

    def features(self, ee: e2cm.EarlyExit, name: str) -> tuple[training.Cached, float]:
        """Of the training images, and mirrored, for the heads of `ee`; and the seconds that it took."""
        folder = self.folder / f"features-{name}"
        if not folder.exists():
            start = time.process_time()
            images = Variants(self.fit, self.variants)
            training.cache(ee, images, folder, dtype=torch.float16, variants=self.variants)
            (folder / "seconds").write_text(str((time.process_time() - start) / self.variants))
        cached = training.cache(ee, [], folder, variants=self.variants, batch_size=self.options.batch)
        return cached, float((folder / "seconds").read_text())

    def kept(self, name: str, make: Callable[[], tuple[e2cm.EarlyExit, float]]) -> tuple[e2cm.EarlyExit, float]:
        """An EarlyExit around the unchanged network, and the seconds it took: made once."""
        path, about = self.folder / f"{name}.e2cm", self.folder / f"{name}.seconds"
        if not path.exists():
            ee, seconds = make()
            about.write_text(str(seconds))
            ee.save(path)
        return e2cm.EarlyExit.load(path, self.model), float(about.read_text())

    def record(self, ee: e2cm.EarlyExit, name: str, part: str) -> e2cm.Record:
        """Of the images "held_out" or "test": made once for every name."""
        return self._record(name, part, lambda: ee.record(getattr(self, part)))

    def record_of_learned(self, ee: e2cm.EarlyExit, name: str, part: str, heads: str) -> e2cm.Record:
        """The same for heads of the kind `heads` on the unchanged network, with one run of it for all of them."""

        def make() -> e2cm.Record:
            cached = training.cache(ee, getattr(self, part), self.folder / f"features-{heads}-{part}")
            return record_from(cached, ee)

        return self._record(name, part, make)

    def _record(self, name: str, part: str, make: Callable[[], e2cm.Record]) -> e2cm.Record:
        path = self.folder / f"{name}.{part}.record"
        if not path.exists():
            make().save(path)
        return e2cm.Record.load(path)

    def options_of(self, ee: e2cm.EarlyExit, name: str, curve: Curve = e2cm.curve) -> list[Option]:
        return options_of(*(self.record(ee, name, part) for part in PARTS), curve)


class Variants:
    """The images as they are, and then mirrored."""

    def __init__(self, batches: e2cm.data.Batches, variants: int) -> None:
        self.batches, self.variants = batches, variants

    def __len__(self) -> int:
        return self.variants * len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for variant in range(self.variants):
            for images, labels in self.batches:
                yield (images.flip(3) if variant else images), labels


class Augmented:
    """Batches in a new order every time; each image shifted by up to 4 pixels and mirrored by chance."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, augment: bool) -> None:
        self.images, self.labels, self.batch, self.augment = images, labels, batch, augment

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.labels)).split(self.batch):
            images = self.images[rows]
            yield (shifted_and_mirrored(images) if self.augment else images), self.labels[rows]


def shifted_and_mirrored(images: Tensor) -> Tensor:
    count, _, height, width = images.shape
    mirrored = torch.rand(count) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, count, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    found = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
    return found.permute(0, 3, 1, 2)
