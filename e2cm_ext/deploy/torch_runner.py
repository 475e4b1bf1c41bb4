"""Runs packages of EarlyExit.export, on torch or on ONNX Runtime, without the code of the network.

    cascade = e2cm_ext.deploy.load("model.zip")
    answers = cascade.predict(images)  # .prediction .confidence .exit .log_probs

Without torch, use runner.py: a single file that can be copied.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..heads.thresholds import threshold_vector
from ..ops.types import Decisions
from ..runner import Answers, OnnxCascade, Package, refuse_other
from ..runtime.cascade import write_decisions

__all__ = ["Answers", "OnnxCascade", "TorchCascade", "load"]

_Program = Callable[[Tensor], Sequence[Tensor]]


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> OnnxCascade | TorchCascade:
    """Load a package, for whatever runtime it was exported.

    Args:
        path: The file.
        threads: For ONNX Runtime; torch has its own setting.

    Returns:
        OnnxCascade for format="onnx", TorchCascade for "torch" and "aoti".

    Example:
        >>> decisions = e2cm_ext.deploy.load("model.zip").predict(images)
    """
    runtime = Package(path).runtime
    return OnnxCascade.load(path, threads=threads) if runtime == "onnx" else TorchCascade.load(path)


class TorchCascade:
    """A network with early exits, from programs of torch.export or AOTInductor.

    It runs on the device that the network was exported on. Any number of threads may call it, as far as torch's
    programs allow that.

    Args:
        package: See `load`, which takes a path.

    Attributes:
        thresholds: [exits of the package]; can be set.
        manifest: The manifest of the package, as a dict.
    """

    def __init__(self, package: Package) -> None:
        refuse_other(package)
        self.manifest, self.exit_names = package.manifest, package.exit_names
        self._package = package
        self._thresholds = torch.tensor([stage.threshold for stage in package.stages[:-1]], dtype=torch.float32)
        make = _compiled if package.runtime == "aoti" else _program
        self._programs: list[_Program] = []
        for stage in package.stages:
            try:
                self._programs.append(make(package.programs[stage.file]))
            except Exception as error:  # torch raises many kinds for a program of another release or machine
                why, _, _ = str(error).strip().partition("\n")
                raise ValueError(
                    f"{package.path}: torch {torch.__version__} cannot load {stage.file}, which torch "
                    f"{package.manifest.get('torch')} has written: {type(error).__name__}: {why}"
                ) from error
        package.programs.clear()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TorchCascade:
        """Load what `EarlyExit.export` wrote with format="torch" or "aoti"."""
        return cls(Package(path, "torch", "aoti"))

    @property
    def num_classes(self) -> int:
        return self._package.num_classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self._package.image_shape

    @property
    def image_dtype(self) -> str:
        return self._package.image_dtype

    @property
    def thresholds(self) -> Tensor:
        return self._thresholds.clone()

    @thresholds.setter
    def thresholds(self, value: Tensor | Sequence[float] | float) -> None:
        exits = len(self._thresholds)
        vector = torch.as_tensor(value, dtype=torch.float32)
        self._thresholds = threshold_vector(vector.expand(exits) if vector.dim() == 0 else vector, exits).clone()

    def __call__(self, images: Tensor) -> Tensor:
        """Compute log-probabilities [B, K]."""
        log_probs = self.predict(images).log_probs
        assert log_probs is not None
        return log_probs

    @torch.no_grad()
    def predict(self, images: Tensor) -> Decisions:
        """Predict a batch: prediction, confidence, exit and log-probabilities of every image, in input order."""
        if not isinstance(images, Tensor):
            raise TypeError(f"`images` is a {type(images).__name__}; wanted a tensor")
        self._package.checked(images.shape, str(images.dtype).removeprefix("torch."))
        out = Decisions.empty(len(images), self.num_classes, images.device)
        if len(images) == 0:
            return out
        x, ids = images, torch.arange(len(images), device=images.device)
        limits = [*self._thresholds.tolist(), -math.inf]
        for stage, program, limit in zip(self._package.stages, self._programs, limits, strict=True):
            x, certainty, log_probs = program(x)
            # Of the logits at the end: rounding can make different logits equal in log_probs.
            prediction = (x if stage is self._package.stages[-1] else log_probs).argmax(1)
            confidence = log_probs.amax(1).exp()
            answers = Decisions(prediction, confidence, torch.full_like(prediction, stage.exit), log_probs)
            if stage is self._package.stages[-1]:
                write_decisions(out, ids, answers)
                break
            leaving = certainty > limit
            index = leaving.nonzero()[:, 0]
            if len(index):
                write_decisions(out, ids[index], Decisions(*(column[index] for column in answers)))  # type: ignore[index]
                if len(index) == len(ids):
                    break
                index = (~leaving).nonzero()[:, 0]
                x, ids = x[index], ids[index]
        return out


def _program(contents: bytes) -> _Program:
    program: _Program = torch.export.load(io.BytesIO(contents)).module()
    return program


def _compiled(contents: bytes) -> _Program:
    with tempfile.TemporaryDirectory() as folder:  # AOTInductor takes out what it needs
        path = os.path.join(folder, "stage.pt2")
        with open(path, "wb") as file:
            file.write(contents)
        program: Any = torch._inductor.aoti_load_package(path)
    return lambda x: program(x)
