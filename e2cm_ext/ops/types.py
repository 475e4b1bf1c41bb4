"""What the ops take and give beside tensors: `Decisions` and `Statistics`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Decisions", "Statistics"]

Grid = tuple[int, int]


class Decisions(NamedTuple):
    """Answers in input order; row i belongs to sample i.

    Exits write into the rows of the samples that leave there. A row that nobody has written yet holds prediction -1,
    exit -1 and NaN elsewhere.
    """

    prediction: Tensor  # [N] int64
    confidence: Tensor  # [N] float32: the largest probability
    exit: Tensor  # [N] int64: the number of the exit that answered
    log_probs: Tensor | None  # [N, K] float32, or None where nobody needs them

    @classmethod
    def empty(cls, count: int, num_classes: int | None = None, device: torch.device | str | None = None) -> Decisions:
        """Room for `count` answers; without `num_classes` no log-probabilities are kept."""
        nan = float("nan")
        return cls(
            prediction=torch.full((count,), -1, dtype=torch.int64, device=device),
            confidence=torch.full((count,), nan, dtype=torch.float32, device=device),
            exit=torch.full((count,), -1, dtype=torch.int64, device=device),
            log_probs=None
            if num_classes is None
            else torch.full((count, num_classes), nan, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True)
class Statistics:
    """The mean, the root mean square and the maximum of every channel, each in the cells of a grid of its own, and how
    channels go together.

    A grid is (rows, columns); (0, 0) leaves its statistic out. Cell i of an axis of n numbers that is cut into g goes
    from floor(i n / g) to floor((i + 1) n / g): cells are as equal as can be, never overlap and are never empty.

    `pairs` offsets o = 0, 1, ..., which are no more than half the channels: of channel c and channel c + o (the first
    ones follow the last) the mean product over the whole map; its root, with its sign. At offset 0 that is the root
    mean square.

    `channels` says which axis of a sample's shape holds the channels: 0 (maps [C, H, W]) or -1 (maps [H, W, C], tokens
    [N, C]). Tokens are maps of N x 1, a vector [C] is a map of 1 x 1. The result of a sample is all means, then all
    root mean squares, then all maxima, each [C, rows, columns] in a row, then [pairs, C].
    """

    mean: Grid = (0, 0)
    rms: Grid = (0, 0)
    max: Grid = (0, 0)
    pairs: int = 0
    channels: int = 0

    def __post_init__(self) -> None:
        for name in ("mean", "rms", "max"):
            object.__setattr__(self, name, _grid(name, getattr(self, name)))
        if isinstance(self.pairs, bool) or not hasattr(self.pairs, "__index__") or self.pairs < 0:
            raise ValueError(f"`pairs` is {self.pairs!r}; wanted a whole number of offsets, from 0 up")
        object.__setattr__(self, "pairs", self.pairs.__index__())
        if not any((*self.mean, *self.rms, *self.max, self.pairs)):
            raise ValueError(
                "`mean`, `rms` and `max` are all (0, 0), and there are no `pairs`; wanted at least one of them, such "
                "as mean=(1, 1)"
            )
        if isinstance(self.channels, bool) or self.channels not in (0, -1):
            raise ValueError(f"`channels` is {self.channels!r}; wanted 0 (the first axis) or -1 (the last)")

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Everything in a row, as the compiled module and the operators of torch take it."""
        return (*self.mean, *self.rms, *self.max, self.pairs, int(self.channels))

    def map_of(self, feature_shape: Sequence[int]) -> tuple[int, int, int]:
        """Channels, rows and columns of a sample's map; an error if it has fewer rows or columns than a grid."""
        shape = tuple(feature_shape)
        if len(shape) not in (1, 2, 3):
            raise ValueError(
                f"a sample of shape {list(shape)} has no map; wanted a vector [C], tokens [N, C] or a map [C, H, W]"
            )
        channels = shape[self.channels]
        rows, columns = (*(shape[1:] if self.channels == 0 else shape[:-1]), 1, 1)[:2]
        for name, grid in (("mean", self.mean), ("rms", self.rms), ("max", self.max)):
            if grid[0] > rows or grid[1] > columns:
                raise ValueError(
                    f"`{name}` is {grid}, but a sample of shape {list(shape)} has a map of {rows} x {columns} numbers "
                    f"per channel, with `channels` {self.channels}; wanted a grid of no more"
                )
        if self.pairs > (channels + 1) // 2:
            raise ValueError(
                f"`pairs` is {self.pairs}, but a sample of shape {list(shape)} has {channels} channels, with "
                f"`channels` {self.channels}; wanted at most {(channels + 1) // 2}, half of them: more would be the "
                "same ones again"
            )
        return channels, rows, columns

    def size(self, feature_shape: Sequence[int]) -> int:
        """How many numbers a sample of this shape is turned into."""
        cells = sum(math.prod(grid) for grid in (self.mean, self.rms, self.max))
        return self.map_of(feature_shape)[0] * (cells + self.pairs)

    def flops(self, feature_shape: Sequence[int]) -> int:
        """Operations per sample: for every number of the map 1 for means (n - 1 additions and a multiplication for n
        numbers), 2 for root mean squares (a square more; roots are left out), 1 for maxima (comparisons), 2 for every
        offset of pairs (a product and a sum)."""
        each = bool(self.mean[0]) + 2 * bool(self.rms[0]) + bool(self.max[0]) + 2 * self.pairs
        return each * math.prod(self.map_of(feature_shape))


def _grid(name: str, grid: Sequence[int]) -> Grid:
    try:
        rows, columns = (size.__index__() for size in grid)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"`{name}` is {grid!r}; wanted two whole numbers (rows, columns)") from None
    if rows < 0 or columns < 0 or (rows == 0) != (columns == 0):
        raise ValueError(f"`{name}` is {grid!r}; wanted (rows, columns), both 1 or more, or (0, 0) to leave it out")
    return rows, columns
