"""What answers at an exit: a head turns features into class scores, and learns by gathering statistics in a stream.

A head is shown the training data `passes` times, batch by batch: `update` for every batch, `finish` at the end of each
pass. It holds sums, never samples. Heads that have seen different parts of the data are put together with `merge`, or,
if torch.distributed is initialised, by `finish` itself: every process then calls it, also one that had no sample.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, cost, ops
from .decisions import Decisions
from .rules import Confidence, Entropy, Rule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClassMeans", "Head", "PooledMeans", "build", "from_config", "total"]

_ROWS = 128  # samples that are summed in float32 before the sum goes into a double
_WIDENED = 1 << 18  # features that are made doubles at a time: more would not stay in the cache
_KINDS: dict[str, type[Head]] = {}


class Head(nn.Module):
    """The base of all heads. To write one, say what to gather, what to make of it, and what to answer:

        class LeastSquares(Head):
            def __init__(self, num_classes, feature_shape):
                super().__init__(num_classes, feature_shape)
                size = math.prod(feature_shape)
                self.register_buffer("weight", torch.zeros(size, num_classes))
                self.products = 1e-3 * torch.eye(size)
                self.targets = torch.zeros(size, num_classes)

            def update(self, x, labels, turn):
                super().update(x, labels, turn)  # checks both, counts the labels
                x = x.flatten(1)
                self.products += x.T @ x
                self.targets.index_add_(1, labels, x.T)

            def finish(self, turn):
                super().finish(turn)  # `counts` over all processes; after the last pass, `fitted`
                self.weight.copy_(torch.linalg.solve(total(self.products), total(self.targets)))

            def forward(self, x):  # log-probabilities [B, K] float32
                return (x.flatten(1) @ self.weight).log_softmax(1)

    That is all for one fit from the start to the end. Statistics that are to be merged, or thrown away for another
    fit, need `merge` and `reset` too, both with a call of the base's. A constructor with more arguments needs a
    `config` that returns them. Where several passes over the data are needed, set `passes`.
    """

    kind: ClassVar[str] = "head"
    passes: int = 1
    counts: Tensor  # [K] int64: samples per class at fit; a class with none is never predicted
    fitted: bool

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind or cls.__name__
        _KINDS[cls.kind] = cls

    def __init__(self, num_classes: int, feature_shape: Sequence[int]) -> None:
        super().__init__()
        self.num_classes = _positive("num_classes", num_classes)
        self.feature_shape = tuple(_positive("feature_shape", size) for size in feature_shape)
        if not self.feature_shape:
            raise ValueError("`feature_shape` is empty; wanted the shape of one sample's features, such as (64, 8, 8)")
        self.register_buffer("counts", torch.zeros(self.num_classes, dtype=torch.int64))
        self.fitted = False
        self._finished = 0  # passes of the fit under way
        self._tally: Tensor | None = None  # samples per class in the pass under way
        self._seen = 0  # samples in the pass that was finished last

    # ---- fitting ----------------------------------------------------------------------------------------------------

    # Here and below: statistics outlive the call. Made in inference mode, they could not be added to outside of it.
    @torch.inference_mode(False)
    def update(self, x: Tensor, labels: Tensor, turn: int) -> None:
        """Takes in a batch of features [B, *feature_shape] with labels [B], in pass number `turn` (from 0)."""
        self._expect(turn)
        checks.strided("x", x, "a tensor [batch, ...]")
        if x.shape[1:] != self.feature_shape:
            raise ValueError(f"`x` has shape {list(x.shape)}; wanted [batch, {str(list(self.feature_shape))[1:]}")
        if labels.dtype is not torch.int64 or labels.shape != x.shape[:1]:
            raise ValueError(f"`labels` are {labels.dtype} {list(labels.shape)}; wanted int64 [{x.shape[0]}]")
        if x.numel() == 0:
            return
        _refuse_non_finite(x)
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"`labels` go from {low} to {high}; wanted 0 to {self.num_classes - 1}")
        counted = labels.bincount(minlength=self.num_classes)
        self._tally = counted if self._tally is None else self._tally.add_(counted)

    @torch.inference_mode(False)
    def merge(self, other: Self) -> None:
        """Adds what another head has gathered in the same pass."""
        if type(other) is not type(self) or not self._is_like(other):
            raise ValueError(f"`other` is {other}; wanted another {self}")
        if other._finished != self._finished:
            raise RuntimeError(f"`other` is in pass {other._finished}, this head in pass {self._finished}")
        if other._tally is not None:
            moved = other._tally.to(self.counts.device, copy=True)
            self._tally = moved if self._tally is None else self._tally.add_(moved)

    @torch.inference_mode(False)
    def finish(self, turn: int) -> None:
        """Closes pass number `turn`. Call the base's first: it fills `counts` after pass 0."""
        self._expect(turn)
        device = self.counts.device
        tally = torch.zeros_like(self.counts) if self._tally is None else self._tally.to(device)
        total(tally)
        self._tally, self._seen = None, int(tally.sum())
        if self._seen == 0:
            raise ValueError(f"no sample in pass {turn}: `update` was not called; the loader may be used up or empty")
        if turn == 0:
            self.counts.copy_(tally)
        self._finished = turn + 1
        self.fitted = self._finished == self.passes

    def reset(self) -> None:
        """Forgets what an interrupted fit has gathered, so that the next one starts at pass 0."""
        self._tally, self._finished = None, 0

    def _expect(self, turn: int) -> None:
        if turn == 0 and self._finished == self.passes:
            self.reset()
        if turn != self._finished:
            raise RuntimeError(
                f"pass {turn} of {type(self).__name__} cannot start: {self._finished} of {self.passes} are finished; "
                "call reset() to start again"
            )

    # ---- answering --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, K] float32. A row of NaN is a sample that must not leave here."""
        raise NotImplementedError(f"{type(self).__name__} needs a forward()")

    def judge(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """What `step` goes by: the rule's certainty [B] float32 of every sample, and the predictions [B] int64.

        With the rule "confidence" these are the same bits as in `step`; entropies may differ in the last place.
        """
        log_probs = self(x)
        if not isinstance(rule, Confidence):
            return rule.certainty(log_probs), log_probs.argmax(1)
        rows = log_probs.shape[0]
        out = Decisions.empty(rows, device=log_probs.device)
        ids = torch.arange(rows, device=log_probs.device)
        ops.decide(log_probs, log_probs, -math.inf, ids, out)
        return out.confidence, out.prediction.clamp_(min=0)

    def step(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> tuple[Tensor, Tensor]:
        """Writes the answers of the samples that leave into `out`; returns the survivors and their ids."""
        return _leave(x, self(x), threshold, ids, out, rule, exit)

    def flops(self) -> int:
        """Floating-point operations per sample: by default what torch's counter sees in forward(), see cost.py."""
        return cost.flops(self, torch.zeros(1, *self.feature_shape, device=self.counts.device))

    # ---- keeping ----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Everything but the buffers, fit for JSON: from_config makes an empty head of it."""
        return {"kind": self.kind, "num_classes": self.num_classes, "feature_shape": list(self.feature_shape)}

    def _is_like(self, other: Head) -> bool:
        mine, theirs = ({k: v for k, v in head.config().items() if k != "channels_last"} for head in (self, other))
        return mine == theirs

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.fitted)

    def set_extra_state(self, state: Tensor) -> None:
        self.fitted = bool(state)
        self.reset()

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items() if key != "kind")


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
        self._sums: Tensor | None = None  # [K, *shape] float64 in the memory order of the first batch
        self._squares: Tensor | None = None  # of all features of all samples, float64
        self._distances: Tensor | None = None  # [K] float64

    def _mean_shape(self) -> tuple[int, ...]:
        return self.feature_shape

    def features(self, x: Tensor) -> Tensor:
        """What distances are taken of: x as it is."""
        return x

    # ---- fitting ----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, x: Tensor, labels: Tensor, turn: int) -> None:
        super().update(x, labels, turn)
        if x.numel() == 0:
            return
        features = self.features(x)
        if turn == 0:
            self._gather(features, labels)
        else:
            distances = ops.class_distances(features, self.means, self.center).sum(0, dtype=torch.float64)
            self._distances = _plus(self._distances, distances)

    def _gather(self, features: Tensor, labels: Tensor) -> None:
        if self._sums is None:
            self._sums = self._zero_sums(checks.is_channels_last(features), features.device)
        last = checks.is_channels_last(self._sums)
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
    def finish(self, turn: int) -> None:
        super().finish(turn)
        if turn == 0:
            self._make_means()
        else:
            sums = _or_zeros(self._distances, self.scale)
            # As many samples as this pass had: not necessarily as many as pass 0.
            self._set_scale(total(sums) / self._seen)
        self._sums = self._squares = self._distances = None

    def _make_means(self) -> None:
        # All processes must add in the same order; one without samples has none of its own.
        own = self._sums is not None and checks.is_channels_last(self._sums)
        last = bool(total(torch.tensor(float(own), device=self.counts.device)))
        sums = self._zero_sums(last, self.means.device) if self._sums is None else self._sums.to(self.means.device)
        sums = _in_order(sums, last)
        total(_flat(sums, last))

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
            squares = total(_or_zeros(self._squares, overall.sum()))
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

    def forward(self, x: Tensor) -> Tensor:
        return ops.class_scores(self.features(x), self.means, self.scale, self.center).log_probs

    def judge(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        scores = ops.class_scores(self.features(x), self.means, self.scale, self.center)
        certainty = scores.confidence if isinstance(rule, Confidence) else rule.certainty(scores.log_probs)
        return certainty, scores.prediction

    def step(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(rule, Confidence | Entropy):
            return super().step(x, threshold, ids, out, rule=rule, exit=exit)
        limit = rule.limit(threshold)
        return ops.exit_step(x, self.means, self.scale, limit, ids, out, self.center, rule=rule.name, exit=exit)

    def flops(self) -> int:
        """K (3 D - 1), as the paper counts: D differences, D squares and D - 1 additions per class.

        The root, the division by the scale, the softmax and the comparison with the threshold are left out, as there.
        """
        return self.num_classes * (3 * self.center.numel() - 1)

    # ---- keeping ----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        return super().config() | {"passes": self.passes, "channels_last": checks.is_channels_last(self.means)}

    def _store_in_order(self, last: bool) -> None:
        self.means = _in_order(self.means, last)
        self.center = _in_order(self.center[None], last)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else torch.empty_like(moved, dtype=tensor.dtype).copy_(tensor)

        super()._apply(in_float32, recurse)  # type: ignore[no-untyped-call]
        self._store_in_order(checks.is_channels_last(self.means))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        means = state_dict.get(prefix + "means")
        if isinstance(means, Tensor) and checks.is_channels_last(means) and means.shape == self.means.shape:
            self._store_in_order(True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PooledMeans(ClassMeans, kind="pooled_means"):
    """ClassMeans of averaged features: small where raw features are large. (The paper's features are raw.)

    Feature maps [C, H, W] are averaged over a grid of `grid` x `grid` cells (as torch's adaptive average pooling does);
    a map with fewer rows or columns than the grid keeps those it has. Tokens [N, C] are averaged over N, whatever the
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
        self.grid = _positive("grid", grid)
        self._axis = _channel_axis(len(tuple(feature_shape)), channels)
        super().__init__(num_classes, feature_shape, passes=passes)

    def _mean_shape(self) -> tuple[int, ...]:
        rows, columns = self._cells()
        return (self.feature_shape[self._axis] * rows * columns,)

    def _map(self) -> list[int]:
        """Rows and columns of the feature maps."""
        return [size for axis, size in enumerate(self.feature_shape) if axis != self._axis]

    def _cells(self) -> tuple[int, int]:
        if len(self.feature_shape) < 3:
            return 1, 1
        rows, columns = self._map()
        return min(self.grid, rows), min(self.grid, columns)

    def features(self, x: Tensor) -> Tensor:
        """x averaged: [B, channels * cells]."""
        if x.dim() == 2:
            return x
        if x.dim() == 3:
            return x.mean(2 - self._axis, dtype=torch.float32)
        return _pooled(x.movedim(1 + self._axis, 1), self._cells())

    def step(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> tuple[Tensor, Tensor]:
        if x.dim() == 2 or not isinstance(rule, Confidence | Entropy):
            return super().step(x, threshold, ids, out, rule=rule, exit=exit)
        distances = ops.class_distances(self.features(x), self.means, self.center)
        limit = rule.limit(threshold)
        return ops.decide(x, distances, limit, ids, out, scale=self.scale, rule=rule.name, exit=exit)

    def flops(self) -> int:
        """K (3 D - 1) for D averages, and what these cost: one operation for every number that goes into one.

        n numbers are averaged with n - 1 additions and one multiplication. Cells overlap, and numbers count more than
        once, where the grid does not divide the map.
        """
        pooling = 0
        if len(self.feature_shape) == 2:
            pooling = math.prod(self.feature_shape)
        elif len(self.feature_shape) == 3:
            taken = [_taken(size, cells) for size, cells in zip(self._map(), self._cells(), strict=True)]
            pooling = self.feature_shape[self._axis] * math.prod(taken)
        return pooling + super().flops()

    def config(self) -> dict[str, Any]:
        config = super().config() | {"grid": self.grid, "channels": self._axis}
        del config["channels_last"]
        return config


# ---- making heads ---------------------------------------------------------------------------------------------------


def build(
    kind: str | type[Head] | Callable[[int, tuple[int, ...]], Head],
    num_classes: int,
    shapes: Sequence[Sequence[int]],
    memory: int = 256 << 20,
) -> list[Head]:
    """One empty head for every exit, whose features have these shapes.

    kind: "class_means", "pooled_means", a Head class, or a function (num_classes, feature_shape) -> Head, such as
    functools.partial(PooledMeans, grid=2); or "auto": class_means wherever all the means together stay within `memory`
    bytes; where they do not, the largest give way to pooled_means, one after the other, until they do. (While fitting,
    a head holds three times the bytes of its means.)
    """
    sizes = [tuple(shape) for shape in shapes]
    if isinstance(kind, str) and kind == "auto":
        return _within(memory, num_classes, sizes)
    make: Callable[[int, tuple[int, ...]], Head]
    if isinstance(kind, str):
        make = _class_of(kind, "`kind` is", [*_KINDS, "auto"])
    elif callable(kind) and not isinstance(kind, nn.Module):
        make = kind
    else:
        raise TypeError(f"`kind` is a {type(kind).__name__}; wanted a name, a Head class or a function that makes one")
    return [_checked(make(num_classes, shape), num_classes, shape) for shape in sizes]


def _within(memory: int, num_classes: int, shapes: list[tuple[int, ...]]) -> list[Head]:
    bytes_of = [4 * num_classes * math.prod(shape) for shape in shapes]
    averaged = [
        4 * num_classes * shape[_channel_axis(len(shape), None)] if len(shape) < 4 else None for shape in shapes
    ]
    heads: list[type[Head]] = [ClassMeans] * len(shapes)
    for i in sorted(range(len(shapes)), key=bytes_of.__getitem__, reverse=True):
        smaller = averaged[i]
        if sum(bytes_of) > memory and smaller is not None and smaller < bytes_of[i]:
            heads[i], bytes_of[i] = PooledMeans, smaller
    return [head(num_classes, shape) for head, shape in zip(heads, shapes, strict=True)]


def _checked(head: Head, num_classes: int, shape: tuple[int, ...]) -> Head:
    if not isinstance(head, Head):
        raise TypeError(f"`kind` has made a {type(head).__name__}; wanted a Head")
    if (head.num_classes, head.feature_shape) != (num_classes, shape):
        raise ValueError(
            f"`kind` has made a head for {head.num_classes} classes and features {list(head.feature_shape)}; "
            f"wanted {num_classes} and {list(shape)}"
        )
    return head


def from_config(config: dict[str, Any]) -> Head:
    """An empty head like the one whose config() this is. The module that defines its class must have been imported."""
    if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
        raise ValueError(f"`config` is {config!r}; wanted what Head.config() returns")
    arguments = {key: value for key, value in config.items() if key != "kind"}
    make = _class_of(config["kind"], "`config` is of kind", list(_KINDS))
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"`config` does not fit {make.__name__}: {error}") from None
    return make(**arguments)


def _class_of(kind: str, what: str, known: list[str]) -> type[Head]:
    if kind not in _KINDS:
        raise ValueError(
            f"{what} {kind!r}; known are {', '.join(map(repr, known))}: a Head of your own is known by the name of its "
            "class once the module that defines it has been imported"
        )
    return _KINDS[kind]


# ---- small parts ----------------------------------------------------------------------------------------------------


def total(tensor: Tensor) -> Tensor:
    """The tensor, summed over all processes, in place; as it is where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _leave(
    x: Tensor, log_probs: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, rule: Rule, exit: int
) -> tuple[Tensor, Tensor]:
    if isinstance(rule, Confidence | Entropy):
        return ops.decide(x, log_probs, rule.limit(threshold), ids, out, rule=rule.name, exit=exit)
    leaving = (rule.certainty(log_probs) > threshold) & log_probs.isfinite().any(1)
    leavers, index = ops.compact(log_probs, leaving)
    ops.decide(leavers, leavers, -math.inf, ids[index], out, exit=exit)
    survivors, index = ops.compact(x, ~leaving)
    return survivors, ids[index]


def _pooled(maps: Tensor, cells: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, C * cells] float32. Of torch's ways, the fastest for maps that are large."""
    size = maps.shape[2:]
    if cells == (1, 1):
        return maps.mean((2, 3), dtype=torch.float32)
    if size[0] % cells[0] == 0 and size[1] % cells[1] == 0:
        averages = F.avg_pool2d(maps, (size[0] // cells[0], size[1] // cells[1]))
    else:
        averages = F.adaptive_avg_pool2d(maps, cells)
    return averages.float().flatten(1)


def _taken(size: int, cells: int) -> int:
    """How many rows all cells together take in, as torch's adaptive pooling lays them out."""
    return sum(-(-(i + 1) * size // cells) - i * size // cells for i in range(cells))


def _channel_axis(dims: int, channels: int | None) -> int:
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


def _refuse_non_finite(x: Tensor) -> None:
    if x.is_floating_point() and not all(v.isfinite() for v in x.aminmax()):  # a NaN is both the least and the greatest
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"`x` holds NaN or infinity in sample {bad} of the batch: class means would be spoiled; look for it in the "
            "image or in the network"
        )


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
        return rows.contiguous(memory_format=checks.channels_last_format(rows))
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


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"`{name}` holds {value!r}; wanted whole numbers from 1 up")
    return value.__index__()
