"""What the ops take and return beside tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ClassScores", "Decisions", "Statistics"]

Grid = tuple[int, int]


class ClassScores(NamedTuple):
    """The answers of a head for a batch.

    Attributes:
        confidence: The largest probability of each sample, float32 [B].
        prediction: The likeliest class, int64 [B].
        log_probs: Log-probabilities of all classes, float32 [B, K].
    """

    confidence: Tensor
    prediction: Tensor
    log_probs: Tensor


class Decisions(NamedTuple):
    """The answers for a data set or a batch, in input order: row i belongs to sample i.

    Exits write into the rows of the samples that leave there. A row that has not been written yet holds prediction -1,
    exit -1 and NaN elsewhere.

    Attributes:
        prediction: The likeliest class, int64 [N].
        confidence: The largest probability, float32 [N].
        exit: The number of the exit that answered, int64 [N].
        log_probs: Log-probabilities of all classes, float32 [N, K], or None where they are not wanted.
    """

    prediction: Tensor
    confidence: Tensor
    exit: Tensor
    log_probs: Tensor | None

    @classmethod
    def empty(cls, count: int, num_classes: int | None = None, device: torch.device | str | None = None) -> Decisions:
        """Make room for answers.

        Args:
            count: Number of samples.
            num_classes: Number of classes; None: no log-probabilities are kept.
            device: Where the answers go, as in `torch.full`.

        Returns:
            Decisions that no exit has written to.
        """
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
    """Statistics of feature maps that a head may read in the place of the features: a few numbers per channel.

    Per channel: the mean, the root mean square and the maximum, each in the cells of a grid of its own, and products of
    pairs of channels. A grid is (rows, columns); (0, 0) leaves its statistic out. Cell i of an axis of n numbers that
    is cut into g cells goes from floor(i n / g) to floor((i + 1) n / g): cells are as equal as can be, never overlap
    and are never empty.

    The result of a sample is all means, then all root mean squares, then all maxima, each [C, rows, columns] flattened,
    then [pairs, C].

    Args:
        mean: Grid of the means.
        rms: Grid of the root mean squares.
        max: Grid of the maxima.
        pairs: Number of offsets o = 0, 1, ..., at most half the channels (rounded up): of channels c and c + o (the
            first ones follow the last) the mean product over the whole map; its root, with its sign. At offset 0 that
            is the root mean square.
        channels: The axis of a sample's shape that holds the channels: 0 (maps [C, H, W]) or -1 (maps [H, W, C], tokens
            [N, C]). Tokens are maps of N x 1, a vector [C] is a map of 1 x 1.

    Raises:
        ValueError: A grid is not a pair of whole numbers, another argument is out of range, or no statistic is wanted.

    Example:
        from e2cm_ext import Statistics

        Statistics(mean=(2, 2), max=(1, 1)).size((64, 8, 8))  # 320
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
        """All fields in a row, as the compiled module and the operators of torch take them."""
        return (*self.mean, *self.rms, *self.max, self.pairs, int(self.channels))

    @classmethod
    def of_numbers(cls, n: Sequence[int]) -> Statistics:
        return cls((n[0], n[1]), (n[2], n[3]), (n[4], n[5]), n[6], n[7])

    def map_of(self, feature_shape: Sequence[int]) -> tuple[int, int, int]:
        """Channels, rows and columns of the map of a sample.

        Args:
            feature_shape: Shape of one sample, without the batch.

        Raises:
            ValueError: The sample has no map, or one with fewer rows or columns than a grid, or too few channels.
        """
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
        """The number of statistics of a sample of this shape."""
        cells = sum(math.prod(grid) for grid in (self.mean, self.rms, self.max))
        return self.map_of(feature_shape)[0] * (cells + self.pairs)

    def flops(self, feature_shape: Sequence[int]) -> int:
        """Operations per sample.

        For every number of the map 1 for means (n - 1 additions and a multiplication for n numbers), 2 for root mean
        squares (one square more; roots are left out), 1 for maxima (comparisons), 2 for every offset of pairs (a
        product and a sum).
        """
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
