"""Which images the heads were fitted on, as far as a few numbers can tell: exits look better on these than on others.

An image becomes a number, made of the bits of at most 256 of its values. Of all the numbers seen the smallest 1,024 are
kept, whatever the order they came in: a random sample of the images. Where later images have numbers as small as these,
they are either among them or new, and so tell how many of all of them are new. It takes the very same values: of a
loader that augments its images at random, nothing is recognised.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FittedImages"]

_KEPT = 1024
_VALUES = 256


class FittedImages:
    """The images of a loader, in small."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.int64, device="cpu")
        self._all = True  # none has been left out

    def add(self, images: Tensor) -> None:
        numbers = torch.cat([self._kept, numbers_of(images)]).sort().values
        self._kept = numbers[:_KEPT]
        self._all = self._all and len(numbers) <= _KEPT

    @classmethod
    def merge(cls, parts: list[FittedImages]) -> FittedImages:
        """The images of several loaders."""
        seen = cls()
        numbers = torch.cat([part._kept for part in parts]).sort().values
        seen._kept = numbers[:_KEPT]
        seen._all = all(part._all for part in parts) and len(numbers) <= _KEPT
        return seen

    def share(self, numbers: Tensor) -> float:
        """Of the images with these numbers, how many are among the seen; NaN if that cannot be said."""
        known = numbers if self._all else numbers[numbers <= self._kept[-1]]
        return float(torch.isin(known, self._kept).double().mean())


def numbers_of(images: Tensor) -> Tensor:
    """[B] int64: evenly spread, and the same for the same image."""
    values = images.detach().flatten(1)
    step = max(1, values.shape[1] // _VALUES)
    values = values[:, ::step][:, :_VALUES].contiguous().cpu()
    bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).long()
    factors = torch.randint(2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0), device="cpu")
    mixed = (bits * (2 * factors + 1)).sum(1)  # beyond 64 bits, they wrap around
    return (mixed ^ mixed >> 32) * 0x3F58476D1CE4E5B9
