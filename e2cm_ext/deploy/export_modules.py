"""Heads for exporters: plain torch operations in place of the compiled kernels, which no other runtime has.

The same functions as in ops/reference.py, written to be fast without those kernels: pooling for the cells of a grid,
and one matrix product for products of channels and for distances.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..heads import ClassMeans, Head, WhitenedMeans
from ..heads.rules import Confidence, Rule
from ..ops.types import Statistics

__all__ = ["StageWithExit", "Features", "logits_of", "ends_in_relu"]

_DENSE_PAIRS = 16  # up to so many channels per offset, computing the products of all pairs of channels is faster
_RELUS = (torch.ops.aten.relu, torch.ops.aten.relu_)


class StageWithExit(nn.Module):
    """A stage and the exit behind it: maps a batch to features, certainty [B] and log_probs [B, K].

    The certainty is NaN for a sample with a NaN or an infinity in its features. (On runtimes whose maximum ignores NaN,
    no log-probability of such a sample is finite instead.)

    Args:
        stages: Run one after the other.
        head: None for the end of the network, whose features are its logits.
        rule: Turns log-probabilities into a certainty.
        nonnegative: Whether no feature can be below 0, which makes heads cheaper: see ends_in_relu.
    """

    def __init__(self, stages: list[nn.Module], head: Head | None, rule: Rule, nonnegative: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.logits = None if head is None else logits_of(head, nonnegative)
        self.rule = rule
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for stage in self.stages:
            x = stage(x)
        logits, sound = (x, None) if self.logits is None else self.logits(x)
        log_probs = logits.log_softmax(1).float()
        certainty = self._certainty(log_probs)
        return x, certainty if sound is None else certainty + sound, log_probs

    def _certainty(self, log_probs: Tensor) -> Tensor:
        if isinstance(self.rule, Confidence):
            return log_probs.amax(1).exp()
        return self.rule.certainty(log_probs)


def ends_in_relu(stages: list[nn.Module], x: Tensor) -> tuple[Tensor, bool]:
    """Run the stages on x: their features, and whether the last operation is a ReLU."""
    with _ReluTracker() as relus:
        for stage in stages:
            x = stage(x)
    return x, relus.came_from_relu(x)


class _ReluTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks which tensors hold the output of a ReLU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._relu_outputs: dict[int, Tensor] = {}  # by storage address; kept alive here, so that it is not reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if func.overloadpacket in _RELUS and storage.nbytes() == result.numel() * result.itemsize:
                self._relu_outputs[storage.data_ptr()] = result
            elif func._schema.is_mutable:
                self._relu_outputs.pop(storage.data_ptr(), None)
        return result

    def came_from_relu(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._relu_outputs


def logits_of(head: Head, nonnegative: bool = False) -> nn.Module:
    """A module that maps features to the head's logits [B, K] and a mark [B].

    The mark is 0, or NaN for a sample that must not leave. It is None if the logits of such a sample are not finite.
    """
    if type(head).forward is WhitenedMeans.forward and isinstance(head, WhitenedMeans):
        return _LinearLogits(head, nonnegative)
    if type(head).forward is ClassMeans.forward and isinstance(head, ClassMeans):
        return _DistanceLogits(head)
    return _UserHead(head)


class _LinearLogits(nn.Module):
    """Logits of whitened means. Constant factors of the statistics are folded into the weights."""

    bias: Tensor

    def __init__(self, head: WhitenedMeans, nonnegative: bool) -> None:
        super().__init__()
        self.features = Features(head.statistics, head.feature_shape, nonnegative)
        self.weights = nn.ParameterList(nn.Parameter(w, False) for w in self.features.split_weights(head.weight))
        self.register_buffer("bias", head.bias.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        logits = self.bias
        for part, weight in zip(self.features.parts(x), self.weights, strict=True):
            logits = torch.addmm(logits, part, weight)
        return logits, None


class _DistanceLogits(nn.Module):
    """-|x - mean| / scale, with |x - mean|^2 as |x|^2 - 2 x mean + |mean|^2.

    The average of the means is subtracted from x and from the means first: otherwise the terms cancel.
    """

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


class _UserHead(nn.Module):
    """A user's head. The exporter may or may not be able to trace its forward()."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self.head(x)
        return log_probs, _nan_if_not_finite(log_probs.amax(1, keepdim=True))


def _nan_if_not_finite(rows: Tensor) -> Tensor:
    """[B]: 0, or NaN where a row holds a NaN or an infinity."""
    return rows.sum(1) * 0


# ---- statistics -----------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """reference.statistics, flattened; without statistics the flattened features.

    `parts` gives the statistics in pieces, or a cheaper tensor of which they are scaled columns.

    Args:
        wanted: The statistics; None: the features themselves.
        shape: Of one sample's features.
        nonnegative: Whether no feature can be below 0.
    """

    mixed: Tensor

    def __init__(self, wanted: Statistics | None, shape: tuple[int, ...], nonnegative: bool = False) -> None:
        super().__init__()
        self.wanted = wanted
        if wanted is None:
            return
        self.map = wanted.map_of(shape)
        channels = self.map[0]
        self.dense = channels <= _DENSE_PAIRS * wanted.pairs
        self.nonnegative = nonnegative
        first = torch.arange(channels)
        which = [first * channels + (first + o) % channels for o in range(wanted.pairs)]
        self.register_buffer("mixed", torch.cat(which) if which else torch.empty(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(x)
        if self._all_pairs:
            parts[-1] = parts[-1].index_select(1, self.mixed)
        if self.wanted is not None and self.wanted.pairs:
            parts[-1] = parts[-1] * self._unit
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def split_weights(self, weight: Tensor) -> list[Tensor]:
        """Split a weight [K, d] into one matrix per part, such that the products sum to statistics @ weight.T."""
        if self.wanted is None:
            return [weight.T.contiguous()]
        channels = self.map[0]
        grids = [math.prod(grid) for grid in (self.wanted.mean, self.wanted.rms, self.wanted.max) if grid[0]]
        sizes = [*(channels * cells for cells in grids), channels * self.wanted.pairs]
        *weights, pairs = torch.split(weight, sizes, 1)
        if self.wanted.pairs:
            pairs = pairs * self._unit
            if self._all_pairs:
                pairs = pairs.new_zeros(len(pairs), channels**2).index_copy_(1, self.mixed.to(pairs.device), pairs)
            weights.append(pairs)
        return [w.T.contiguous() for w in weights]

    def parts(self, x: Tensor) -> list[Tensor]:
        wanted = self.wanted
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if wanted is None:
            return [x.flatten(1)]
        x = x.movedim(-1, 1) if wanted.channels == -1 else x
        if x.shape[1:] != self.map:
            x = x.reshape(-1, *self.map)
        parts = []
        if wanted.mean[0]:
            parts.append(_averages(x, wanted.mean))
        if wanted.rms[0]:
            parts.append(_averages(x * x, wanted.rms).sqrt())
        if wanted.max[0]:
            parts.append(_maxima(x, wanted.max))
        if wanted.pairs:
            products = self._products(x)
            parts.append(products.sqrt() if self.nonnegative else products.abs().sqrt() * products.sign())
        if not (wanted.mean[0] or wanted.rms[0] or wanted.pairs):  # a maximum would hide -inf
            parts[0] = parts[0] + (x.flatten(1).sum(1, keepdim=True) * 0)
        return parts

    @property
    def _all_pairs(self) -> bool:
        """Whether all products are kept: a root of all costs less than selecting the wanted ones."""
        return self.wanted is not None and self.wanted.pairs > 0 and self.dense and self.nonnegative

    @property
    def _unit(self) -> float:
        """Factor that turns roots of sums into roots of means."""
        _, rows, columns = self.map
        return 1 / math.sqrt(rows * columns)

    def _products(self, x: Tensor) -> Tensor:
        """[B, pairs * C]: summed products of channels c and c + o; or [B, C * C], of all channels."""
        assert self.wanted is not None
        if self.dense:
            flat = x.flatten(2)
            products = (flat @ flat.transpose(1, 2)).flatten(1)
            return products if self._all_pairs else products.index_select(1, self.mixed)
        shifted = (torch.cat([x[:, o:], x[:, :o]], 1) if o else x for o in range(self.wanted.pairs))
        return torch.cat([(x * other).sum((2, 3)) for other in shifted], 1)


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
    """The size of a cell, if all cells have the same size."""
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
