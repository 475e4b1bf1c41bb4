"""Heads of class means: ClassMeans, the paper's, and PooledMeans, the same on pooled features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops import validation
from ..ops.packing import Packed, Packing
from ..ops.types import Decisions, Statistics
from ..utils.distributed import all_reduce_sum
from .base import Head, keep_dtype, positive_int, score_with_rule
from .rules import Confidence, Entropy, Rule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClassMeans", "PooledMeans", "channel_axis"]

_FLOAT32_ROWS = 128  # summed in float32 before the sum is added in float64
_FLOAT64_NUMBERS = 1 << 18  # converted to float64 at once: more would not stay in the cache


class ClassMeans(Head, kind="class_means"):
    """The head of the E2CM paper: distances to the class means of the raw features.

    A sample's score for class k is -||x - means[k]|| / scale[k], and the log-probabilities are the log-softmax of the
    scores. means[k] is the average of the training samples of class k, and scale[k] the average distance of all
    training samples, not only those of class k, to it (equations 2 to 5 of the paper).

    With passes=1 (ours, not the paper's), scale[k] is the root mean square distance, which follows from sums of one
    pass. It is never smaller: it is the mean distance times sqrt(1 + (s / m)^2), for distances with mean m and standard
    deviation s. On the pixels of scikit-learn's digits it is 1.0% to 2.4% larger; 0.4% of the samples get another
    prediction, and no confidence changes by more than 0.002.

    While it is fitted, the head holds K * D numbers in float64, and half as much again during an update. With more than
    24 classes, means that are in use on a CPU are held a second time, packed (see `ops.pack`).

    Means take the memory format of the features that they are fitted on, so that inference copies nothing;
    `.to(memory_format=...)` converts them. They stay float32 under `.half()` and the like, since distances would
    overflow in 16 bits.

    Args:
        num_classes: K, the number of classes.
        feature_shape: Shape of one sample's features.
        passes: 2: means in the first pass over the data, mean distances in the second. 1: root mean square distances.
        channels_last: The memory format of the means before a fit.

    Attributes:
        means: [K, *feature_shape] float32; `center` for a class without samples.
        scale: [K] float32; NaN for a class without samples, which is never predicted.
        center: [*feature_shape] float32, the average of the means. It keeps rounding errors small, see
            `ops.class_distances`.

    Example:
        import torch
        from e2cm_ext import ClassMeans

        x, labels = torch.randn(100, 8, 4, 4), torch.arange(100) % 5
        head = ClassMeans(num_classes=5, feature_shape=(8, 4, 4))
        for pass_index in range(head.passes):
            head.update(x, labels, pass_index)
            head.finish(pass_index)
        log_probs = head(x)  # [100, 5]
    """

    means: Tensor
    scale: Tensor
    center: Tensor

    def __init__(
        self, num_classes: int, feature_shape: Sequence[int], *, passes: int = 2, channels_last: bool = False
    ) -> None:
        super().__init__(num_classes, feature_shape)
        if passes not in (1, 2):
            raise ValueError(f"`passes` is {passes!r}; wanted 2 (exact) or 1 (root mean square distances)")
        self.passes = passes
        shape = self._mean_shape()
        self.register_buffer("means", torch.zeros(self.num_classes, *shape))
        self.register_buffer("scale", torch.full((self.num_classes,), math.nan))
        self.register_buffer("center", torch.zeros(shape))
        self._set_memory_format(channels_last)
        self._packing = Packing()
        # All in float64: sums [K, *shape] in the memory format of the first batch, the sum of the squares of all
        # features, and sums of distances [K].
        self._sums: Tensor | None = None
        self._squares: Tensor | None = None
        self._distances: Tensor | None = None

    def _mean_shape(self) -> tuple[int, ...]:
        return self.feature_shape

    @property
    def statistics(self) -> Statistics | None:
        """Statistics of x that distances are computed of; None: x itself."""
        return None

    def features(self, x: Tensor) -> Tensor:
        """Return what distances are computed of, given features [B, *feature_shape]."""
        return x if self.statistics is None else ops.statistics(x, self.statistics)

    # ---- fitting ----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        super().update(x, labels, pass_index)
        if x.numel() == 0:
            return
        features = self.features(x)
        if pass_index == 0:
            self._add_features(features, labels)
        else:
            distances = ops.class_distances(features, self._packed()).sum(0, dtype=torch.float64)
            self._distances = _add(self._distances, distances)

    def _add_features(self, features: Tensor, labels: Tensor) -> None:
        if self._sums is None:
            self._sums = self._zero_sums(validation.is_channels_last(features), features.device)
        channels_last = validation.is_channels_last(self._sums)
        sums, rows = _flatten(self._sums, channels_last), _flatten(features, channels_last)
        if self.passes == 1:
            self._squares = _add(self._squares, _add_rows_float64(sums, rows, labels))
        else:
            _add_rows(sums, rows, labels)

    def _zero_sums(self, channels_last: bool, device: torch.device) -> Tensor:
        classes, *shape = self.means.shape
        if channels_last:
            return torch.zeros(classes, *shape[1:], shape[0], dtype=torch.float64, device=device).movedim(-1, 1)
        return torch.zeros(classes, *shape, dtype=torch.float64, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Self) -> None:
        if self._finished_passes and not torch.equal(self.means, other.means.to(self.means.device)):
            raise ValueError("`other` has measured distances to other means; give both heads the same after pass 0")
        super().merge(other)
        for name in ("_sums", "_squares", "_distances"):
            theirs = getattr(other, name)
            if theirs is not None:
                setattr(self, name, _add(getattr(self, name), theirs.to(self.means.device, copy=True)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, pass_index: int) -> None:
        super().finish(pass_index)
        if pass_index == 0:
            self._compute_means()
        else:
            sums = _or_zeros(self._distances, self.scale)
            # This pass may have had another number of samples than pass 0.
            self._set_scale(all_reduce_sum(sums) / self._pass_samples)
        self._sums = self._squares = self._distances = None

    def _compute_means(self) -> None:
        # All processes must add in the same memory order; one without samples has none.
        own = self._sums is not None and validation.is_channels_last(self._sums)
        channels_last = bool(all_reduce_sum(torch.tensor(float(own), device=self.counts.device)))
        device = self.means.device
        sums = self._zero_sums(channels_last, device) if self._sums is None else self._sums.to(device)
        sums = _to_memory_format(sums, channels_last)
        all_reduce_sum(_flatten(sums, channels_last))

        counts = self.counts
        samples, nonempty = counts.sum(), counts > 0
        overall = sums.sum(0) / samples
        means = sums.div_(counts.clamp(min=1).reshape(-1, *[1] * (sums.dim() - 1)))
        center = means.sum(0) / nonempty.sum()  # means of classes without samples are 0 here
        self._set_memory_format(channels_last)
        self.means.copy_(means)
        self.center.copy_(center)
        self.means[~nonempty] = self.center
        if self.passes == 1:
            # E ||x - c||^2 = E ||x - overall||^2 + ||overall - c||^2. In float64, the cancellation in the first term,
            # E ||x||^2 - ||overall||^2, leaves enough digits until the offset is 10^5 times the deviations.
            squares = all_reduce_sum(_or_zeros(self._squares, overall.sum()))
            variance = (squares / samples - overall.square().sum()).clamp(min=0)
            to_means = torch.stack([(mean - overall).square().sum() for mean in means])
            self._set_scale((variance + to_means).sqrt())

    def _set_scale(self, scale: Tensor) -> None:
        self.scale.copy_(scale)
        self.scale[self.counts == 0] = math.nan

    def reset(self) -> None:
        super().reset()
        self._sums = self._squares = self._distances = None

    # ---- inference --------------------------------------------------------------------------------------------------

    def _packed(self) -> Packed:
        return self._packing.packed(self.means, self.center)

    def forward(self, x: Tensor) -> Tensor:
        return ops.class_scores(x, self._packed(), self.scale, statistics=self.statistics).log_probs

    def score(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        scores = ops.class_scores(x, self._packed(), self.scale, statistics=self.statistics)
        return score_with_rule(scores, rule)

    def step(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(rule, Confidence | Entropy):
            return super().step(x, threshold, ids, out, rule=rule, exit=exit)
        limit = rule.limit(threshold)
        return ops.exit_step(
            x, self._packed(), self.scale, limit, ids, out, statistics=self.statistics, rule=rule.name, exit=exit
        )

    def decide(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> Tensor:
        if not isinstance(rule, Confidence | Entropy):
            return super().decide(x, threshold, ids, out, rule=rule, exit=exit)
        limit = rule.limit(threshold)
        distances = ops.class_distances(self.features(x), self._packed())  # [B, K] are moved in place of the features
        return ops.decide(distances, distances, limit, ids, out, scale=self.scale, rule=rule.name, exit=exit)[1]

    def flops(self) -> int:
        """Return K (3 D - 1), as the paper counts: D differences, D squares and D - 1 additions per class.

        The root, the division by the scale, the softmax and the comparison with the threshold are left out, as there.
        """
        return self.num_classes * (3 * self.center.numel() - 1)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        return super().config() | {"passes": self.passes, "channels_last": validation.is_channels_last(self.means)}

    def _set_memory_format(self, channels_last: bool) -> None:
        self.means = _to_memory_format(self.means, channels_last)
        self.center = _to_memory_format(self.center[None], channels_last)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        self._set_memory_format(validation.is_channels_last(self.means))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        means = state_dict.get(prefix + "means")
        if isinstance(means, Tensor) and validation.is_channels_last(means) and means.shape == self.means.shape:
            self._set_memory_format(True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PooledMeans(ClassMeans, kind="pooled_means"):
    """ClassMeans of pooled features: smaller than the raw features that the paper takes.

    Feature maps [C, H, W] are averaged in the cells of a grid, as equal as possible (see `Statistics`). Tokens [N, C]
    are averaged over N. Vectors [C] stay as they are.

    Args:
        num_classes: K, the number of classes.
        feature_shape: Shape of one sample's features.
        grid: Cells per axis of a map; fewer if the map has fewer rows or columns. Of no effect on tokens and vectors.
        channels: The axis of `feature_shape` that holds the channels, 0 or -1. None: the first of maps, the last of
            tokens. Networks that keep maps as [H, W, C] need -1.
        passes: As in ClassMeans.
        channels_last: Of no effect, as pooled features are vectors.
    """

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        *,
        grid: int = 1,
        channels: int | None = None,
        passes: int = 2,
        channels_last: bool = False,
    ) -> None:
        self.grid = positive_int("grid", grid)
        self._channel_axis = channel_axis(len(tuple(feature_shape)), channels)
        super().__init__(num_classes, feature_shape, passes=passes)

    def _mean_shape(self) -> tuple[int, ...]:
        statistics = self.statistics
        return self.feature_shape if statistics is None else (statistics.size(self.feature_shape),)

    @cached_property
    def statistics(self) -> Statistics | None:
        """Averages in the cells of the grid; None for vectors."""
        if len(self.feature_shape) == 1:
            return None
        cells = (1, 1)
        if len(self.feature_shape) == 3:
            rows, columns = (size for axis, size in enumerate(self.feature_shape) if axis != self._channel_axis)
            cells = (min(self.grid, rows), min(self.grid, columns))
        return Statistics(mean=cells, channels=0 if self._channel_axis == 0 else -1)

    def flops(self) -> int:
        """Return K (3 D - 1) for D averages, and one operation for every number of the features that are averaged."""
        pooling = 0 if self.statistics is None else self.statistics.flops(self.feature_shape)
        return pooling + super().flops()

    def config(self) -> dict[str, Any]:
        config = super().config() | {"grid": self.grid, "channels": self._channel_axis}
        del config["channels_last"]
        return config


# ---- helpers ---------------------------------------------------------------------------------------------------------


def channel_axis(dims: int, channels: int | None) -> int:
    """Return the axis that holds the channels of features with so many axes, counted from 0."""
    if dims not in (1, 2, 3):
        raise ValueError(
            f"`feature_shape` has {dims} axes; PooledMeans knows vectors [C], tokens [N, C] and maps [C, H, W]: "
            "use class_means or a Head of your own here"
        )
    if channels is None:
        return dims - 1 if dims < 3 else 0
    if channels not in (0, -1, dims - 1):
        raise ValueError(f"`channels` is {channels!r}; wanted 0 (the first axis) or -1 (the last)")
    return channels % dims


def _add_rows(sums: Tensor, rows: Tensor, labels: Tensor) -> None:
    """Add rows [N, D] to the sums [K, D] of their classes, to 7 digits. With ten classes: 3x as fast as in float64."""
    for chunk, chunk_labels in zip(torch.split(rows, _FLOAT32_ROWS), torch.split(labels, _FLOAT32_ROWS), strict=True):
        classes, positions = torch.unique(chunk_labels, return_inverse=True)
        partial = torch.zeros(len(classes), rows.shape[1], device=rows.device)
        partial.index_add_(0, positions, chunk.float())
        for k, partial_sum in zip(classes.tolist(), partial, strict=True):
            sums[k] += partial_sum


def _add_rows_float64(sums: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Do the same in float64, and return the sum of all squares, which needs sums with all their digits."""
    squares = torch.zeros((), dtype=torch.float64, device=rows.device)
    count = max(1, _FLOAT64_NUMBERS // rows.shape[1])
    for chunk, chunk_labels in zip(torch.split(rows, count), torch.split(labels, count), strict=True):
        numbers = chunk.double()
        sums.index_add_(0, chunk_labels, numbers)
        numbers = numbers.flatten()
        squares += numbers.dot(numbers)
    return squares


def _to_memory_format(rows: Tensor, channels_last: bool) -> Tensor:
    """Convert rows [N, ...] to channels_last, if they have as many axes, or to contiguous."""
    if channels_last and rows.dim() in (4, 5):
        return rows.contiguous(memory_format=validation.channels_last_format(rows))
    return rows.contiguous()


def _flatten(rows: Tensor, channels_last: bool) -> Tensor:
    """Rows [N, ...] as [N, D] in that memory order: a view if they are stored so."""
    return (rows.movedim(1, -1) if channels_last else rows).reshape(rows.shape[0], -1)


def _add(total: Tensor | None, summand: Tensor) -> Tensor:
    return summand if total is None else total.add_(summand)


def _or_zeros(sums: Tensor | None, like: Tensor) -> Tensor:
    if sums is None:
        return torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    return sums.to(like.device)
