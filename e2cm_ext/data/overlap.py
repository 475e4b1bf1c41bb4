"""Overlap between the images that heads were fitted on and other images, estimated from a small sample of hashes.

Exits look better on images that they were fitted on. Every image is hashed, from the bits of at most 256 of its values.
Of all hashes the smallest 1,024 are kept, in whatever order the images come: a random sample of the images. Other
images with hashes as small as these are either among the fitted images or new, so they tell how large the overlap is.
Only exactly equal values are recognised: augmented images always look new.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FittedImages", "image_hashes"]

_MAX_HASHES = 1024
_MAX_VALUES = 256  # of an image


class FittedImages:
    """A sample of the hashes of the images that heads were fitted on."""

    def __init__(self) -> None:
        self._hashes = torch.empty(0, dtype=torch.int64, device="cpu")  # sorted
        self._complete = True  # no hash has been dropped

    def add(self, images: Tensor) -> None:
        """Add a batch of images [B, ...]."""
        self._keep_smallest(image_hashes(images))

    @classmethod
    def merge(cls, parts: list[FittedImages]) -> FittedImages:
        """Combine the images of several loaders."""
        merged = cls()
        merged._keep_smallest(torch.cat([part._hashes for part in parts]))
        merged._complete = merged._complete and all(part._complete for part in parts)
        return merged

    def _keep_smallest(self, hashes: Tensor) -> None:
        hashes = torch.cat([self._hashes, hashes]).sort().values
        self._hashes = hashes[:_MAX_HASHES]
        self._complete = self._complete and len(hashes) <= _MAX_HASHES

    def overlap(self, hashes: Tensor) -> float:
        """Estimate how many of other images are among the fitted ones.

        Args:
            hashes: `image_hashes` of the other images.

        Returns:
            A fraction from 0 to 1; NaN if no hash is small enough to tell.
        """
        comparable = hashes if self._complete else hashes[hashes <= self._hashes[-1]]
        return float(torch.isin(comparable, self._hashes).double().mean())


def image_hashes(images: Tensor) -> Tensor:
    """Hash every image of a batch.

    Args:
        images: [B, ...] in any dtype and memory format.

    Returns:
        [B] int64, spread evenly; equal for equal images.
    """
    values = images.detach().flatten(1)
    step = max(1, values.shape[1] // _MAX_VALUES)
    values = values[:, ::step][:, :_MAX_VALUES].contiguous().cpu()
    bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).long()
    factors = torch.randint(2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0), device="cpu")
    mixed = (bits * (2 * factors + 1)).sum(1)  # wraps around at 64 bits
    return (mixed ^ mixed >> 32) * 0x3F58476D1CE4E5B9
