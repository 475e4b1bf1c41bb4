"""Batches of a dataset in a fixed order, and loaders split into disjoint parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from .arrays import Arrays, Batch

__all__ = ["Batches", "Part", "class_names", "split"]

Part = slice | Sequence[int] | Tensor


class Batches:
    """A loader in a fixed order: every pass yields the same batches.

    A batch is a pair: images [B, C, H, W] float32 and labels [B] int64.

    Args:
        dataset: `Arrays`, which are preprocessed a batch at a time, or any torch dataset of (image tensor, label),
            which is read sample by sample.
        batch_size: Samples per batch; the last batch may be smaller.
        part: Which samples, such as slice(1000); None: all.
        shuffle: Draw one order by `seed`, and keep it.
        seed: Of that order.
        workers: Processes that read samples; `Arrays` need none.
        channels_last: The memory format of the images.

    Attributes:
        classes: Names of the classes, if the dataset has any.

    Example:
        import numpy as np
        from e2cm_ext.data import Arrays, Batches

        images = np.zeros((100, 8, 8), np.uint8)
        labels = np.arange(100) % 10
        loader = Batches(Arrays(images, labels, normalise=(0.5, 0.5)), batch_size=32)
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        *,
        batch_size: int = 128,
        part: Part | None = None,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        channels_last: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}; wanted a whole number from 1 up")
        count = _sample_count(dataset)
        self.batch_size, self.workers, self.channels_last = batch_size, workers, channels_last
        self.classes: tuple[str, ...] | None = class_names(dataset)
        self._source = dataset
        self._indices = torch.arange(count)
        if part is not None:
            self._indices = self._indices[part if isinstance(part, slice) else torch.as_tensor(part)]
        if len(self._indices) == 0:
            raise ValueError(f"no samples: `part` is {part!r} of {count}")
        if shuffle:
            order = torch.randperm(len(self._indices), generator=torch.Generator().manual_seed(seed))
            self._indices = self._indices[order]

    @property
    def dataset(self) -> Dataset[Batch]:
        """The samples in their order; len(loader.dataset) is their number."""
        return Subset(self._source, self._indices.tolist())

    def part(self, part: Part) -> Batches:
        """Take some of the samples.

        Args:
            part: Positions in the order of these batches.
        """
        return Batches(
            self._source,
            batch_size=self.batch_size,
            part=self._indices[part if isinstance(part, slice) else torch.as_tensor(part)],
            workers=self.workers,
            channels_last=self.channels_last,
        )

    def __len__(self) -> int:
        return math.ceil(len(self._indices) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self._source, Arrays):
            for indices in torch.split(self._indices, self.batch_size):
                yield self._source.batch(indices, self.channels_last)
            return
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        for images, labels in DataLoader(self.dataset, self.batch_size, num_workers=self.workers, collate_fn=_collate):
            yield images.contiguous(memory_format=order) if images.dim() == 4 else images, labels

    def __repr__(self) -> str:
        return f"Batches({len(self._indices)} samples, batch_size={self.batch_size})"


def split(loader: Any, lengths: Sequence[float], seed: int = 0) -> list[Any]:
    """Split a loader at random into parts that share no sample, such as one to fit on and one to calibrate on.

    Args:
        loader: `Batches`, or a torch DataLoader with a batch size.
        lengths: Fractions, such as [0.8, 0.2], or numbers of samples. The remaining samples are in no part.
        seed: Of the draw.

    Returns:
        One loader per length, of the same type; samples keep their order.

    Raises:
        TypeError: The loader has no batch size, or its dataset no length.
        ValueError: The lengths sum to more than there is, or a part would be empty.

    Example:
        import numpy as np
        from e2cm_ext.data import Arrays, Batches, split

        loader = Batches(Arrays(np.zeros((100, 8, 8), np.uint8), np.arange(100) % 10, normalise=None))
        fit_on, calibrate_on = split(loader, [0.8, 0.2])
    """
    if not isinstance(loader, Batches | DataLoader) or loader.batch_size is None:
        raise TypeError(f"`loader` is a {type(loader).__name__}; wanted Batches, or a DataLoader with a batch_size")
    count = _sample_count(loader.dataset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = [indices.sort().values for indices in torch.split(order, _part_sizes(lengths, count)) if len(indices)]
    return [_subset(loader, indices) for indices in parts[: len(lengths)]]


def _part_sizes(lengths: Sequence[float], count: int) -> list[int]:
    """Numbers of samples in the parts, and of the remaining samples."""
    wanted = f"`lengths` are {list(lengths)} of {count} samples; wanted"
    absolute = all(isinstance(length, int) for length in lengths)
    total = count if absolute else 1
    if not lengths or not all(length > 0 for length in lengths) or sum(lengths) > total + 1e-9:
        raise ValueError(f"{wanted} fractions above 0 that sum to at most 1, or whole numbers to at most {count}")
    edges = [min(count, round(sum(lengths[:i]) * count / total)) for i in range(len(lengths) + 1)]
    sizes = [b - a for a, b in zip(edges, [*edges[1:], count], strict=True)]
    if not all(sizes[:-1]):
        raise ValueError(f"{wanted} at least one sample in every part; these are {sizes[:-1]}")
    return sizes


def _subset(loader: Any, indices: Tensor) -> Any:
    if isinstance(loader, Batches):
        return loader.part(indices)
    return DataLoader(
        Subset(loader.dataset, indices.tolist()),
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
    )


def _collate(samples: list[tuple[Tensor, Any]]) -> Batch:
    shapes = {tuple(image.shape) for image, _ in samples}
    if len(shapes) > 1:
        raise ValueError(f"images of different sizes, {' and '.join(map(str, sorted(shapes)[:2]))}: give `size`")
    return torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])


def _sample_count(dataset: Any) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"`dataset` is a {type(dataset).__name__}; wanted one with a length and numbered samples")
    return len(dataset)


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Names of a dataset's classes, where it has the attribute `classes`, as in torchvision."""
    names = getattr(dataset, "classes", None)
    return None if names is None else tuple(map(str, names))
