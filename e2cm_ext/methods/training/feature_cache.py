"""Features of a frozen network, computed once and kept for all epochs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoint import weights_sha256
from ...data.loader import refuse_train_mode
from ...early_exit import EarlyExit
from ...utils import serialization
from .modules import Features
from .seeding import generator, rank_and_world_size

__all__ = ["Cached", "cache", "concatenate"]

_DESCRIPTION = "about.json"
_NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64}


class Cached:
    """A loader of (features, labels) over a whole data set, in an order that follows from seed and epoch.

    Under torch.distributed every process gets its share of every batch.

    Args:
        features: For every exit, and last for the logits, a tensor with one row per sample.
        labels: [N] int64.
        batch_size: Samples per batch, of all processes together.
        seed: Of the order, and of the choice among variants.
        variants: How many times the data set is there, one after the other, each time augmented in another way. An
            epoch takes every sample once, in a variant that is drawn at random.

    Raises:
        ValueError: The labels are not `variants` times the same.
    """

    def __init__(
        self, features: list[Tensor], labels: Tensor, batch_size: int = 128, seed: int = 0, variants: int = 1
    ) -> None:
        self.features, self.labels, self.batch_size, self.seed = features, labels, batch_size, seed
        self._variants, self.count = variants, len(labels) // variants
        if not torch.equal(labels, labels[: self.count].repeat(variants)):
            raise ValueError(f"`variants` is {variants}; the labels are not so many times the same")
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, on which the order and the variants depend."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        order = torch.randperm(self.count, generator=generator(self.seed, self._epoch, 0))
        order = self.variant_rows()[order]
        rank, processes = rank_and_world_size()
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            # If the last batch has fewer samples than there are processes, some samples go to several of them: every
            # process needs at least one.
            yield self.batch(rows[rank % len(rows) :: processes])

    def variant_rows(self) -> Tensor:
        """Return [count] int64: the row of every sample, in the variant that this epoch takes."""
        variant = torch.randint(self._variants, (self.count,), generator=generator(self.seed, self._epoch, 1))
        return torch.arange(self.count) + self.count * variant

    def batch(self, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features, as float32, and the labels of these rows."""
        return [column[rows].float() for column in self.features], self.labels[rows]


def cache(
    ee: EarlyExit,
    loader: Iterable[Any],
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 128,
    seed: int = 0,
    variants: int = 1,
    progress: bool = True,
) -> Cached:
    """Run the network once over a loader and keep what its heads need for training.

    Args:
        ee: A network whose heads are all LearnedHeads, in eval mode.
        loader: Yields (images, labels). It is not used if the folder holds the features already.
        folder: Where to keep the features, for this and later runs; they are read from there as needed. None: keep
            them in memory.
        dtype: In which the features are kept. torch.float16 takes half the room, and rounds.
        batch_size: Of the returned loader, not of this pass.
        seed: Of the order of the returned loader.
        variants: The loader yields the data set so many times, in the same order, each time augmented in another way.
        progress: Show a progress bar.

    Returns:
        A loader of (features, labels) for the `train` of a method that leaves the network frozen.

    Raises:
        ValueError: The folder holds features of another network or other heads, or something else; or the loader
            yields no sample.

    Example:
        ee = sdn.build(model, images[:1], exits=2)
        features = training.cache(ee, loader, progress=False)
        sdn.train(ee, features, epochs=2, progress=False)
    """
    if folder is None:
        columns, labels = _features_in_memory(ee, loader, dtype, progress)
        return Cached(columns, labels, batch_size, seed, variants)
    folder = Path(folder)
    if not (folder / _DESCRIPTION).exists():
        _write_features(ee, loader, folder, dtype, progress)
    return Cached(*_read_features(ee, folder), batch_size, seed, variants)


def concatenate(pieces: Sequence[Tensor]) -> Tensor:
    """Concatenate what was computed batch by batch.

    Raises:
        ValueError: There was no batch.
    """
    if not pieces:
        raise ValueError("the loader gave no sample: all its batches are empty")
    return torch.cat(list(pieces))


def _batches_of_features(ee: EarlyExit, loader: Iterable[Any], progress: bool) -> Iterator[tuple[list[Tensor], Tensor]]:
    features = Features(ee)
    batches = ee.batches(loader, progress)
    refuse_train_mode(ee, "cache")
    for images, labels in batches.run("features", finite=True):
        yield features(images), labels


def _features_in_memory(
    ee: EarlyExit, loader: Iterable[Any], dtype: torch.dtype, progress: bool
) -> tuple[list[Tensor], Tensor]:
    columns: list[list[Tensor]] = [[] for _ in range(len(ee.heads) + 1)]
    labels = []
    for features, batch_labels in _batches_of_features(ee, loader, progress):
        for column, x in zip(columns, features, strict=True):
            column.append(x.to(dtype))
        labels.append(batch_labels)
    return [concatenate(column) for column in columns], concatenate(labels)


def _write_features(ee: EarlyExit, loader: Iterable[Any], folder: Path, dtype: torch.dtype, progress: bool) -> None:
    """Write the folder under a temporary name, and rename it when it is complete."""
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"`dtype` is {dtype}; wanted one of {', '.join(map(str, _NUMPY_DTYPES))}")
    if folder.exists():
        raise ValueError(f"{folder} is there, but holds no features (no {_DESCRIPTION}): give another folder")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        shapes: list[list[int]] = []
        labels = []
        with contextlib.ExitStack() as stack:
            columns = [stack.enter_context(open(partial / f"{j}.bin", "wb")) for j in range(len(ee.heads) + 1)]
            for features, batch_labels in _batches_of_features(ee, loader, progress):
                shapes = [list(x.shape[1:]) for x in features]
                for column, x in zip(columns, features, strict=True):
                    column.write(serialization.bytes_of(x.to(dtype)))
                labels.append(batch_labels.cpu())
        np.save(partial / "labels.npy", concatenate(labels).numpy())
        description = {"of": _network_and_heads(ee), "dtype": str(dtype).removeprefix("torch."), "shapes": shapes}
        (partial / _DESCRIPTION).write_text(json.dumps(description))
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_features(ee: EarlyExit, folder: Path) -> tuple[list[Tensor], Tensor]:
    description = json.loads((folder / _DESCRIPTION).read_text())
    if description["of"] != _network_and_heads(ee):
        raise ValueError(f"{folder} holds features of another network or for other heads: give another folder")
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    dtype = _NUMPY_DTYPES[getattr(torch, description["dtype"])]
    columns = [
        # Mode "c", copy on write: torch warns about arrays that are read-only.
        torch.from_numpy(np.memmap(folder / f"{j}.bin", dtype, "c", shape=(len(labels), *shape)))
        for j, shape in enumerate(description["shapes"])
    ]
    return columns, labels


def _network_and_heads(ee: EarlyExit) -> dict[str, Any]:
    return {
        "network": weights_sha256(ee.stages),
        "exits": list(ee.exit_names),
        "heads": [head.config() for head in ee.head_list()],
    }
