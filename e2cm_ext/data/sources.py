"""Data sets as batches of (images, labels): from arrays, .npz files, folders and torchvision; and checks of any loader.

    train = load("cifar10.npz", split="train", normalise=((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
    fit_on, calibrate_on = split(train, [0.8, 0.2])

A network must see images as it saw them when it was trained, and nothing here guesses how that was: `normalise` or
`transform` is always given, and images are resized only if `size` says so. No image is altered at random.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

__all__ = ["Arrays", "Batches", "checked", "class_numbers", "load", "split", "transform_of"]

Batch = tuple[Tensor, Tensor]
Normalise = tuple[float | Sequence[float], float | Sequence[float]]  # mean and standard deviation, of images in [0, 1]
Part = slice | Sequence[int] | Tensor
Transform = Callable[[Any], Tensor]  # of one PIL image

_NO_ANSWER: Any = object()  # None is an answer: images in [0, 1] as they are


def load(
    source: str | Path,
    *,
    split: str | None = "train",
    root: str | Path = "data",
    normalise: Normalise | None = _NO_ANSWER,
    transform: Transform | None = None,
    size: int | None = None,
    batch_size: int = 128,
    part: Part | None = None,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    channels_last: bool = False,
    download: bool = False,
) -> Batches:
    """A data set as batches of (images float32 [B, C, H, W], labels int64 [B]).

    source: a .npz file with the arrays x_train, y_train, x_test, y_test and, if you like, classes: see Arrays for what
    they hold (x_train_d may stand for x_train: see `_sums_of_differences`); or a folder with one folder of images per
    class, or with such folders named train, val, ...; or the name of a torchvision data set, such as "CIFAR10", "mnist"
    or "SVHN", to be found below `root`. A folder that has the name of a data set is "./name".
    split: "train", "test", "val" ...: what the source calls it. None: a folder that is not split.
    normalise: (mean, standard deviation) of the network's training, for images in [0, 1]; None: images in [0, 1].
    transform: instead of normalise and size: a function from a PIL image to a tensor, such as transform_of makes.
    size: the shorter side is resized to this (bilinear, antialiased), and the middle size x size is taken.
    part: which samples, such as slice(1000): in the order of the source, which for folders is class after class.
    shuffle: a fixed order, by the seed: the same every time, so that two passes over the data agree.
    workers: processes that read images; arrays need none. download: torchvision may fetch what is not below `root`.
    """
    if (normalise is _NO_ANSWER) == (transform is None) or (transform is not None and size is not None):
        raise ValueError(
            "say how images are prepared: normalise=(mean, std) as when the network was trained, normalise=None for "
            "images in [0, 1], or, with neither `normalise` nor `size`, a whole transform=...: see data.transform_of"
        )
    one = transform or _OnePicture(Preparation(normalise, size))
    path = Path(source)
    if path.suffix == ".npz":
        dataset: Dataset[Batch] = _of_arrays(*_read_npz(path, split), one)
    elif path.is_dir() and not (isinstance(source, str) and _torchvision_name(source)):
        dataset = _folder(path, split, one)
    else:
        dataset = _torchvision(source, split, Path(root), one, download)
    return Batches(
        dataset,
        batch_size=batch_size,
        part=part,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
        channels_last=channels_last,
    )


# ---- from a data set to batches -------------------------------------------------------------------------------------


class Batches:
    """Batches of a data set, in a fixed order, as often as one likes: (images float32 [B, C, H, W], labels int64 [B]).

    dataset: Arrays, which are cut into batches in one piece, or any torch data set of (image tensor, label), which is
    read sample by sample, by `workers` processes. `classes`: the names of the classes, if the data set has any.
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
        count = _count(dataset)
        self.batch_size, self.workers, self.channels_last = batch_size, workers, channels_last
        self.classes: tuple[str, ...] | None = _class_names(dataset)
        self._whole = dataset
        self._rows = torch.arange(count)
        if part is not None:
            self._rows = self._rows[part if isinstance(part, slice) else torch.as_tensor(part)]
        if len(self._rows) == 0:
            raise ValueError(f"no samples: `part` is {part!r} of {count}")
        if shuffle:
            self._rows = self._rows[torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed))]

    @property
    def dataset(self) -> Dataset[Batch]:
        """The samples in their order; len(loader.dataset) is their number."""
        return Subset(self._whole, self._rows.tolist())

    def part(self, part: Part) -> Batches:
        """Some of these batches' samples, counted as they come here."""
        rows = self._rows[part if isinstance(part, slice) else torch.as_tensor(part)]
        return Batches(
            self._whole,
            batch_size=self.batch_size,
            part=rows,
            workers=self.workers,
            channels_last=self.channels_last,
        )

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self._whole, Arrays):
            for rows in torch.split(self._rows, self.batch_size):
                yield self._whole.batch(rows, self.channels_last)
            return
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        for images, labels in DataLoader(self.dataset, self.batch_size, num_workers=self.workers, collate_fn=_stacked):
            yield images.contiguous(memory_format=order) if images.dim() == 4 else images, labels

    def __repr__(self) -> str:
        return f"Batches({len(self._rows)} samples, batch_size={self.batch_size})"


def split(loader: Any, shares: Sequence[float], seed: int = 0) -> list[Any]:
    """Parts of a loader without a common sample, drawn by the seed: to fit heads on one and find thresholds on another.

    shares: fractions, such as [0.8, 0.2], or numbers of samples. What is left over is in no part. loader: Batches, or a
    torch DataLoader; each part is another one. Samples keep their order.
    """
    if not isinstance(loader, Batches | DataLoader) or loader.batch_size is None:
        raise TypeError(f"`loader` is a {type(loader).__name__}; wanted Batches, or a DataLoader with a batch_size")
    count = _count(loader.dataset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = [rows.sort().values for rows in torch.split(order, _sizes(shares, count)) if len(rows)]
    return [_some_of(loader, rows) for rows in parts[: len(shares)]]


def _sizes(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers of samples for the shares, and the rest."""
    wanted = f"`shares` are {list(shares)} of {count} samples; wanted"
    numbers = all(isinstance(share, int) for share in shares)
    whole = count if numbers else 1
    if not shares or not all(share > 0 for share in shares) or sum(shares) > whole + 1e-9:
        raise ValueError(f"{wanted} fractions above 0 that sum to at most 1, or whole numbers to at most {count}")
    edges = [min(count, round(sum(shares[:i]) * count / whole)) for i in range(len(shares) + 1)]
    sizes = [b - a for a, b in zip(edges, [*edges[1:], count], strict=True)]
    if not all(sizes[:-1]):
        raise ValueError(f"{wanted} at least one sample in every part; these are {sizes[:-1]}")
    return sizes


def _some_of(loader: Any, rows: Tensor) -> Any:
    if isinstance(loader, Batches):
        return loader.part(rows)
    return DataLoader(
        Subset(loader.dataset, rows.tolist()),
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
    )


def _stacked(samples: list[tuple[Tensor, Any]]) -> Batch:
    shapes = {tuple(image.shape) for image, _ in samples}
    if len(shapes) > 1:
        raise ValueError(f"images of different sizes, {' and '.join(map(str, sorted(shapes)[:2]))}: give `size`")
    return torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])


def _count(dataset: Any) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"`dataset` is a {type(dataset).__name__}; wanted one with a length and numbered samples")
    return len(dataset)


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    return None if names is None else tuple(map(str, names))


# ---- preparing images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preparation:
    """[B, H, W] or [B, H, W, C], uint8 or floats in [0, 1] -> [B, C, H, W] float32: resized, scaled, normalised.

    In the steps, and so with the bits, of torchvision's ToTensor and Normalize.
    """

    normalise: Normalise | None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"`size` is {self.size!r}; wanted a whole number from 1 up, or None")
        if self.normalise is not None:
            mean, std = self._mean_and_std()
            numbers = torch.cat([mean, std])
            if not (numbers.isfinite().all() and (std > 0).all() and numbers.abs().max() <= 2):
                raise ValueError(
                    f"`normalise` is {self.normalise}; wanted means, and standard deviations above 0, of images in "
                    "[0, 1]: divide by 255 if they are of images in [0, 255]"
                )

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        try:
            mean, std = (torch.tensor(v, dtype=torch.float32).reshape(-1) for v in self.normalise)  # type: ignore[union-attr]
        except (TypeError, ValueError):
            raise ValueError(
                f"`normalise` is {self.normalise!r}; wanted (mean, std), numbers or one per channel"
            ) from None
        return mean, std

    def __call__(self, images: Tensor, channels_last: bool = False) -> Tensor:
        images = images[:, None] if images.dim() == 3 else images.movedim(-1, 1)
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if self.size is not None:
            images = _resized(images, self.size)
        floats = images.float()
        if not images.is_floating_point():
            floats = floats.div_(255)
        elif floats is images:  # not to be written to
            floats = images.clone()
        if self.normalise is None:
            return floats
        channels = floats.shape[1]
        mean, std = self._mean_and_std()
        if len(mean) not in (1, channels) or len(std) not in (1, channels):
            raise ValueError(
                f"`normalise` has {len(mean)} means and {len(std)} standard deviations; images have {channels} channels"
            )
        return floats.sub_(mean[:, None, None]).div_(std[:, None, None])


def _resized(images: Tensor, size: int) -> Tensor:
    """As torchvision's Resize(size) and CenterCrop(size) do it."""
    short, long = sorted(images.shape[2:])
    if short != size:
        length = int(size * long / short)
        shape = (size, length) if images.shape[2] <= images.shape[3] else (length, size)
        images = F.interpolate(images, shape, mode="bilinear", antialias=True)
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


@dataclass(frozen=True)
class _OnePicture:
    """A Preparation as a transform of one PIL image."""

    prepare: Preparation

    def __call__(self, picture: Any) -> Tensor:
        pixels = np.array(picture)
        if pixels.dtype != np.uint8:
            raise ValueError(
                f"an image of mode {picture.mode!r} has {pixels.dtype} pixels; wanted uint8: use `transform`"
            )
        return self.prepare(torch.from_numpy(pixels)[None])[0]


def transform_of(source: Any) -> Transform:
    """How a network's images were prepared: the transform of a timm model, or of torchvision weights.

    source: a model that timm has made, or an entry of a weights enum such as ResNet50_Weights.IMAGENET1K_V2.
    """
    if not isinstance(source, nn.Module) and callable(getattr(source, "transforms", None)):
        made: Transform = source.transforms()
        return made
    if isinstance(source, nn.Module) and getattr(source, "pretrained_cfg", None):
        timm = _needs_vision("timm.data")
        made = timm.create_transform(**timm.resolve_model_data_config(source), is_training=False)
        return made
    raise ValueError(
        f"a {type(source).__name__} does not say how its images were prepared; wanted a timm model or an entry of a "
        "torchvision weights enum. Otherwise use normalise=(mean, std) and size=..., as the network was trained"
    )


# ---- arrays ---------------------------------------------------------------------------------------------------------


class Arrays(Dataset[Batch]):
    """Images and labels in memory.

    images: [N, H, W] or [N, H, W, C], uint8, or floats in [0, 1]. labels: [N], whole numbers from 0 up. classes: their
    names. normalise, size: see load. names: what errors call the two arrays.
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
        self.prepare = Preparation(normalise, size)
        self.classes = None if classes is None else tuple(map(str, classes))
        self.images, self.labels = _images(names[0], images), _labels(names[1], labels, self.classes)
        if len(self.images) != len(self.labels):
            raise ValueError(f"`{names[0]}` has {len(self.images)} images, `{names[1]}` {len(self.labels)} labels")
        self.batch(torch.arange(1))  # does `normalise` suit the channels?

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.prepare(self.images[index][None])[0], self.labels[index]

    def batch(self, rows: Tensor, channels_last: bool = False) -> Batch:
        return self.prepare(self.images[rows], channels_last), self.labels[rows]


class _Pictures(Dataset[Batch]):
    """Arrays for a transform that wants PIL images."""

    def __init__(self, arrays: Arrays, transform: Transform) -> None:
        if arrays.images.dtype is not torch.uint8:
            raise ValueError(f"the images are {arrays.images.dtype}; `transform` gets PIL images and needs uint8")
        self.arrays, self.transform, self.classes = arrays, transform, arrays.classes

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Batch:
        picture = _needs_vision("PIL.Image").fromarray(self.arrays.images[index].squeeze(-1).numpy())
        return self.transform(picture), self.arrays.labels[index]


def _of_arrays(
    images: Any, labels: Any, classes: Sequence[str] | None, names: tuple[str, str], one: Transform
) -> Dataset[Batch]:
    if isinstance(one, _OnePicture):
        normalise, size = one.prepare.normalise, one.prepare.size
        return Arrays(images, labels, normalise=normalise, size=size, classes=classes, names=names)
    return _Pictures(Arrays(images, labels, normalise=None, classes=classes, names=names), one)


def _images(name: str, value: Any) -> Tensor:
    shape = tuple(np.shape(value))
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(f"`{name}` has shape {list(shape)}; wanted [N, H, W] or [N, H, W, C], none of them 0")
    if len(shape) == 4 and shape[3] > 4 >= shape[1]:
        raise ValueError(
            f"`{name}` has shape {list(shape)}; wanted [N, H, W, C], the channels last: .transpose(0, 2, 3, 1)"
        )
    images = _tensor(name, value, "uint8, or floats in [0, 1]")
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


def _labels(name: str, value: Any, classes: tuple[str, ...] | None) -> Tensor:
    labels = _tensor(name, value, "whole numbers")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise ValueError(f"`{name}` are {labels.dtype}; wanted whole numbers, the classes of the images")
    if labels.dim() != 1:
        hint = ": if they are one-hot, use .argmax(1)" if labels.dim() == 2 and labels.shape[1] > 1 else ""
        raise ValueError(f"`{name}` has shape {list(labels.shape)}; wanted [N], one label per image{hint}")
    labels = labels.long()
    if len(labels):
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or (classes is not None and high >= len(classes)):
            most = "" if classes is None else f" to {len(classes) - 1}, as there are {len(classes)} `classes`"
            raise ValueError(f"`{name}` go from {low} to {high}; wanted 0{most or ' and more'}")
    return labels


def _tensor(name: str, value: Any, wanted: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if not array.flags.writeable or not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "u" and array.itemsize > 1 else array)
    except TypeError:
        raise ValueError(f"`{name}` are {array.dtype}; wanted {wanted}") from None


# ---- sources --------------------------------------------------------------------------------------------------------


def _read_npz(path: Path, split: str | None) -> tuple[Any, Any, Any, tuple[str, str]]:
    """Images, labels, names of the classes (or None), and what the arrays are called in the file."""
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
    except Exception as error:  # a damaged file can make zipfile, zlib and numpy raise nearly anything
        raise ValueError(
            f"{path} cannot be read: it is truncated, damaged, or no .npz of plain arrays ({error})"
        ) from error
    if missing:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}; it holds {', '.join(names) or 'nothing'}: see `split`"
        )
    return _sums_of_differences(images) if x.endswith("_d") else images, labels, classes, (x, y)


def _sums_of_differences(differences: Any) -> Any:
    """x_train from x_train_d, which packs a third smaller: RGB images as differences modulo 256, [N, 3, H, W] uint8.

    First green, red - green and blue - green, then from row to row, and then from column to column.
    """
    if differences.dtype != np.uint8 or differences.ndim != 4 or differences.shape[1] != 3:
        raise ValueError(f"differences are {differences.dtype} {list(differences.shape)}; wanted uint8 [N, 3, H, W]")
    images = np.empty((len(differences), *differences.shape[2:], 3), np.uint8)
    for start in range(0, len(differences), 5000):
        few = differences[start : start + 5000]
        planes = np.cumsum(np.cumsum(few, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
        green = planes[:, 0]
        images[start : start + 5000] = np.stack([planes[:, 1] + green, green, planes[:, 2] + green], axis=-1)
    return images


def _folder(path: Path, split: str | None, one: Transform) -> Dataset[Batch]:
    datasets = _needs_vision("torchvision.datasets")
    folders = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    if split is not None and split not in folders:
        raise ValueError(
            f"{path} has no folder {split!r}; it has {', '.join(folders[:10]) or 'none'}. split=None reads it whole"
        )
    if split is not None:
        _refuse_other_classes(path, split)
    dataset: Dataset[Batch] = datasets.ImageFolder(path if split is None else path / split, transform=one)
    return dataset


def _refuse_other_classes(path: Path, split: str) -> None:
    """Classes are numbered in alphabetical order: a folder that one split lacks would shift all labels behind it."""
    mine = {folder.name for folder in (path / split).iterdir() if folder.is_dir()}
    for other in ("train", "val", "test"):
        if (path / other).is_dir():
            theirs = {folder.name for folder in (path / other).iterdir() if folder.is_dir()}
            if theirs and mine and theirs != mine:
                raise ValueError(
                    f"{path / split} and {path / other} have different classes, as {sorted(mine ^ theirs)[:5]}: their "
                    "labels would not mean the same"
                )


# What has its images in one array: [N, H, W], [N, H, W, C], or, for two of them, [N, C, H, W].
_IN_MEMORY = {"CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"}
_IN_MEMORY_CHANNELS_FIRST = {"SVHN", "STL10"}


def _torchvision_name(source: str) -> str | None:
    """The name of a class of torchvision.datasets, whatever its case."""
    if not source.isidentifier():
        return None
    datasets = _needs_vision("torchvision.datasets")
    return {name.lower(): name for name in datasets.__all__}.get(source.lower())


def _torchvision(source: str | Path, split: str | None, root: Path, one: Transform, download: bool) -> Dataset[Batch]:
    try:
        name = _torchvision_name(source) if isinstance(source, str) else None
    except ImportError as error:
        raise ImportError(
            f"{str(source)!r} is neither a folder nor a .npz file, and to look for a data set of that name {error}"
        ) from error
    if name is None:
        raise FileNotFoundError(
            f"{str(source)!r} is neither a folder nor a .npz file, nor the name of a data set in torchvision.datasets"
        )
    make = getattr(_needs_vision("torchvision.datasets"), name)
    known = inspect.signature(make).parameters
    options: dict[str, Any] = {"download": download} if "download" in known else {}
    if "train" in known:
        if split not in ("train", "test"):
            raise ValueError(f"`split` is {split!r}; {name} has 'train' and 'test'")
        options["train"] = split == "train"
    elif "split" in known and split is not None:
        options["split"] = split
    elif split not in (None, "train"):
        raise ValueError(f"`split` is {split!r}; {name} is not split: use split=None, and data.split for parts")
    dataset: Any = make(root, **options, transform=one)
    if name in _IN_MEMORY:
        return _of_arrays(dataset.data, dataset.targets, _class_names(dataset), ("data", "targets"), one)
    if name in _IN_MEMORY_CHANNELS_FIRST:
        images = dataset.data.transpose(0, 2, 3, 1)
        return _of_arrays(images, dataset.labels, _class_names(dataset), ("data", "labels"), one)
    found: Dataset[Batch] = dataset
    return found


def _needs_vision(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision made for another torch
        raise ImportError(f"this needs {module.split('.')[0]}: pip install 'e2cm_ext[vision]' ({error})") from error


# ---- any loader -----------------------------------------------------------------------------------------------------


class NoBatch(ValueError):
    """A loader was empty."""


@overload
def checked(
    loader: Iterable[Any],
    *,
    num_classes: int | None = None,
    image_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    labels: Literal[True] = True,
    finite: bool = True,
    empty: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]: ...


@overload
def checked(
    loader: Iterable[Any],
    *,
    num_classes: int | None = None,
    image_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    labels: bool,
    finite: bool = True,
    empty: bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]: ...


def checked(
    loader: Iterable[Any],
    *,
    num_classes: int | None = None,
    image_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    labels: bool = True,
    finite: bool = True,
    empty: bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """One pass over any loader, with a look at every batch: gives (images, labels int64 [B]) on `device`.

    loader: anything that gives (images, labels) in turn; batches without a sample are left out. num_classes: labels are
    below it. image_shape: of one image. labels=False: items may be images alone, and labels come back as None.
    finite=False: images may hold NaN and infinity. empty=True: batches without a sample are given, too.
    """
    if not hasattr(type(loader), "__iter__") and not hasattr(type(loader), "__getitem__"):
        raise TypeError(
            f"`loader` is a {type(loader).__name__}; wanted something that gives (images, labels) in turn, such as a "
            "DataLoader or a list"
        )
    number = -1
    for number, item in enumerate(loader):
        where = f"batch {number}"
        images, found = _pair(item, where, labels)
        _check_images(images, where, image_shape)
        numbers = class_numbers(found, where, len(images), num_classes) if labels else None
        if len(images) == 0 and not empty:
            continue
        if finite:
            _refuse_non_finite(images, where)
        yield images.to(device), None if numbers is None else numbers.to(device)
    if number < 0:
        raise NoBatch(
            "the loader gave no batch"
            + (
                ": it is an iterator, which can be run through only once; wanted a loader that starts again, such as a "
                "DataLoader or a list"
                if isinstance(loader, Iterator)
                else ": it is empty"
            )
        )


def _pair(item: Any, where: str, labels: bool) -> tuple[Tensor, Any]:
    if isinstance(item, tuple | list) and len(item) == 2:
        images, found = item
    elif not labels and isinstance(item, Tensor | np.ndarray):
        images, found = item, None
    elif not labels and isinstance(item, tuple | list) and len(item) == 1:
        images, found = item[0], None
    else:
        what = f"a {type(item).__name__}"
        if isinstance(item, dict):
            what += f" with {', '.join(map(repr, item))}"
        elif isinstance(item, tuple | list):
            what += f" of {len(item)}"
        if isinstance(item, Tensor):
            what += " without labels"
        pair = "(images, labels)" if labels else "images or (images, labels)"
        raise TypeError(f"{where} of the loader is {what}; wanted {pair}; a single batch is [(images, labels)]")
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise TypeError(f"the images in {where} are a {type(images).__name__}; wanted a tensor [B, C, H, W]")
    return images, found


def _check_images(images: Tensor, where: str, image_shape: Sequence[int] | None) -> None:
    if images.dtype in (torch.uint8, torch.bool):
        raise TypeError(
            f"the images in {where} are {images.dtype}; wanted floats, scaled and normalised: see data.load"
        )
    shape = list(images.shape)
    if image_shape is not None and shape[1:] != list(image_shape):
        hint = ": one image without a batch around it?" if shape == list(image_shape) else ""
        wanted = ", ".join(map(str, ["B", *image_shape]))
        raise ValueError(f"the images in {where} have shape {shape}; wanted [{wanted}], as `example_input`{hint}")
    if not shape:
        raise ValueError(f"the images in {where} are a single number; wanted a tensor [B, C, H, W]")


def class_numbers(found: Any, where: str, count: int, num_classes: int | None) -> Tensor:
    """The labels of a batch as int64 [B], if they are classes; else an error says what is wrong with them."""
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the labels in {where} are a {type(found).__name__}; wanted an int64 tensor [B]") from None
    if labels.dim() == 2 and labels.shape[1] > 1:
        hint = ": if they are one-hot or probabilities, use labels.argmax(1)"
        raise ValueError(f"the labels in {where} have shape {list(labels.shape)}; wanted [{count}]{hint}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TypeError(
            f"the labels in {where} are {labels.dtype}; wanted whole numbers: call .long() if that is what they are"
        )
    if labels.shape != (count,):
        raise ValueError(f"the labels in {where} have shape {list(labels.shape)}; wanted [{count}], one per image")
    labels = labels.long()
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if wrong.any():
        most = "and more" if num_classes is None else f"to {num_classes - 1}, as there are {num_classes} classes"
        raise ValueError(f"{where} has a label {int(labels[wrong][0])}; wanted 0 {most}")
    return labels


def _refuse_non_finite(images: Tensor, where: str) -> None:
    # A NaN is both the least and the greatest of all.
    if images.is_floating_point() and images.numel() and not all(v.isfinite() for v in images.aminmax()):
        sample = int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"image {sample} in {where} holds NaN or infinity; take it out or mend it")
