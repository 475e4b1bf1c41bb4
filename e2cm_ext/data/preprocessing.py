"""Preprocessing of images: scaling, resizing, normalisation; and the transforms of pretrained networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.optional import import_optional

__all__ = ["Normalise", "PILPreprocessing", "Preprocessing", "Transform", "transform_of"]

Normalise = tuple[float | Sequence[float], float | Sequence[float]]  # mean and standard deviation, of images in [0, 1]
Transform = Callable[[Any], Tensor]  # from one PIL image


@dataclass(frozen=True)
class Preprocessing:
    """Turns arrays of images into batches for a network: resizes, scales to [0, 1], normalises.

    The steps are those of torchvision's ToTensor and Normalize, so the results are the same bits.

    Args:
        normalise: (mean, standard deviation) for images in [0, 1], numbers or one per channel; None: images stay in
            [0, 1].
        size: The shorter side is resized to this, and the middle size x size is taken; None: no resizing.
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
        """Preprocess a batch.

        Args:
            images: [B, H, W] or [B, H, W, C], uint8 or floats in [0, 1].
            channels_last: The memory format of the result.

        Returns:
            [B, C, H, W] float32, in new memory.
        """
        images = images[:, None] if images.dim() == 3 else images.movedim(-1, 1)
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if self.size is not None:
            images = _resize(images, self.size)
        floats = images.float()
        if not images.is_floating_point():
            floats = floats.div_(255)
        elif floats is images:  # may be the caller's memory, and is normalised in place below
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


@dataclass(frozen=True)
class PILPreprocessing:
    """A Preprocessing as a transform of one PIL image."""

    preprocessing: Preprocessing

    def __call__(self, image: Any) -> Tensor:
        pixels = np.array(image)
        if pixels.dtype != np.uint8:
            raise ValueError(
                f"an image of mode {image.mode!r} has {pixels.dtype} pixels; wanted uint8: use `transform`"
            )
        return self.preprocessing(torch.from_numpy(pixels)[None])[0]


def transform_of(source: Any) -> Transform:
    """Return the transform that a pretrained network was evaluated with.

    Args:
        source: A model made by timm, or an entry of a torchvision weights enum, such as
            ResNet50_Weights.IMAGENET1K_V2.

    Returns:
        A function from a PIL image to a tensor, for the argument `transform` of `load`.

    Raises:
        ValueError: `source` says nothing about preprocessing.
    """
    if not isinstance(source, nn.Module) and callable(getattr(source, "transforms", None)):
        transform: Transform = source.transforms()
        return transform
    if isinstance(source, nn.Module) and getattr(source, "pretrained_cfg", None):
        timm = import_optional("timm.data")
        transform = timm.create_transform(**timm.resolve_model_data_config(source), is_training=False)
        return transform
    raise ValueError(
        f"a {type(source).__name__} does not say how its images were prepared; wanted a timm model or an entry of a "
        "torchvision weights enum. Otherwise use normalise=(mean, std) and size=..., as the network was trained"
    )


def _resize(images: Tensor, size: int) -> Tensor:
    """As torchvision's Resize(size) followed by CenterCrop(size)."""
    short, long = sorted(images.shape[2:])
    if short != size:
        length = int(size * long / short)
        shape = (size, length) if images.shape[2] <= images.shape[3] else (length, size)
        images = F.interpolate(images, shape, mode="bilinear", antialias=True)
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]
