"""A loaded network that takes and returns numpy arrays, for the workers of engines."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..deploy import OnnxCascade, TorchCascade, load
from ..early_exit import EarlyExit
from ..runner import Answers

__all__ = ["ArrayPredictor", "ImageArray", "NetworkSource"]

ImageArray = np.ndarray[Any, Any]
# The path of a package from EarlyExit.export, or a function that makes a network and is called in the worker.
NetworkSource = str | os.PathLike[str] | Callable[[], EarlyExit | OnnxCascade | TorchCascade]


class ArrayPredictor:
    """A network with the preparation of its images.

    Args:
        network: The path of a package from EarlyExit.export, or a function that makes a network.
        prepare: Turns a batch of images into what the network takes. By default they are taken as they are.
        threads: CPU threads of torch or of ONNX Runtime. By default their own choice.

    Attributes:
        exit_names: Names of the exits.

    Raises:
        TypeError: The function returned something other than an EarlyExit or what deploy.load returns.
    """

    def __init__(
        self,
        network: NetworkSource,
        prepare: Callable[[ImageArray], ImageArray] | None = None,
        threads: int | None = None,
    ) -> None:
        if callable(network):
            if threads is not None:
                torch.set_num_threads(threads)
            self._network = network()
        else:
            self._network = load(network, threads=threads)
        if not isinstance(self._network, EarlyExit | OnnxCascade | TorchCascade):
            raise TypeError(
                f"`network` has made a {type(self._network).__name__}; wanted an EarlyExit, or what deploy.load returns"
            )
        self._prepare = prepare
        self.exit_names = self._network.exit_names

    def __call__(self, images: ImageArray) -> Answers:
        """Predict the classes of a batch of images [B, ...]."""
        prepared = images if self._prepare is None else self._prepare(images)
        if isinstance(self._network, OnnxCascade):
            return self._network.predict(prepared)
        decisions = self._network.predict(torch.from_numpy(np.ascontiguousarray(prepared)))
        return Answers(*(column.cpu().numpy() for column in decisions if column is not None))
