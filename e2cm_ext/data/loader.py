"""Batches of a user's loader, checked and moved to where the network is.

Under torch.distributed every process has a loader of its own part of the data, which may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..utils import distributed
from . import sources

__all__ = ["Loader", "no_labels", "place_of", "placed", "refuse_train_mode", "refuse_used_up"]


class Loader(NamedTuple):
    """Batches of somebody's loader as a network wants them: checked, on its device, in its dtype."""

    batches: Iterable[Any]
    network: nn.Module
    num_classes: int
    image_shape: tuple[int, ...] | None = None
    progress: bool = True
    answers: Callable[[Tensor], Tensor] | None = None  # to images: they take the place of labels, which may be missing

    def run(self, what: str, finite: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over it, with a progress bar that says `what`. `finite`: images with a NaN are refused."""
        device, _ = place_of(self.network)
        batches = sources.checked(
            self.batches,
            num_classes=self.num_classes,
            image_shape=self.image_shape,
            device=device,
            labels=self.answers is None,
            finite=finite,
        )
        with self._bar(batches, what) as bar:
            try:
                for images, labels in bar:
                    x = placed(images, self.network)
                    if self.answers is not None:
                        with torch.no_grad():
                            labels = self.answers(x.clone())  # a network may overwrite what it is given
                    assert labels is not None
                    yield x, labels
            except sources.NoBatch:
                if distributed.count() == 1:  # or others may have some
                    raise

    def images(self, what: str) -> Iterator[Tensor]:
        """One pass over the images alone, those of batches without a sample, too: there may be labels, or not."""
        device, dtype = place_of(self.network)
        batches = sources.checked(
            self.batches, image_shape=self.image_shape, device=device, labels=False, finite=False, empty=True
        )
        with self._bar(batches, what) as bar:
            try:
                for images, _ in bar:
                    yield images.to(dtype) if images.is_floating_point() else images
            except sources.NoBatch:
                if distributed.count() == 1:  # as above
                    raise

    def _bar(self, batches: Iterator[Any], what: str) -> tqdm[Any]:
        try:
            total = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            total = None
        return tqdm(batches, total=total, desc=what, unit="batch", disable=not self.progress, leave=False)


def place_of(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network is, and in which dtype it counts."""
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.get_default_device(), torch.get_default_dtype()


def placed(images: Tensor, network: nn.Module) -> Tensor:
    """On the network's device, in its dtype."""
    device, dtype = place_of(network)
    return images.to(device, dtype if images.is_floating_point() else images.dtype)


def no_labels(images: Tensor) -> Tensor:
    """In the place of those that nobody looks at."""
    return torch.zeros(len(images), dtype=torch.int64, device=images.device)


def refuse_train_mode(network: nn.Module, what: str) -> None:
    for name, module in network.named_modules():
        if module.training:
            which = repr(name) if name else "this one"
            raise RuntimeError(f"{what} needs a network in eval mode, and {which} is in train mode: call .eval() first")


def refuse_used_up(loader: Loader, passes: int) -> None:
    if passes > 1 and isinstance(loader.batches, Iterator):
        raise TypeError(
            f"`loader` is a {type(loader.batches).__name__}, which can be run through only once; fit needs {passes} "
            "passes: give a DataLoader or a list, or heads that need one pass"
        )
