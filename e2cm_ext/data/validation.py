"""Checks of batches that any loader gives: shapes, dtypes, labels, finite values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

__all__ = ["NoBatch", "checked", "class_numbers"]


class NoBatch(ValueError):
    """Raised for a loader that gives no batch."""


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
    """Run through a loader once and check every batch.

    Args:
        loader: Yields (images, labels).
        num_classes: Labels are below it; None: labels are not limited.
        image_shape: Shape of one image; None: any.
        device: Where images and labels are moved.
        labels: If False, items may be images alone, and labels are not looked at.
        finite: If False, images may hold NaN and infinity.
        empty: If False, batches without a sample are left out.

    Yields:
        Images and labels [B] int64, both on `device`; labels are None if `labels` is False.

    Raises:
        TypeError: The loader, or one of its batches, has a type or dtype that does not fit.
        ValueError: A batch has another shape or other values than wanted.
        NoBatch: The loader gave no batch.
    """
    if not hasattr(type(loader), "__iter__") and not hasattr(type(loader), "__getitem__"):
        raise TypeError(
            f"`loader` is a {type(loader).__name__}; wanted something that gives (images, labels) in turn, such as a "
            "DataLoader or a list"
        )
    number = -1
    for number, item in enumerate(loader):
        where = f"batch {number}"
        images, given_labels = _unpack(item, where, labels)
        _check_images(images, where, image_shape)
        checked_labels = class_numbers(given_labels, where, len(images), num_classes) if labels else None
        if len(images) == 0 and not empty:
            continue
        if finite:
            _check_finite(images, where)
        yield images.to(device), None if checked_labels is None else checked_labels.to(device)
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


def class_numbers(labels: Any, where: str, count: int, num_classes: int | None) -> Tensor:
    """Check the labels of one batch.

    Args:
        labels: What the loader gave.
        where: Names the batch in error messages, such as "batch 3".
        count: The number of images.
        num_classes: Labels are below it; None: labels are not limited.

    Returns:
        [B] int64.

    Raises:
        TypeError: They are not whole numbers.
        ValueError: Their shape is not [count], or a label is no class.
    """
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the labels in {where} are a {type(labels).__name__}; wanted an int64 tensor [B]") from None
    if numbers.dim() == 2 and numbers.shape[1] > 1:
        hint = ": if they are one-hot or probabilities, use labels.argmax(1)"
        raise ValueError(f"the labels in {where} have shape {list(numbers.shape)}; wanted [{count}]{hint}")
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype is torch.bool:
        raise TypeError(
            f"the labels in {where} are {numbers.dtype}; wanted whole numbers: call .long() if that is what they are"
        )
    if numbers.shape != (count,):
        raise ValueError(f"the labels in {where} have shape {list(numbers.shape)}; wanted [{count}], one per image")
    numbers = numbers.long()
    wrong = numbers < 0 if num_classes is None else (numbers < 0) | (numbers >= num_classes)
    if wrong.any():
        limit = "and more" if num_classes is None else f"to {num_classes - 1}, as there are {num_classes} classes"
        raise ValueError(f"{where} has a label {int(numbers[wrong][0])}; wanted 0 {limit}")
    return numbers


def _unpack(item: Any, where: str, need_labels: bool) -> tuple[Tensor, Any]:
    """Images and labels of what a loader gave; labels may be None if they are not needed."""
    if isinstance(item, tuple | list) and len(item) == 2:
        images, labels = item
    elif not need_labels and isinstance(item, Tensor | np.ndarray):
        images, labels = item, None
    elif not need_labels and isinstance(item, tuple | list) and len(item) == 1:
        images, labels = item[0], None
    else:
        what = f"a {type(item).__name__}"
        if isinstance(item, dict):
            what += f" with {', '.join(map(repr, item))}"
        elif isinstance(item, tuple | list):
            what += f" of {len(item)}"
        if isinstance(item, Tensor):
            what += " without labels"
        wanted = "(images, labels)" if need_labels else "images or (images, labels)"
        raise TypeError(f"{where} of the loader is {what}; wanted {wanted}; a single batch is [(images, labels)]")
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise TypeError(f"the images in {where} are a {type(images).__name__}; wanted a tensor [B, C, H, W]")
    return images, labels


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


def _check_finite(images: Tensor, where: str) -> None:
    # aminmax returns NaN if there is one.
    if images.is_floating_point() and images.numel() and not all(v.isfinite() for v in images.aminmax()):
        sample = int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"image {sample} in {where} holds NaN or infinity; take it out or mend it")
