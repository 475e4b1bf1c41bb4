"""A user's loader as a network takes it: batches are checked, and moved to the network's device and dtype.

Under torch.distributed every process has a loader of its own part of the data, which may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..utils import distributed
from .validation import NoBatch, checked

__all__ = ["Loader", "check_reiterable", "device_and_dtype", "dummy_labels", "refuse_train_mode", "to_network"]


class Loader(NamedTuple):
    """Batches of a user's loader for one network.

    Args:
        batches: The user's loader.
        network: Its device and dtype are those of the batches.
        num_classes: Labels are below it.
        image_shape: Shape of one image; None: any.
        progress: Show a progress bar.
        pseudo_labels: Makes labels from images, in place of the loader's, which may then be missing.
    """

    batches: Iterable[Any]
    network: nn.Module
    num_classes: int
    image_shape: tuple[int, ...] | None = None
    progress: bool = True
    pseudo_labels: Callable[[Tensor], Tensor] | None = None

    def run(self, description: str, finite: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Run through the loader once.

        Args:
            description: Of the progress bar.
            finite: Refuse images with NaN or infinity.

        Yields:
            Images on the network's device and in its dtype, and labels [B] int64.
        """
        device, _ = device_and_dtype(self.network)
        batches = checked(
            self.batches,
            num_classes=self.num_classes,
            image_shape=self.image_shape,
            device=device,
            labels=self.pseudo_labels is None,
            finite=finite,
        )
        with self._progress_bar(batches, description) as bar, _empty_in_one_process():
            for images, labels in bar:
                x = to_network(images, self.network)
                if self.pseudo_labels is not None:
                    with torch.no_grad():
                        labels = self.pseudo_labels(x.clone())  # a network may overwrite its input
                assert labels is not None
                yield x, labels

    def images(self, description: str) -> Iterator[Tensor]:
        """Run through the images once, those of batches without a sample included; labels are ignored.

        Args:
            description: Of the progress bar.

        Yields:
            Images on the network's device and in its dtype.
        """
        device, dtype = device_and_dtype(self.network)
        batches = checked(
            self.batches, image_shape=self.image_shape, device=device, labels=False, finite=False, empty=True
        )
        with self._progress_bar(batches, description) as bar, _empty_in_one_process():
            for images, _ in bar:
                yield images.to(dtype) if images.is_floating_point() else images

    def _progress_bar(self, batches: Iterator[Any], description: str) -> tqdm[Any]:
        try:
            total = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            total = None
        return tqdm(batches, total=total, desc=description, unit="batch", disable=not self.progress, leave=False)


@contextmanager
def _empty_in_one_process() -> Iterator[None]:
    """Under torch.distributed, let a process run without batches: the others may have some."""
    try:
        yield
    except NoBatch:
        if distributed.world_size() == 1:
            raise


def device_and_dtype(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of a network's first floating-point parameter, or buffer if it has none."""
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.get_default_device(), torch.get_default_dtype()


def to_network(images: Tensor, network: nn.Module) -> Tensor:
    """Move images to a network's device, and floating-point ones to its dtype."""
    device, dtype = device_and_dtype(network)
    return images.to(device, dtype if images.is_floating_point() else images.dtype)


def dummy_labels(images: Tensor) -> Tensor:
    """Make zeros [B] int64, for passes in which labels do not matter."""
    return torch.zeros(len(images), dtype=torch.int64, device=images.device)


def refuse_train_mode(network: nn.Module, what: str) -> None:
    """Raise RuntimeError if a module of the network is in train mode.

    Args:
        network: The network.
        what: What it is wanted for, for the error message.
    """
    for name, module in network.named_modules():
        if module.training:
            which = repr(name) if name else "this one"
            raise RuntimeError(f"{what} needs a network in eval mode, and {which} is in train mode: call .eval() first")


def check_reiterable(loader: Loader, passes: int) -> None:
    """Raise TypeError if several passes are needed, and the user's loader is an iterator."""
    if passes > 1 and isinstance(loader.batches, Iterator):
        raise TypeError(
            f"`loader` is a {type(loader.batches).__name__}, which can be run through only once; fit needs {passes} "
            "passes: give a DataLoader or a list, or heads that need one pass"
        )
