"""What a normalised call consists of: validation makes it of the arguments of an op, every backend takes it.

`native` gives a struct of csrc/api.h in the form in which the compiled module takes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .types import Decisions, Statistics

# Codes of csrc/api.h.
FEATURE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"confidence": 0, "entropy": 1}
HEAD_KINDS = {"distances": 0, "logits": 1}

# What the vectors and the numbers per class of a head are called in errors and schemas.
HEAD_NAMES = {"distances": ("means", "scale"), "logits": ("weight", "bias")}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def answers(
    prediction: Tensor, confidence: Tensor, exit: Tensor | None, log_probs: Tensor | None
) -> tuple[int, int, int, int, int]:
    """The struct Answers: where results are written."""
    return (
        prediction.size(0), confidence.data_ptr(), prediction.data_ptr(), 0 if exit is None else exit.data_ptr(),
        0 if log_probs is None else log_probs.data_ptr(),
    )  # fmt: skip


def channels_last_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


class Batch(NamedTuple):
    """A batch as the kernels see it: rows of `dim` numbers, dense inside, `stride` numbers apart."""

    tensor: Tensor
    dtype: int  # a code of FEATURE_DTYPES, -1 for any other
    rows: int
    dim: int
    stride: int
    channels_last: bool

    def native(self) -> tuple[int, int, int, int, int]:
        x, dtype, rows, dim, stride, _ = self
        return x.data_ptr(), dtype, rows, dim, stride

    def new_rows(self, count: int | torch.SymInt) -> Tensor:
        """Memory for so many rows, in the dtype and the memory format of the batch."""
        x = self.tensor
        if not self.channels_last:
            return x.new_empty((count, *x.shape[1:]))
        last = channels_last_format(x)
        return torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=last)


class HeadInput(NamedTuple):
    """What a head reads: the features of `x`, or statistics of them."""

    x: Tensor
    batch: Batch  # x
    features: Batch  # x again, in the order in which it is read
    statistics: Statistics | None
    numbers: tuple[int, ...] | None  # map and grids of the statistics, as the compiled module takes them
    shape: tuple[int, ...]  # of one sample of it
    dim: int

    @property
    def what(self) -> str:
        return "`x`" if self.numbers is None else "the statistics"

    def native(self) -> tuple[tuple[int, int, int, int, int], tuple[int, ...] | None]:
        return self.features.native(), self.numbers


class HeadParams(NamedTuple):
    """The parameters of a head: class means and their scales (`distances`), or weights and biases (`logits`)."""

    kind: str  # one of HEAD_KINDS
    vectors: Tensor  # [classes, ...]
    per_class: Tensor | None  # [classes]; None if distances alone are wanted
    center: Tensor | None = None  # of class means
    packed: Tensor | None = None  # what `pack` has made of the vectors and the center

    def named(self) -> dict[str, Tensor | None]:
        """As arguments of the functions of functional.py."""
        vectors, per_class = HEAD_NAMES[self.kind]
        return {vectors: self.vectors, per_class: self.per_class, "center": self.center}

    @property
    def classes(self) -> int:
        return self.vectors.size(0)

    def native(self) -> tuple[int, int, int, int, int, int, int, int]:
        kind, vectors, per_class, center, packed = self
        classes = vectors.size(0)
        return (
            HEAD_KINDS[kind], vectors.data_ptr(), FEATURE_DTYPES[vectors.dtype], classes, vectors.numel() // classes,
            0 if per_class is None else per_class.data_ptr(),
            0 if center is None else center.data_ptr(),
            0 if packed is None else packed.data_ptr(),
        )  # fmt: skip


class Departure(NamedTuple):
    """Which samples leave, and where their answers go: arguments of a step, by their names."""

    threshold: float
    ids: Tensor
    out: Decisions
    rule: str
    exit: int

    def native(self) -> tuple[int, float, int, int]:
        return RULES[self.rule], self.threshold, self.exit, self.ids.data_ptr()
