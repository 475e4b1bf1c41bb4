"""Heads by class means: ClassMeans, the paper's, and PooledMeans, the same on averaged features."""

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
from .base import Head, in_own_dtype, positive, score_with_rule
from .rules import Confidence, Entropy, Rule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClassMeans", "PooledMeans", "channel_axis"]

_ROWS = 128  # samples that are summed in float32 before the sum goes into a double
_WIDENED = 1 << 18  # features that are made doubles at a time: more would not stay in the cache


class ClassMeans(Head, kind="class_means"):
    """E2CM: softmax over k of -||x - means[k]|| / scale[k]. means[k] is the average of class k's training samples, and
    scale[k] the average distance of all training samples, not only those of class k, to it (equations 2 to 5 of the
    paper). Nothing is learned by gradient descent.

    passes=2 is exact: means in the first pass over the data, distances to them in the second. passes=1 takes the root
    of the mean *squared* distance for scale, which follows from sums of the first pass alone. (This variant is not the
    paper's.) It is never the smaller one: it is the exact scale times sqrt(1 + (s/m)^2), with s the standard deviation
    and m the mean of the distances to that class. On the pixels of scikit-learn's digits that is 1.0% to 2.4% more, by
    class; the nearest mean is another one for 0.4% of the samples, and no confidence changes by more than 0.002.

    Sums are double. Held while fitting: K * D doubles, beside the batch; during an update, up to half as much again.
    With more than 24 classes, means that are in use on the CPU are held a second time, packed (see ops.pack).
    Means take the memory order of the features they are fitted on, so that features in that order are compared with
    them without a copy; `.to(memory_format=...)` converts them. `.half()` and the like leave them in float32, whatever
    the features are: distances outgrow 16 bits.
    """

    means: Tensor  # [K, *feature_shape] float32; of a class without samples: the center
    scale: Tensor  # [K] float32; of a class without samples: NaN, by which the ops never predict it
    center: Tensor  # [*feature_shape] float32, the average of the means: keeps rounding small, see ops.class_distances

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
        self._store_in_order(channels_last)
        self._packing = Packing()
        self._sums: Tensor | None = None  # [K, *shape] float64 in the memory order of the first batch
        self._squares: Tensor | None = None  # of all features of all samples, float64
        self._distances: Tensor | None = None  # [K] float64

    def _mean_shape(self) -> tuple[int, ...]:
        return self.feature_shape

    @property
    def statistics(self) -> Statistics | None:
        """Of x, in whose place distances are taken of them; None: of x as it is."""
        return None

    def features(self, x: Tensor) -> Tensor:
        """What distances are taken of."""
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
            self._gather(features, labels)
        else:
            distances = ops.class_distances(features, self._packed()).sum(0, dtype=torch.float64)
            self._distances = _plus(self._distances, distances)

    def _gather(self, features: Tensor, labels: Tensor) -> None:
        if self._sums is None:
            self._sums = self._zero_sums(validation.is_channels_last(features), features.device)
        last = validation.is_channels_last(self._sums)
        sums, rows = _flat(self._sums, last), _flat(features, last)
        if self.passes == 1:
            self._squares = _plus(self._squares, _add_exactly(sums, rows, labels))
        else:
            _add(sums, rows, labels)

    def _zero_sums(self, last: bool, device: torch.device) -> Tensor:
        classes, *shape = self.means.shape
        if last:
            return torch.zeros(classes, *shape[1:], shape[0], dtype=torch.float64, device=device).movedim(-1, 1)
        return torch.zeros(classes, *shape, dtype=torch.float64, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Self) -> None:
        if self._finished and not torch.equal(self.means, other.means.to(self.means.device)):
            raise ValueError("`other` has measured distances to other means; give both heads the same after pass 0")
        super().merge(other)
        for name in ("_sums", "_squares", "_distances"):
            theirs = getattr(other, name)
            if theirs is not None:
                setattr(self, name, _plus(getattr(self, name), theirs.to(self.means.device, copy=True)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, pass_index: int) -> None:
        super().finish(pass_index)
        if pass_index == 0:
            self._make_means()
        else:
            sums = _or_zeros(self._distances, self.scale)
            # As many samples as this pass had: not necessarily as many as pass 0.
            self._set_scale(all_reduce_sum(sums) / self._seen)
        self._sums = self._squares = self._distances = None

    def _make_means(self) -> None:
        # All processes must add in the same order; one without samples has none of its own.
        own = self._sums is not None and validation.is_channels_last(self._sums)
        last = bool(all_reduce_sum(torch.tensor(float(own), device=self.counts.device)))
        sums = self._zero_sums(last, self.means.device) if self._sums is None else self._sums.to(self.means.device)
        sums = _in_order(sums, last)
        all_reduce_sum(_flat(sums, last))

        counts = self.counts
        samples, exist = counts.sum(), counts > 0
        overall = sums.sum(0) / samples  # the mean of all samples
        sums /= counts.clamp(min=1).reshape(-1, *[1] * (sums.dim() - 1))
        center = sums.sum(0) / exist.sum()  # the sum of a class without samples is 0
        self._store_in_order(last)
        self.means.copy_(sums)
        self.center.copy_(center)
        self.means[~exist] = self.center
        if self.passes == 1:
            # E ||x - c||^2 = E ||x - overall||^2 + ||overall - c||^2. In double, the first term's cancellation of
            # E ||x||^2 - ||overall||^2 leaves enough digits until the offset is 10^5 times what varies.
            squares = all_reduce_sum(_or_zeros(self._squares, overall.sum()))
            spread = (squares / samples - overall.square().sum()).clamp(min=0)
            between = torch.stack([(mean - overall).square().sum() for mean in sums])
            self._set_scale((spread + between).sqrt())

    def _set_scale(self, scale: Tensor) -> None:
        self.scale.copy_(scale)
        self.scale[self.counts == 0] = math.nan

    def reset(self) -> None:
        super().reset()
        self._sums = self._squares = self._distances = None

    # ---- answering --------------------------------------------------------------------------------------------------

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
        distances = ops.class_distances(self.features(x), self._packed())  # only these few numbers are moved
        return ops.decide(distances, distances, limit, ids, out, scale=self.scale, rule=rule.name, exit=exit)[1]

    def flops(self) -> int:
        """K (3 D - 1), as the paper counts: D differences, D squares and D - 1 additions per class.

        The root, the division by the scale, the softmax and the comparison with the threshold are left out, as there.
        """
        return self.num_classes * (3 * self.center.numel() - 1)

    # ---- keeping ----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        return super().config() | {"passes": self.passes, "channels_last": validation.is_channels_last(self.means)}

    def _store_in_order(self, last: bool) -> None:
        self.means = _in_order(self.means, last)
        self.center = _in_order(self.center[None], last)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(in_own_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        self._store_in_order(validation.is_channels_last(self.means))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        means = state_dict.get(prefix + "means")
        if isinstance(means, Tensor) and validation.is_channels_last(means) and means.shape == self.means.shape:
            self._store_in_order(True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PooledMeans(ClassMeans, kind="pooled_means"):
    """ClassMeans of averaged features: small where raw features are large. (The paper's features are raw.)

    Feature maps [C, H, W] are averaged over a grid of `grid` x `grid` cells, as equal as can be (see Statistics); a
    map with fewer rows or columns than the grid keeps those it has. Tokens [N, C] are averaged over N, whatever the
    grid, and a vector [C] stays as it is. `channels` says which axis of feature_shape holds the channels, 0 or -1: None
    stands for the first axis of maps and the last of tokens. Networks that keep maps as [H, W, C] need -1.
    """

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        *,
        grid: int = 1,
        channels: int | None = None,
        passes: int = 2,
        channels_last: bool = False,  # of no meaning here: pooled features are a vector
    ) -> None:
        self.grid = positive("grid", grid)
        self._axis = channel_axis(len(tuple(feature_shape)), channels)
        super().__init__(num_classes, feature_shape, passes=passes)

    def _mean_shape(self) -> tuple[int, ...]:
        statistics = self.statistics
        return self.feature_shape if statistics is None else (statistics.size(self.feature_shape),)

    @cached_property
    def statistics(self) -> Statistics | None:
        if len(self.feature_shape) == 1:
            return None
        cells = (1, 1)
        if len(self.feature_shape) == 3:
            rows, columns = (size for axis, size in enumerate(self.feature_shape) if axis != self._axis)
            cells = (min(self.grid, rows), min(self.grid, columns))
        return Statistics(mean=cells, channels=0 if self._axis == 0 else -1)

    def flops(self) -> int:
        """K (3 D - 1) for D averages, and one operation for every number of the features, of which these are made."""
        pooling = 0 if self.statistics is None else self.statistics.flops(self.feature_shape)
        return pooling + super().flops()

    def config(self) -> dict[str, Any]:
        config = super().config() | {"grid": self.grid, "channels": self._axis}
        del config["channels_last"]
        return config


# ---- small parts -----------------------------------------------------------------------------------------------------


def channel_axis(dims: int, channels: int | None) -> int:
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


def _add(sums: Tensor, rows: Tensor, labels: Tensor) -> None:
    """sums[k] += the rows with label k, to 7 digits: three times as fast as in double, with ten classes."""
    for few, few_labels in zip(torch.split(rows, _ROWS), torch.split(labels, _ROWS), strict=True):
        present, place = torch.unique(few_labels, return_inverse=True)
        partial = torch.zeros(len(present), rows.shape[1], device=rows.device)
        partial.index_add_(0, place, few.float())
        for k, some in zip(present.tolist(), partial, strict=True):
            sums[k] += some


def _add_exactly(sums: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """The same in double; returns the sum of all squares, which are only of use if both have all their digits."""
    squares = torch.zeros((), dtype=torch.float64, device=rows.device)
    count = max(1, _WIDENED // rows.shape[1])
    for few, few_labels in zip(torch.split(rows, count), torch.split(labels, count), strict=True):
        wide = few.double()
        sums.index_add_(0, few_labels, wide)
        wide = wide.flatten()
        squares += wide.dot(wide)
    return squares


def _in_order(rows: Tensor, last: bool) -> Tensor:
    """rows [N, ...] with each row in channels_last order, or in the usual one."""
    if last and rows.dim() in (4, 5):
        return rows.contiguous(memory_format=validation.channels_last_format(rows))
    return rows.contiguous()


def _flat(rows: Tensor, last: bool) -> Tensor:
    """rows [N, ...] as [N, D] in that memory order: a view if they are stored so."""
    return (rows.movedim(1, -1) if last else rows).reshape(rows.shape[0], -1)


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a.add_(b)


def _or_zeros(statistics: Tensor | None, like: Tensor) -> Tensor:
    if statistics is None:
        return torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    return statistics.to(like.device)
