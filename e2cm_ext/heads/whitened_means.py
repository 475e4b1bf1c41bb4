"""WhitenedMeans: class means in a space where the spread within the classes is the same in every direction.

The features are statistics of the feature maps, the nearest mean is that of linear discriminant analysis, and all of it
folds into one vector per class. Closed form, one pass over the data, no gradients. (Not the paper's: that compares raw
features with their means.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.packing import Packed, Packing
from ..ops.types import Decisions, Statistics
from ..utils.distributed import all_reduce_sum
from .base import Head, in_own_dtype, refuse_non_finite, score_with_rule
from .rules import Confidence, Entropy, Rule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WhitenedMeans", "by_chance", "oas", "statistics_of", "suits"]

_MANY = 4096  # statistics: the time of a fit grows with their cube, its memory with their square
_ROWS = 512  # samples whose products are summed up at a time
_COLUMNS = 128  # of the scatter matrix at a time: half of it is the other half's mirror image, and left out
_RIDGE = 1e-5  # of a statistic's variance over all samples: so much is added to the one within the classes
_MOST = 0.9  # that means are pulled: they should not become one
_NATS = 16  # log-odds beyond which a float32 confidence is 1
_ROUNDING = 1e-6  # of a statistic's magnitude: what varies by less does not vary, it is rounded


class WhitenedMeans(Head, kind="whitened_means"):
    """softmax over k of log counts[k] - |f - mean[k]|^2 / 2, with f the whitened statistics of the features.

    Whitened: multiplied by the inverse root of S, the covariance of the statistics within the classes, which all
    classes share. |f|^2 is the same for all classes and drops out, so that a score is weight[k] . statistics + bias[k]:
    linear discriminant analysis.

    S is shrunk: statistics are divided by their standard deviations within the classes, and the correlations that are
    left are multiplied by 1 - `shrinkage`. None: as much as Oracle Approximating Shrinkage says (Chen, Wiesel, Eldar
    and Hero, 2010), which takes more the fewer samples there are.

    Means of few samples are too far apart. They are moved towards their middle: multiplied by 1 - `mean_shrinkage`.
    None: by the share of their squared whitened lengths that is chance, which adds d / counts[k] to each, for d
    statistics (as James and Stein do), at most by 0.9.

    Scores are divided by `temperature`, which changes no prediction. None: 1, unless confidences would be too near to
    1 for a float32 number, and so for a threshold, to tell them apart: then as much as it takes for a sample that lies
    on the mean of its class to have 16 nats of log-odds against the next class, in the average of the classes.

    shrinkage=s, mean_shrinkage=0 and temperature=1 give scikit-learn's
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s), of statistics divided by their standard deviations.

    statistics: of the feature maps, see Statistics; None: a choice by the number of channels, see statistics_of. That
    takes maps for [C, H, W]: networks that keep them as [H, W, C] need Statistics with channels=-1.

    Sums are double. Held while fitting: a little more than d^2 / 2 doubles for d statistics, beside 512 of them in
    float32; four times that for a moment, at the end. Weights stay in float32 under `.half()` and the like.
    """

    passes = 1
    weight: Tensor  # [K, d] float32
    bias: Tensor  # [K] float32; of a class without samples: -inf

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        *,
        statistics: Statistics | dict[str, Any] | None = None,
        shrinkage: float | None = None,
        mean_shrinkage: float | None = None,
        temperature: float | None = None,
    ) -> None:
        super().__init__(num_classes, feature_shape)
        for name, share in (("shrinkage", shrinkage), ("mean_shrinkage", mean_shrinkage)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"`{name}` is {share!r}; wanted a number from 0 to 1, or None: as much as it takes")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` is {temperature!r}; wanted a number above 0, or None: as much as it takes")
        self.statistics = _statistics(statistics, self.feature_shape)
        self.shrinkage, self.mean_shrinkage, self.temperature = shrinkage, mean_shrinkage, temperature
        size = self.statistics.size(self.feature_shape)
        self.register_buffer("weight", torch.zeros(self.num_classes, size))
        self.register_buffer("bias", torch.full((self.num_classes,), -math.inf))
        self._packing = Packing()
        self._scatter: _Scatter | None = None

    # ---- fitting ----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        self._check(x, labels, pass_index)
        if x.numel() == 0:
            return
        rows = ops.statistics(x, self.statistics)
        refuse_non_finite(rows)  # what is wrong with x shows in them, and they are less to look at
        self._count(labels)
        if self._scatter is None:
            self._scatter = self._around(rows.mean(0))
        self._scatter.add(rows, labels)

    def _around(self, origin: Tensor) -> _Scatter:
        return _Scatter(self.num_classes, origin.double())

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Self) -> None:
        super().merge(other)
        if other._scatter is None:
            return
        theirs = copy.deepcopy(other._scatter)
        if self._scatter is None:
            self._scatter = self._around(theirs.origin.to(self.weight.device))
        self._scatter.merge(theirs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, pass_index: int) -> None:
        super().finish(pass_index)
        # Other processes may have all the samples.
        scatter, self._scatter = self._scatter or self._around(torch.zeros_like(self.weight[0])), None
        scatter.reduce_over_processes()
        folded = _fold(*scatter.within(), scatter.counts, self.shrinkage, self.mean_shrinkage)
        heat = folded.heat() if self.temperature is None else self.temperature
        self.weight.copy_(folded.weight / heat)
        self.bias.copy_(folded.bias / heat)

    def reset(self) -> None:
        super().reset()
        self._scatter = None

    # ---- answering --------------------------------------------------------------------------------------------------

    def _packed(self) -> Packed:
        return self._packing.packed(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_scores(x, self._packed(), self.bias, self.statistics).log_probs

    def score(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        scores = ops.linear_scores(x, self._packed(), self.bias, self.statistics)
        return score_with_rule(scores, rule)

    def step(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(rule, Confidence | Entropy):
            return super().step(x, threshold, ids, out, rule=rule, exit=exit)
        limit = rule.limit(threshold)
        return ops.linear_step(
            x, self._packed(), self.bias, limit, ids, out, self.statistics, rule=rule.name, exit=exit
        )

    def decide(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> Tensor:
        if not isinstance(rule, Confidence | Entropy):
            return super().decide(x, threshold, ids, out, rule=rule, exit=exit)
        seen, limit = ops.statistics(x, self.statistics), rule.limit(threshold)  # only these few numbers are moved
        return ops.linear_step(seen, self._packed(), self.bias, limit, ids, out, rule=rule.name, exit=exit)[1]

    def flops(self) -> int:
        """Those of the statistics, and 2 K d for the product of d of them with the weights."""
        return self.statistics.flops(self.feature_shape) + 2 * self.weight.numel()

    # ---- keeping ----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        statistics = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.statistics).items()
        }
        mine = {"shrinkage": self.shrinkage, "mean_shrinkage": self.mean_shrinkage, "temperature": self.temperature}
        return super().config() | {"statistics": statistics} | mine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(in_own_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def statistics_of(feature_shape: Sequence[int], channels: int | None = None) -> Statistics:
    """A choice for features of this shape: some hundred to two thousand numbers, for pairs of channels rather than for
    fine grids where there are many channels.

    channels: the axis that holds them, 0 or -1; None: the first of maps, and the last of tokens [N, C].

    What it rests on: ResNet-56 on CIFAR-10 and a MobileNetV3-like network on CIFAR-100, images that these had not seen.
    """
    shape = tuple(feature_shape)
    if len(shape) not in (1, 2, 3):
        raise ValueError(
            f"`feature_shape` has {len(shape)} axes; WhitenedMeans knows vectors [C], tokens [N, C] and maps "
            "[C, H, W]: use class_means or a Head of your own here"
        )
    axis = channels if channels is not None else -1 if len(shape) == 2 else 0
    count, rows, columns = Statistics(mean=(1, 1), channels=axis).map_of(shape)
    if rows * columns == 1:
        return Statistics(mean=(1, 1), channels=axis)
    pairs = min((count + 1) // 2, 12, 1024 // count)
    if len(shape) == 2:
        return Statistics(mean=(1, 1), pairs=pairs, channels=axis)

    def grid(cells: int) -> tuple[int, int]:
        return min(cells, rows), min(cells, columns)

    mean = grid(4 if count <= 64 else 2 if count <= 256 else 1)
    extremes = grid(4 if count <= 16 else 2) if count <= 32 else (0, 0)
    return Statistics(mean=mean, rms=extremes, max=extremes, pairs=pairs, channels=axis)


def suits(feature_shape: Sequence[int]) -> bool:
    """Whether statistics_of knows a choice for features of this shape, and one that a fit can afford."""
    shape = tuple(feature_shape)
    return len(shape) <= 3 and statistics_of(shape).size(shape) <= _MANY


def _statistics(given: Statistics | dict[str, Any] | None, feature_shape: tuple[int, ...]) -> Statistics:
    if given is None:
        return statistics_of(feature_shape)
    if isinstance(given, dict):  # from a file
        try:
            return Statistics(**given)
        except TypeError as error:
            raise ValueError(f"`statistics` is {given!r}: {error}") from None
    if not isinstance(given, Statistics):
        raise TypeError(f"`statistics` is a {type(given).__name__}; wanted e2cm_ext.Statistics or None")
    return given


def oas(correlations: Tensor, samples: float) -> float:
    """Oracle Approximating Shrinkage towards the identity: how much, for correlations [d, d] from so many samples."""
    size = len(correlations)
    squares = float(correlations.square().mean())
    mean = float(correlations.diagonal().mean()) ** 2
    excess = (samples + 1) * (squares - mean / size)
    return 1.0 if excess <= 0 else min(1.0, (squares + mean) / excess)


class _Folded(NamedTuple):
    weight: Tensor  # [K, d] float64
    bias: Tensor  # [K] float64
    products: Tensor  # [K, K], of the whitened class means
    counts: Tensor  # [K]

    def heat(self) -> float:
        """The temperature at which float32 can tell confidences apart."""
        there = self.counts > 0
        products = self.products[there][:, there]
        if len(products) < 2:
            return 1.0
        squares = products.diagonal()
        apart = (squares[:, None] + squares - 2 * products).fill_diagonal_(math.inf)
        return max(1.0, float(apart.amin(1).mean()) / 2 / _NATS)


def _fold(
    means: Tensor,
    covariance: Tensor,
    spread: Tensor,
    counts: Tensor,
    shrinkage: float | None,
    mean_shrinkage: float | None,
) -> _Folded:
    # Statistics are rounded to float32, so correlations of what hardly varies within the classes may be anything: a
    # little more variance hides that, and there is always an inverse.
    covariance.diagonal().add_(_RIDGE * spread.square())
    scale = covariance.diagonal().sqrt().where(spread > 0, math.inf)  # what never varies gets no weight
    correlations = covariance.div_(scale[:, None]).div_(scale)
    amount = oas(correlations, float(counts.sum())) if shrinkage is None else shrinkage
    correlations.mul_(1 - amount).diagonal().fill_(1)
    there = (counts > 0)[:, None]
    middle = means[there[:, 0]].mean(0)  # what all classes share may be left out of weights: they are smaller so
    apart = ((means - middle) / scale).where(there, 0)
    whitened = torch.cholesky_solve(apart.T, torch.linalg.cholesky(correlations)).T
    products = whitened @ apart.T
    kept = 1 - (
        by_chance(products.diagonal(), counts, int((spread > 0).sum())) if mean_shrinkage is None else mean_shrinkage
    )
    weight, products = kept * whitened / scale, kept**2 * products
    bias = (counts / counts.sum()).log() - 0.5 * products.diagonal() - weight @ middle
    return _Folded(weight, bias, products, counts)


def by_chance(squares: Tensor, counts: Tensor, size: int) -> float:
    """The share of the squared lengths [K] of whitened class means that is due to their being of few samples."""
    there = counts > 0
    total = float(squares[there].sum())
    return min(_MOST, float((size / counts[there]).sum()) / total) if total > 0 else 0.0


class _Scatter:
    """Sums over samples of their statistics, less an origin near them, and of the products of all pairs of these."""

    def __init__(self, classes: int, origin: Tensor) -> None:
        size = len(origin)
        self.origin = origin  # [d] float64
        self.counts = origin.new_zeros(classes)
        self.sums = origin.new_zeros(classes, size)
        self.firsts = range(0, size, _COLUMNS)
        self.strips = [origin.new_zeros(min(_COLUMNS, size - i), size - i) for i in self.firsts]  # the upper triangle
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, labels: Tensor) -> None:
        # A copy of labels: whoever made them may write into them before they are looked at.
        self._waiting.append((rows, labels.clone()))
        if sum(len(labels) for _, labels in self._waiting) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Sums up what waits for company: few rows at a time would take longer."""
        if not self._waiting:
            return
        rows, labels = (torch.cat(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        self.counts += labels.bincount(minlength=len(self.counts))
        # In double throughout: an inverse magnifies what is lost in float32 a thousand times, and what one process
        # makes of all samples would not be what several make of their parts. Not so the products on a GPU: on many
        # they would take 64 times as long.
        for some, classes in zip(torch.split(rows, _ROWS), torch.split(labels, _ROWS), strict=True):
            apart = some.double() - self.origin
            self.sums.index_add_(0, classes, apart)
            factors = apart if apart.is_cpu else apart.float()
            for first, strip in zip(self.firsts, self.strips, strict=True):
                strip += factors[:, first : first + _COLUMNS].T @ factors[:, first:]

    def move(self, origin: Tensor) -> None:
        """As if that had been the origin."""
        self.flush()
        step = self.origin - origin
        by, sums = step * self.counts.sum(), self.sums.sum(0)
        for first, strip in zip(self.firsts, self.strips, strict=True):
            here = slice(first, first + _COLUMNS)
            strip += torch.outer(sums[here] + by[here], step[first:]) + torch.outer(step[here], sums[first:])
        self.sums += torch.outer(self.counts, step)
        self.origin = origin

    def merge(self, other: _Scatter) -> None:
        other.move(self.origin.to(other.origin.device))
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine += theirs.to(mine.device)

    def reduce_over_processes(self) -> None:
        """Of all processes."""
        self.flush()
        share = self.counts.sum()
        self.move(all_reduce_sum(self.origin * share) / all_reduce_sum(share.clone()))
        for part in self._parts():
            all_reduce_sum(part)

    def within(self) -> tuple[Tensor, Tensor, Tensor]:
        """Class means [K, d] (of a class without samples: the origin), the covariance [d, d] within the classes, and
        the standard deviation [d] of all samples together, 0 where that is but rounding. All sums are gone then."""
        samples = self.counts.sum()
        means = self.sums / self.counts.clamp(min=1)[:, None]
        overall = self.sums.sum(0) / samples
        size = len(overall)
        covariance = overall.new_empty(size, size)
        for first, strip in zip(self.firsts, self.strips, strict=True):
            covariance[first : first + _COLUMNS, first:] = strip
            covariance[first:, first : first + _COLUMNS] = strip.T
        self.strips = []
        covariance /= samples
        spread = (covariance.diagonal() - overall.square()).clamp(min=0).sqrt()
        covariance -= (means * (self.counts / samples)[:, None]).T @ means
        magnitude = (self.origin + overall).abs()
        return self.origin + means, covariance, spread.where(spread > _ROUNDING * magnitude, 0)

    def _parts(self) -> list[Tensor]:
        return [self.counts, self.sums, *self.strips]
