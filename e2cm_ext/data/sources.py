"""Datasets by name or path: .npz files, folders of images, and the datasets of torchvision.

A network must see images as it saw them when it was trained, and this cannot be guessed: `normalise` or `transform` is
always given, and images are resized only if `size` is given. No image is augmented.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..utils.optional import import_optional
from .arrays import Batch, RawArrays, array_dataset, read_npz
from .batches import Batches, Part, class_names
from .preprocessing import Normalise, PILPreprocessing, Preprocessing, Transform

__all__ = ["load"]

_NOT_GIVEN: Any = object()  # None means: images in [0, 1]

# torchvision's datasets that hold all images in one array: [N, H, W] or [N, H, W, C], and [N, C, H, W].
_IN_MEMORY = {"CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"}
_IN_MEMORY_CHANNELS_FIRST = {"SVHN", "STL10"}


def load(
    source: str | Path,
    *,
    split: str | None = "train",
    root: str | Path = "data",
    normalise: Normalise | None = _NOT_GIVEN,
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
    """Load a dataset as batches.

    Args:
        source: One of:

            - a .npz file with the arrays x_train, y_train, x_test, y_test, and perhaps classes, as in `Arrays`
              (x_train_d may stand for x_train: differences between neighbouring pixels, which compress better);
            - a folder with one folder of images per class, or with such folders named train, val, ...;
            - the name of a torchvision dataset, such as "CIFAR10", "mnist" or "SVHN", which is looked for below
              `root`. A folder that has the name of a dataset is "./name".
        split: "train", "test", "val", ..., as the source calls it. None: a folder that is not split.
        root: Where torchvision keeps its datasets.
        normalise: (mean, standard deviation) of the network's training, for images in [0, 1], numbers or one per
            channel. None: images in [0, 1].
        transform: A function from a PIL image to a tensor, in place of `normalise` and `size`: see `transform_of`.
        size: The shorter side is resized to this (bilinear, antialiased), and the middle size x size is taken.
        batch_size: Samples per batch.
        part: Which samples, such as slice(1000), in the order of the source; folders are ordered by class.
        shuffle: Draw one order by `seed`, and keep it: every pass yields the same batches.
        seed: Of that order.
        workers: Processes that read images; arrays need none.
        channels_last: The memory format of the images.
        download: Let torchvision download what is not below `root`.

    Returns:
        Batches of images [B, C, H, W] float32 and labels [B] int64.

    Raises:
        ValueError: The arguments do not say how to preprocess, or do not fit the source, or the source is damaged.
        FileNotFoundError: The source does not exist.
        ImportError: torchvision is needed and not installed.

    Example:
        from e2cm_ext.data import load, split

        train = load("cifar10.npz", normalise=((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
        fit_on, calibrate_on = split(train, [0.8, 0.2])
    """
    if (normalise is _NOT_GIVEN) == (transform is None) or (transform is not None and size is not None):
        raise ValueError(
            "say how images are prepared: normalise=(mean, std) as when the network was trained, normalise=None for "
            "images in [0, 1], or, with neither `normalise` nor `size`, a whole transform=...: see data.transform_of"
        )
    to_tensor = transform or PILPreprocessing(Preprocessing(normalise, size))
    path = Path(source)
    if path.suffix == ".npz":
        dataset = array_dataset(read_npz(path, split), to_tensor)
    elif path.is_dir() and not (isinstance(source, str) and _torchvision_name(source)):
        dataset = _image_folder(path, split, to_tensor)
    else:
        dataset = _torchvision_dataset(source, split, Path(root), to_tensor, download)
    return Batches(
        dataset,
        batch_size=batch_size,
        part=part,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
        channels_last=channels_last,
    )


def _image_folder(path: Path, split: str | None, transform: Transform) -> Dataset[Batch]:
    datasets = import_optional("torchvision.datasets")
    folders = _subfolders(path)
    if split is not None and split not in folders:
        raise ValueError(
            f"{path} has no folder {split!r}; it has {', '.join(folders[:10]) or 'none'}. split=None reads it whole"
        )
    if split is not None:
        _check_same_classes(path, split)
    dataset: Dataset[Batch] = datasets.ImageFolder(path if split is None else path / split, transform=transform)
    return dataset


def _check_same_classes(path: Path, split: str) -> None:
    """Classes are numbered in alphabetical order, so a folder missing in one split would shift the labels after it."""
    classes = set(_subfolders(path / split))
    for other in ("train", "val", "test"):
        if (path / other).is_dir():
            other_classes = set(_subfolders(path / other))
            if other_classes and classes and other_classes != classes:
                raise ValueError(
                    f"{path / split} and {path / other} have different classes, as "
                    f"{sorted(classes ^ other_classes)[:5]}: their labels would not mean the same"
                )


def _subfolders(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir())


def _torchvision_dataset(
    source: str | Path, split: str | None, root: Path, transform: Transform, download: bool
) -> Dataset[Batch]:
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
    dataset_class = getattr(import_optional("torchvision.datasets"), name)
    options = _split_options(name, inspect.signature(dataset_class).parameters, split)
    if "download" in inspect.signature(dataset_class).parameters:
        options["download"] = download
    dataset: Any = dataset_class(root, **options, transform=transform)
    if name in _IN_MEMORY:
        raw = RawArrays(dataset.data, dataset.targets, class_names(dataset), ("data", "targets"))
        return array_dataset(raw, transform)
    if name in _IN_MEMORY_CHANNELS_FIRST:
        images = dataset.data.transpose(0, 2, 3, 1)
        return array_dataset(RawArrays(images, dataset.labels, class_names(dataset), ("data", "labels")), transform)
    found: Dataset[Batch] = dataset
    return found


def _split_options(name: str, parameters: Any, split: str | None) -> dict[str, Any]:
    """The arguments by which a torchvision dataset selects a split."""
    if "train" in parameters:
        if split not in ("train", "test"):
            raise ValueError(f"`split` is {split!r}; {name} has 'train' and 'test'")
        return {"train": split == "train"}
    if "split" in parameters and split is not None:
        return {"split": split}
    if split not in (None, "train"):
        raise ValueError(f"`split` is {split!r}; {name} is not split: use split=None, and data.split for parts")
    return {}


def _torchvision_name(source: str) -> str | None:
    """The name of a class of torchvision.datasets, whatever its case."""
    if not source.isidentifier():
        return None
    datasets = import_optional("torchvision.datasets")
    return {name.lower(): name for name in datasets.__all__}.get(source.lower())
