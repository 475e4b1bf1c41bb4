"""Heads as exporters want them: a few operations of torch in place of the compiled ones, which no other runtime knows.

The same functions as in reference.py, written so that they are fast where they are run as they stand: cells of a grid
are pooled, products of channels come from one matrix product, and so do distances.
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

__all__ = ["Answer", "Features", "logits_of", "ends_in_relu"]

_DENSE = 16  # so many more channels than offsets, and most of the products of all pairs of them are not wanted
_RELUS = (torch.ops.aten.relu, torch.ops.aten.relu_)


class Answer(nn.Module):
    """What a stage and the exit behind it make of a batch: features, certainty [B], log_probs [B, K].

    Certainty is that of the rule, and NaN for a sample with a NaN or an infinity in its features. (Of runtimes whose
    maxima pass over NaN: or no log-probability of such a sample is finite.) Without a head: the network's own answer,
    whose features are its logits.

    nonnegative: whether no number of the features can be below 0, which makes heads cheaper; see never_negative.
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
    """The features that the stages make of x, and whether the last thing that they do is a ReLU."""
    with _Relus() as relus:
        for stage in stages:
            x = stage(x)
    return x, relus.made(x)


class _Relus(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers which tensors hold what a ReLU has made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._whole: dict[int, Tensor] = {}  # by their storage, which is not used again as long as it is kept here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if func.overloadpacket in _RELUS and storage.nbytes() == result.numel() * result.itemsize:
                self._whole[storage.data_ptr()] = result
            elif func._schema.is_mutable:
                self._whole.pop(storage.data_ptr(), None)
        return result

    def made(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._whole


def logits_of(head: Head, nonnegative: bool = False) -> nn.Module:
    """A module that makes of features the head's logits [B, K], and 0 for every sample, or NaN for one that must not
    leave [B]; None in its place if the logits of such a sample are not finite, any of them."""
    if type(head).forward is WhitenedMeans.forward and isinstance(head, WhitenedMeans):
        return _Linear(head, nonnegative)
    if type(head).forward is ClassMeans.forward and isinstance(head, ClassMeans):
        return _Means(head)
    return _Own(head)


class _Linear(nn.Module):
    """Statistics as they are cheapest to come by; what they lack to be those of the head is in the weights."""

    bias: Tensor

    def __init__(self, head: WhitenedMeans, nonnegative: bool) -> None:
        super().__init__()
        self.features = Features(head.statistics, head.feature_shape, nonnegative)
        self.weights = nn.ParameterList(nn.Parameter(w, False) for w in self.features.folded(head.weight))
        self.register_buffer("bias", head.bias.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        logits = self.bias
        for part, weight in zip(self.features.parts(x), self.weights, strict=True):
            logits = torch.addmm(logits, part, weight)
        return logits, None


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
    """reference.statistics, flattened; without statistics the features themselves, in a row.

    parts: the statistics in pieces, or something that they are columns and multiples of, if it is cheaper. nonnegative:
    whether no feature can be below 0.
    """

    mixed: Tensor

    def __init__(self, wanted: Statistics | None, shape: tuple[int, ...], nonnegative: bool = False) -> None:
        super().__init__()
        self.wanted = wanted
        if wanted is None:
            return
        self.map = wanted.map_of(shape)
        channels = self.map[0]
        self.dense = channels <= _DENSE * wanted.pairs
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

    def folded(self, weight: Tensor) -> list[Tensor]:
        """What to multiply each of the parts with, to get statistics @ weight.T; for weight [K, d]."""
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
        """To take a root of more products than are wanted is cheaper than to pick out these."""
        return self.wanted is not None and self.wanted.pairs > 0 and self.dense and self.nonnegative

    @property
    def _unit(self) -> float:
        """Of roots of sums of products."""
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
