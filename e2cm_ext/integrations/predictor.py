"""What engines are given to answer with: numpy in and out, whatever runs the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..deploy import OnnxCascade, TorchCascade, load
from ..early_exit import EarlyExit
from ..runner import Answers

__all__ = ["Answerer", "Images", "Source"]

Images = np.ndarray[Any, Any]
# The path of a package that EarlyExit.export wrote; or a function that makes a network, called where it is to run.
Source = str | os.PathLike[str] | Callable[[], EarlyExit | OnnxCascade | TorchCascade]


class Answerer:
    """A network, loaded, and what is done to images before."""

    def __init__(
        self, network: Source, prepare: Callable[[Images], Images] | None = None, threads: int | None = None
    ) -> None:
        if callable(network):
            if threads is not None:
                torch.set_num_threads(threads)
            self._network = network()
        else:
            self._network = load(network, threads=threads)
        if not isinstance(self._network, EarlyExit | OnnxCascade | TorchCascade):
            raise TypeError(
                f"`network` has made a {type(self._network).__name__}; wanted an EarlyExit, or what deploy.load gives"
            )
        self._prepare = prepare
        self.exit_names = self._network.exit_names

    def __call__(self, images: Images) -> Answers:
        prepared = images if self._prepare is None else self._prepare(images)
        if isinstance(self._network, OnnxCascade):
            return self._network.predict(prepared)
        decisions = self._network.predict(torch.from_numpy(np.ascontiguousarray(prepared)))
        return Answers(*(column.cpu().numpy() for column in decisions if column is not None))
