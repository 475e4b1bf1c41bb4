"""Images and labels in memory, and the .npz files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.optional import import_optional
from .preprocessing import Normalise, PILPreprocessing, Preprocessing, Transform

__all__ = ["Arrays", "Batch", "PILImages", "RawArrays", "array_dataset", "read_npz"]

Batch = tuple[Tensor, Tensor]  # images and labels


class Arrays(Dataset[Batch]):
    """A dataset of images and labels in memory.

    Args:
        images: [N, H, W] or [N, H, W, C], uint8, or floats in [0, 1].
        labels: [N], whole numbers from 0 up.
        normalise: As in `load`.
        size: As in `load`.
        classes: Names of the classes.
        names: What error messages call the two arrays.

    Raises:
        ValueError: An array has another shape or dtype, or other values than these.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        *,
        normalise: Normalise | None,
        size: int | None = None,
        classes: Sequence[str] | None = None,
        names: tuple[str, str] = ("images", "labels"),
    ) -> None:
        self.preprocessing = Preprocessing(normalise, size)
        self.classes = None if classes is None else tuple(map(str, classes))
        self.images, self.labels = _check_images(names[0], images), _check_labels(names[1], labels, self.classes)
        if len(self.images) != len(self.labels):
            raise ValueError(f"`{names[0]}` has {len(self.images)} images, `{names[1]}` {len(self.labels)} labels")
        self.batch(torch.arange(1))  # raises if `normalise` does not fit the number of channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.preprocessing(self.images[index][None])[0], self.labels[index]

    def batch(self, indices: Tensor, channels_last: bool = False) -> Batch:
        """Preprocess several samples at once.

        Args:
            indices: [B] int64.
            channels_last: The memory format of the images.

        Returns:
            Images [B, C, H, W] float32 and labels [B] int64.
        """
        return self.preprocessing(self.images[indices], channels_last), self.labels[indices]


class PILImages(Dataset[Batch]):
    """Arrays for a transform that takes PIL images."""

    def __init__(self, arrays: Arrays, transform: Transform) -> None:
        if arrays.images.dtype is not torch.uint8:
            raise ValueError(f"the images are {arrays.images.dtype}; `transform` gets PIL images and needs uint8")
        self.arrays, self.transform, self.classes = arrays, transform, arrays.classes

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Batch:
        image = import_optional("PIL.Image").fromarray(self.arrays.images[index].squeeze(-1).numpy())
        return self.transform(image), self.arrays.labels[index]


class RawArrays(NamedTuple):
    """Arrays as a source holds them, not checked yet."""

    images: Any
    labels: Any
    classes: Sequence[str] | None
    names: tuple[str, str]  # what the source calls images and labels


def array_dataset(raw: RawArrays, transform: Transform) -> Dataset[Batch]:
    """A dataset of arrays; they are preprocessed in batches, unless the transform is the user's own."""
    if isinstance(transform, PILPreprocessing):
        normalise, size = transform.preprocessing.normalise, transform.preprocessing.size
        return Arrays(raw.images, raw.labels, normalise=normalise, size=size, classes=raw.classes, names=raw.names)
    arrays = Arrays(raw.images, raw.labels, normalise=None, classes=raw.classes, names=raw.names)
    return PILImages(arrays, transform)


def read_npz(path: Path, split: str | None) -> RawArrays:
    """Read one split of a .npz file."""
    try:
        file = np.load(path, allow_pickle=False)
        names = list(file.files)
        x = f"x_{split}_d" if f"x_{split}" not in names and f"x_{split}_d" in names else f"x_{split}"
        y = f"y_{split}"
        missing = [name for name in (x, y) if name not in names]
        images, labels, classes = (file[name] if name in names else None for name in (x, y, "classes"))
        file.close()
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything for a damaged file
        raise ValueError(
            f"{path} cannot be read: it is truncated, damaged, or no .npz of plain arrays ({error})"
        ) from error
    if missing:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}; it holds {', '.join(names) or 'nothing'}: see `split`"
        )
    return RawArrays(_undo_differences(images) if x.endswith("_d") else images, labels, classes, (x, y))


def _undo_differences(differences: Any) -> Any:
    """RGB images from differences modulo 256 [N, 3, H, W] uint8, which compress to a third less.

    They were taken in this order: green, red - green and blue - green; from row to row; from column to column.
    """
    if differences.dtype != np.uint8 or differences.ndim != 4 or differences.shape[1] != 3:
        raise ValueError(f"differences are {differences.dtype} {list(differences.shape)}; wanted uint8 [N, 3, H, W]")
    images = np.empty((len(differences), *differences.shape[2:], 3), np.uint8)
    for start in range(0, len(differences), 5000):
        chunk = differences[start : start + 5000]
        planes = np.cumsum(np.cumsum(chunk, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
        green = planes[:, 0]
        images[start : start + 5000] = np.stack([planes[:, 1] + green, green, planes[:, 2] + green], axis=-1)
    return images


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_images(name: str, value: Any) -> Tensor:
    shape = tuple(np.shape(value))
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(f"`{name}` has shape {list(shape)}; wanted [N, H, W] or [N, H, W, C], none of them 0")
    if len(shape) == 4 and shape[3] > 4 >= shape[1]:
        raise ValueError(
            f"`{name}` has shape {list(shape)}; wanted [N, H, W, C], the channels last: .transpose(0, 2, 3, 1)"
        )
    images = _to_tensor(name, value, "uint8, or floats in [0, 1]")
    if images.is_floating_point():
        low, high = (v.item() for v in images.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"`{name}` are floats from {low:.6g} to {high:.6g}; wanted [0, 1] (divide by 255 if they go that far) "
                "or uint8"
            )
        return images.float()
    if images.dtype is not torch.uint8:
        raise ValueError(f"`{name}` are {images.dtype}; wanted uint8, or floats in [0, 1]")
    return images


def _check_labels(name: str, value: Any, classes: tuple[str, ...] | None) -> Tensor:
    labels = _to_tensor(name, value, "whole numbers")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise ValueError(f"`{name}` are {labels.dtype}; wanted whole numbers, the classes of the images")
    if labels.dim() != 1:
        hint = ": if they are one-hot, use .argmax(1)" if labels.dim() == 2 and labels.shape[1] > 1 else ""
        raise ValueError(f"`{name}` has shape {list(labels.shape)}; wanted [N], one label per image{hint}")
    labels = labels.long()
    if len(labels):
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or (classes is not None and high >= len(classes)):
            limit = "" if classes is None else f" to {len(classes) - 1}, as there are {len(classes)} `classes`"
            raise ValueError(f"`{name}` go from {low} to {high}; wanted 0{limit or ' and more'}")
    return labels


def _to_tensor(name: str, value: Any, wanted: str) -> Tensor:
    """A tensor on the CPU, of the same memory where torch can share it."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if not array.flags.writeable or not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "u" and array.itemsize > 1 else array)
    except TypeError:
        raise ValueError(f"`{name}` are {array.dtype}; wanted {wanted}") from None
