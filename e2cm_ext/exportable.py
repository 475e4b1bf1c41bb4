"""Heads as exporters want them: a few operations of torch in place of the compiled ones, which no other runtime knows.

The same functions as in reference.py, written so that they are fast where they are run as they stand: cells of a grid
are pooled, products of channels come from one matrix product, and so do distances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .heads import ClassMeans, Head, WhitenedMeans
from .rules import Confidence, Rule
from .statistics import Statistics

__all__ = ["Answer", "Features", "logits_of"]

_DENSE = 16  # so many more channels than offsets, and most of the products of all pairs of them are not wanted


class Answer(nn.Module):
    """What a stage and the exit behind it make of a batch: features, certainty [B], prediction [B], log_probs [B, K].

    Certainty is that of the rule, and NaN for a sample with a NaN or an infinity in its features. Without a head: the
    network's own answer, whose features are its logits.
    """

    def __init__(self, stages: list[nn.Module], head: Head | None, rule: Rule) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.logits = None if head is None else logits_of(head)
        self.rule = rule
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        for stage in self.stages:
            x = stage(x)
        if self.logits is None:
            log_probs = x.log_softmax(1)
            # Of the logits: rounding can make equal in log_probs what is not.
            return x, self._certainty(log_probs), x.argmax(1), log_probs
        logits, sound = self.logits(x)
        log_probs = logits.log_softmax(1)
        return x, self._certainty(log_probs) + sound, log_probs.argmax(1), log_probs

    def _certainty(self, log_probs: Tensor) -> Tensor:
        if isinstance(self.rule, Confidence):
            return log_probs.amax(1).exp()
        return self.rule.certainty(log_probs)


def logits_of(head: Head) -> nn.Module:
    """A module that makes of features the head's logits [B, K], and 0 for every sample, or NaN for one that must not
    leave [B]."""
    if type(head).forward is WhitenedMeans.forward and isinstance(head, WhitenedMeans):
        return _Linear(head)
    if type(head).forward is ClassMeans.forward and isinstance(head, ClassMeans):
        return _Means(head)
    return _Own(head)


class _Linear(nn.Module):
    def __init__(self, head: WhitenedMeans) -> None:
        super().__init__()
        self.features = Features(head.statistics, head.feature_shape)
        self.register_buffer("weight", head.weight.T.contiguous())
        self.register_buffer("bias", head.bias.clone())

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.features(x)
        return rows @ self.weight + self.bias, _sound(rows)


class _Means(nn.Module):
    """-|x - mean| / scale, with |x - mean|^2 as |x|^2 - 2 x mean + |mean|^2, of x less the average of the means: else
    the difference would be lost in the rounding of its terms."""

    means: Tensor
    squares: Tensor
    center: Tensor
    factor: Tensor
    offset: Tensor

    def __init__(self, head: ClassMeans) -> None:
        super().__init__()
        self.features = Features(head.statistics, head.feature_shape)
        there = (head.scale > 0) & head.scale.isfinite()
        center = head.center.contiguous().flatten()
        means = head.means.contiguous().flatten(1) - center
        self.register_buffer("center", center)
        self.register_buffer("means", -2 * means.T.contiguous())
        self.register_buffer("squares", means.double().square().sum(1).to(means.dtype))
        self.register_buffer("factor", (-1 / head.scale).where(there, 0))
        self.register_buffer("offset", torch.zeros_like(head.scale).where(there, -math.inf))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.features(x) - self.center
        squares = rows.square().sum(1, keepdim=True)
        distances = (squares + (rows @ self.means + self.squares)).clamp(min=0).sqrt()
        return distances * self.factor + self.offset, squares[:, 0] * 0


class _Own(nn.Module):
    """A head of somebody's own, whose forward() an exporter can follow, or not."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self.head(x)
        return log_probs, _sound(log_probs.amax(1, keepdim=True))


def _sound(rows: Tensor) -> Tensor:
    """[B]: 0, or NaN where a row holds a NaN or an infinity."""
    return rows.sum(1) * 0


# ---- statistics -----------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """reference.statistics, flattened; without statistics the features themselves, in a row."""

    mixed: Tensor

    def __init__(self, wanted: Statistics | None, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.wanted = wanted
        if wanted is None:
            return
        self.map = wanted.map_of(shape)
        channels = self.map[0]
        self.dense = channels <= _DENSE * wanted.pairs
        first = torch.arange(channels)
        which = [first * channels + (first + o) % channels for o in range(wanted.pairs)]
        self.register_buffer("mixed", torch.cat(which) if which else torch.empty(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        wanted = self.wanted
        if wanted is None:
            return x.flatten(1)
        x = (x.movedim(-1, 1) if wanted.channels == -1 else x).reshape(-1, *self.map)
        parts = []
        if wanted.mean[0]:
            parts.append(_averages(x, wanted.mean))
        if wanted.rms[0]:
            parts.append(_averages(x * x, wanted.rms).sqrt())
        if wanted.max[0]:
            parts.append(_maxima(x, wanted.max))
        if wanted.pairs:
            products = self._products(x)
            parts.append(products.abs().sqrt() * products.sign())
        if not (wanted.mean[0] or wanted.rms[0] or wanted.pairs):  # a maximum would hide -inf
            parts[0] = parts[0] + (x.flatten(1).sum(1, keepdim=True) * 0)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _products(self, x: Tensor) -> Tensor:
        """[B, pairs * C]: mean products of channels c and c + o."""
        _, rows, columns = self.map
        assert self.wanted is not None
        if self.dense:
            flat = x.flatten(2)
            return (flat @ flat.transpose(1, 2)).flatten(1)[:, self.mixed] / (rows * columns)
        shifted = (torch.cat([x[:, o:], x[:, :o]], 1) if o else x for o in range(self.wanted.pairs))
        return torch.cat([(x * other).mean((2, 3)) for other in shifted], 1)


def _averages(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    size = _cell(maps, grid)
    if size:
        return F.avg_pool2d(maps, size, size).flatten(1)
    return _by_cells(maps, grid, lambda cell: cell.mean((2, 3)))


def _maxima(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    size = _cell(maps, grid)
    if size:
        return F.max_pool2d(maps, size, size).flatten(1)
    return _by_cells(maps, grid, lambda cell: cell.amax((2, 3)))


def _cell(maps: Tensor, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Its size, if all cells are equal."""
    (rows, columns), (height, width) = grid, maps.shape[2:]
    return None if height % rows or width % columns else (height // rows, width // columns)


def _by_cells(maps: Tensor, grid: tuple[int, int], reduce: object) -> Tensor:
    (rows, columns), (height, width) = grid, maps.shape[2:]
    cells = [
        reduce(  # type: ignore[operator]
            maps[
                :,
                :,
                i * height // rows : (i + 1) * height // rows,
                j * width // columns : (j + 1) * width // columns,
            ]
        )
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(cells, 2).flatten(1)
