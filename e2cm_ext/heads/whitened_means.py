"""WhitenedMeans: linear discriminant analysis of pooled statistics of the features.

One pass over the data, no gradients. (This head is not the paper's, which compares raw features with their means.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops.packing import Packed, Packing
from ..ops.types import Decisions, Statistics
from .base import Head, keep_dtype, refuse_non_finite, score_with_rule
from .lda import ScatterMatrix, linear_discriminant
from .rules import Confidence, Entropy, Rule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WhitenedMeans", "statistics_of", "supports"]

_MAX_STATISTICS = 4096  # the time of a fit grows with their cube, its memory with their square


class WhitenedMeans(Head, kind="whitened_means"):
    """The nearest class mean among whitened statistics of the features: linear discriminant analysis.

    The features are reduced to statistics (see `Statistics`) and whitened: multiplied by the inverse root of their
    covariance within the classes, which all classes share. For whitened statistics f, the log-probabilities are the
    log-softmax of log counts[k] - |f - mean[k]|^2 / 2. |f|^2 is the same for all classes and drops out, so a score is
    weight[k] @ statistics + bias[k].

    With mean_shrinkage=0 and temperature=1 this is scikit-learn's
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...), on statistics divided by their standard deviations within
    the classes.

    The fit is computed in float64. While it is fitted, the head holds a little more than d^2 / 2 numbers in float64 for
    d statistics, the statistics of 512 samples in float32, and at the end four times as much for a moment. Weights stay
    float32 under `.half()` and the like.

    Args:
        num_classes: K, the number of classes.
        feature_shape: Shape of one sample's features: [C], [N, C] or [C, H, W].
        statistics: Of the features; None: a choice by their shape, see `statistics_of`. It reads maps as [C, H, W];
            networks that keep them as [H, W, C] need Statistics with channels=-1.
        shrinkage: Of the correlations of the statistics within the classes towards 0, from 0 to 1. None: Oracle
            Approximating Shrinkage (Chen, Wiesel, Eldar and Hero, 2010), which is larger for fewer samples.
        mean_shrinkage: Of the class means towards their average, from 0 to 1, since means of few samples lie too far
            apart. None: the share of sampling error in their squared norms, as James and Stein do, at most 0.9.
        temperature: Divides the scores; predictions do not change. None: 1, unless float32 could not tell confidences
            apart. Then as much as it takes for a sample on its class mean to have 16 nats of log-odds against the next
            class, on average over the classes.

    Attributes:
        weight: [K, d] float32.
        bias: [K] float32; -inf for a class without samples, which is never predicted.

    Example:
        import torch
        from e2cm_ext import WhitenedMeans

        x, labels = torch.randn(100, 8, 4, 4), torch.arange(100) % 5
        head = WhitenedMeans(num_classes=5, feature_shape=(8, 4, 4))
        head.update(x, labels, pass_index=0)
        head.finish(pass_index=0)
        log_probs = head(x)  # [100, 5]
    """

    passes = 1
    weight: Tensor
    bias: Tensor

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
        for name, value in (("shrinkage", shrinkage), ("mean_shrinkage", mean_shrinkage)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value!r}; wanted a number from 0 to 1, or None: as much as it takes")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` is {temperature!r}; wanted a number above 0, or None: as much as it takes")
        self.statistics = _as_statistics(statistics, self.feature_shape)
        self.shrinkage, self.mean_shrinkage, self.temperature = shrinkage, mean_shrinkage, temperature
        size = self.statistics.size(self.feature_shape)
        self.register_buffer("weight", torch.zeros(self.num_classes, size))
        self.register_buffer("bias", torch.full((self.num_classes,), -math.inf))
        self._packing = Packing()
        self._scatter: ScatterMatrix | None = None

    # ---- fitting ----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        self._check_batch(x, labels, pass_index)
        if x.numel() == 0:
            return
        rows = ops.statistics(x, self.statistics)
        refuse_non_finite(rows)  # NaN and infinity in x show in its statistics, which are fewer numbers
        self._count_labels(labels)
        if self._scatter is None:
            self._scatter = self._new_scatter(rows.mean(0))
        self._scatter.add(rows, labels)

    def _new_scatter(self, origin: Tensor) -> ScatterMatrix:
        return ScatterMatrix(self.num_classes, origin.double())

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Self) -> None:
        super().merge(other)
        if other._scatter is None:
            return
        scatter = copy.deepcopy(other._scatter)  # merging moves its origin
        if self._scatter is None:
            self._scatter = self._new_scatter(scatter.origin.to(self.weight.device))
        self._scatter.merge(scatter)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, pass_index: int) -> None:
        super().finish(pass_index)
        # A process without samples must call all_reduce, too.
        scatter, self._scatter = self._scatter or self._new_scatter(torch.zeros_like(self.weight[0])), None
        scatter.all_reduce()
        discriminant = linear_discriminant(scatter.moments(), self.shrinkage, self.mean_shrinkage)
        temperature = discriminant.temperature() if self.temperature is None else self.temperature
        self.weight.copy_(discriminant.weight / temperature)
        self.bias.copy_(discriminant.bias / temperature)

    def reset(self) -> None:
        super().reset()
        self._scatter = None

    # ---- inference --------------------------------------------------------------------------------------------------

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
        limit = rule.limit(threshold)
        statistics = ops.statistics(x, self.statistics)  # [B, d] are moved in place of the features
        return ops.linear_step(statistics, self._packed(), self.bias, limit, ids, out, rule=rule.name, exit=exit)[1]

    def flops(self) -> int:
        """Return the operations for the d statistics, and 2 K d for their product with the weights."""
        return self.statistics.flops(self.feature_shape) + 2 * self.weight.numel()

    # ---- saving -----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        statistics = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.statistics).items()
        }
        return super().config() | {
            "statistics": statistics,
            "shrinkage": self.shrinkage,
            "mean_shrinkage": self.mean_shrinkage,
            "temperature": self.temperature,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def statistics_of(feature_shape: Sequence[int], channels: int | None = None) -> Statistics:
    """Choose statistics for features of a shape: some hundred to two thousand numbers.

    Features with many channels get statistics of pairs of channels rather than fine grids. The choice was made on
    images that ResNet-56 on CIFAR-10 and a MobileNetV3-like network on CIFAR-100 had not seen.

    Args:
        feature_shape: [C], [N, C] or [C, H, W].
        channels: The axis that holds the channels, 0 or -1. None: the first of maps, the last of tokens [N, C].

    Returns:
        The statistics.

    Raises:
        ValueError: The shape has more than three axes.
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


def supports(feature_shape: Sequence[int]) -> bool:
    """Whether WhitenedMeans can be fitted to features of a shape, with the statistics of `statistics_of`."""
    shape = tuple(feature_shape)
    return len(shape) <= 3 and statistics_of(shape).size(shape) <= _MAX_STATISTICS


def _as_statistics(given: Statistics | dict[str, Any] | None, feature_shape: tuple[int, ...]) -> Statistics:
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
