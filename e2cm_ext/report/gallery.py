"""The images of a report: at every exit, the samples with the highest and the lowest confidence, as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calibration.record import Record, Replay

__all__ = ["ExitImages", "GalleryImage", "Restore", "build_gallery"]

_IMAGES_PER_END = 6  # with the highest confidence, and as many with the lowest
_MAX_PIXELS = 96  # of a side
_MAX_PNG_PIXELS = 48  # larger images are JPEG, which is smaller

Restore = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GalleryImage:
    """One image with what was predicted for it.

    Attributes:
        source: The image as a data URI.
        label: Name of the true class.
        prediction: Name of the predicted class.
        correct: Whether these are the same.
        confidence: At the exit where the sample left.
    """

    source: str
    label: str
    prediction: str
    correct: bool
    confidence: float


@dataclass(frozen=True)
class ExitImages:
    """Images of samples that left at one exit.

    Attributes:
        name: Of the exit; empty for samples that never left early.
        leavers: Number of samples that left there.
        most_confident: From the highest confidence down.
        least_confident: To the lowest confidence; without images of `most_confident`.
    """

    name: str
    leavers: int
    most_confident: list[GalleryImage]
    least_confident: list[GalleryImage]


class _Selection(NamedTuple):
    """Sample numbers of one exit."""

    name: str
    leavers: int
    most_confident: list[int]
    least_confident: list[int]


def build_gallery(
    record: Record, replay: Replay, classes: Sequence[str], loader: Iterable[Any], restore: Restore | None
) -> list[ExitImages]:
    """Collect images of every exit where a sample left, then of the samples that never left early.

    Args:
        record: What the exits say about the samples of `loader`.
        replay: Where these samples leave.
        classes: Names of the classes.
        loader: Batches of (images, labels), in the order of the record.
        restore: Turns a batch, as the network takes it, into images in [0, 1]. None: each image is rescaled to [0, 1].
    """
    selections = _select_samples(record, replay)
    wanted = {i for each in selections for i in (*each.most_confident, *each.least_confident)}
    sources = _data_uris(loader, wanted, restore)

    def gallery_image(i: int) -> GalleryImage:
        label, prediction = int(record.label[i]), int(replay.prediction[i])
        return GalleryImage(
            sources[i], classes[label], classes[prediction], label == prediction, float(replay.confidence[i])
        )

    return [
        ExitImages(
            each.name,
            each.leavers,
            [gallery_image(i) for i in each.most_confident],
            [gallery_image(i) for i in each.least_confident],
        )
        for each in selections
    ]


def _select_samples(record: Record, replay: Replay) -> list[_Selection]:
    selections = []
    for j, name in enumerate((*record.names, "")):
        rows = (replay.exit == j).nonzero().flatten()
        order = rows[replay.confidence[rows].nan_to_num(-math.inf).argsort(descending=True, stable=True)]
        first = order[:_IMAGES_PER_END].tolist()
        last = order[max(len(first), len(order) - _IMAGES_PER_END) :].tolist()
        if len(rows):
            selections.append(_Selection(name, len(rows), first, last))
    return selections


def _data_uris(loader: Iterable[Any], wanted: set[int], restore: Restore | None) -> dict[int, str]:
    """Return the images with these sample numbers, from one pass over the loader."""
    found: dict[int, str] = {}
    start = 0
    for images, _ in loader:
        numbers = [i for i in range(start, start + len(images)) if i in wanted]
        if numbers:
            selected = torch.as_tensor(images)[[i - start for i in numbers]].float().cpu()
            selected = selected if restore is None else restore(selected)
            for i, image in zip(numbers, selected, strict=True):
                found[i] = _data_uri(_rescaled(image) if restore is None else image)
        start += len(images)
    return found


def _rescaled(image: Tensor) -> Tensor:
    low, high = image.aminmax()
    return (image - low) / (high - low).clamp_min(1e-12)


def _data_uri(image: Tensor) -> str:
    """Encode [C, H, W] in [0, 1]. If C is neither 1 nor 3, the first channel is shown."""
    from PIL import Image

    if image.dim() == 2:
        image = image[None]
    channels = image if image.shape[0] == 3 else image[:1]
    array = (channels.nan_to_num().clamp(0, 1) * 255).round().byte().movedim(0, -1).squeeze(-1).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
    kind = "PNG" if max(picture.size) <= _MAX_PNG_PIXELS else "JPEG"
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
