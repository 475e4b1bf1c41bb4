"""The base of all heads: what answers at an exit, and learns by gathering statistics in a stream.

A head is shown the training data `passes` times, batch by batch: `update` for every batch, `finish` at the end of each
pass. It holds sums, never samples. Heads that have seen different parts of the data are put together with `merge`, or,
if torch.distributed is initialised, by `finish` itself: every process then calls it, also one that had no sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import validation
from ..ops.types import Decisions
from ..stages.flops import count_flops
from ..utils.distributed import all_reduce_sum
from .rules import Confidence, Entropy, Gate, Rule

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HEAD_REGISTRY", "Head", "in_own_dtype", "leave", "positive", "refuse_non_finite", "all_reduce_sum"]

HEAD_REGISTRY: dict[str, type[Head]] = {}  # all heads there are, by name


class Head(nn.Module):
    """The base of all heads. To write one, say what to gather, what to make of it, and what to answer:

        class LeastSquares(Head):
            def __init__(self, num_classes, feature_shape):
                super().__init__(num_classes, feature_shape)
                size = math.prod(feature_shape)
                self.register_buffer("weight", torch.zeros(size, num_classes))
                self.products = 1e-3 * torch.eye(size)
                self.targets = torch.zeros(size, num_classes)

            def update(self, x, labels, pass_index):
                super().update(x, labels, pass_index)  # checks both, counts the labels
                x = x.flatten(1)
                self.products += x.T @ x
                self.targets.index_add_(1, labels, x.T)

            def finish(self, pass_index):
                super().finish(pass_index)  # `counts` over all processes; after the last pass, `fitted`
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
        HEAD_REGISTRY[cls.kind] = cls
        if "step" in vars(cls) and "decide" not in vars(cls):  # what is inherited may decide otherwise
            cls.decide = Head.decide  # type: ignore[method-assign]

    def __init__(self, num_classes: int, feature_shape: Sequence[int]) -> None:
        super().__init__()
        self.num_classes = positive("num_classes", num_classes)
        self.feature_shape = tuple(positive("feature_shape", size) for size in feature_shape)
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
    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        """Takes in a batch of features [B, *feature_shape] with labels [B], in pass number `pass_index` (from 0)."""
        self._check(x, labels, pass_index)
        refuse_non_finite(x)
        self._count(labels)

    def _check(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        self._expect(pass_index)
        validation.strided("x", x, "a tensor [batch, ...]")
        if x.shape[1:] != self.feature_shape:
            raise ValueError(f"`x` has shape {list(x.shape)}; wanted [batch, {str(list(self.feature_shape))[1:]}")
        if labels.dtype is not torch.int64 or labels.shape != x.shape[:1]:
            raise ValueError(f"`labels` are {labels.dtype} {list(labels.shape)}; wanted int64 [{x.shape[0]}]")
        low, high = (int(v) for v in labels.aminmax()) if len(labels) else (0, 0)
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"`labels` go from {low} to {high}; wanted 0 to {self.num_classes - 1}")

    def _count(self, labels: Tensor) -> None:
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
    def finish(self, pass_index: int) -> None:
        """Closes pass number `pass_index`. Call the base's first: it fills `counts` after pass 0."""
        self._expect(pass_index)
        device = self.counts.device
        tally = torch.zeros_like(self.counts) if self._tally is None else self._tally.to(device)
        all_reduce_sum(tally)
        self._tally, self._seen = None, int(tally.sum())
        if self._seen == 0:
            raise ValueError(
                f"no sample in pass {pass_index}: `update` was not called; the loader may be used up or empty"
            )
        if pass_index == 0:
            self.counts.copy_(tally)
        self._finished = pass_index + 1
        self.fitted = self._finished == self.passes

    def reset(self) -> None:
        """Forgets what an interrupted fit has gathered, so that the next one starts at pass 0."""
        self._tally, self._finished = None, 0

    def _expect(self, pass_index: int) -> None:
        if pass_index == 0 and self._finished == self.passes:
            self.reset()
        if pass_index != self._finished:
            raise RuntimeError(
                f"pass {pass_index} of {type(self).__name__} cannot start: {self._finished} of {self.passes} are "
                "finished; call reset() to start again"
            )

    # ---- answering --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, K] float32. A row of NaN is a sample that must not leave here."""
        raise NotImplementedError(f"{type(self).__name__} needs a forward()")

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For the rule "gate": log-probabilities [B, K] as of forward(), and how sure the head is of each row, [B]
        float32. NaN: this sample must not leave here."""
        log_probs = self(x)
        return log_probs, Gate().certainty(log_probs)

    def score(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """What `step` goes by: the rule's certainty [B] float32 of every sample, and the predictions [B] int64.

        With the rule "confidence" these are the same bits as in `step`; entropies may differ in the last place.
        """
        if isinstance(rule, Gate):
            log_probs, certainty = self.gate(x)
            return certainty, log_probs.argmax(1)
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
        if isinstance(rule, Gate):
            return leave(x, *self.gate(x), threshold, ids, out, exit)
        return _leave(x, self(x), threshold, ids, out, rule, exit)

    def decide(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> Tensor:
        """`step` for who does not want anybody moved: the same bits in `out`, and the ids of the samples that stay.

        The runtime asks only heads whose own way of it is quicker: moving survivors is most of what a step does.
        """
        return self.step(x, threshold, ids, out, rule=rule, exit=exit)[1]

    def flops(self) -> int:
        """Floating-point operations per sample: by default what torch's counter sees in forward(), see cost.py."""
        return count_flops(self, torch.zeros(1, *self.feature_shape, device=self.counts.device))

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


# ---- small parts -----------------------------------------------------------------------------------------------------


def _leave(
    x: Tensor, log_probs: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, rule: Rule, exit: int
) -> tuple[Tensor, Tensor]:
    if isinstance(rule, Confidence | Entropy):
        return ops.decide(x, log_probs, rule.limit(threshold), ids, out, rule=rule.name, exit=exit)
    return leave(x, log_probs, rule.certainty(log_probs), threshold, ids, out, exit)


def leave(
    x: Tensor, log_probs: Tensor, certainty: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, exit: int
) -> tuple[Tensor, Tensor]:
    """What Head.step does, once it is known what each sample is told and how sure that is."""
    leaving = (certainty > threshold) & log_probs.isfinite().any(1)
    leavers, index = ops.compact(log_probs, leaving)
    ops.decide(leavers, leavers, -math.inf, ids[index], out, exit=exit)
    survivors, index = ops.compact(x, ~leaving)
    return survivors, ids[index]


def score_with_rule(scores: ops.ClassScores, rule: Rule) -> tuple[Tensor, Tensor]:
    """What Head.score wants, where the ops have made the scores: confidences are the same bits as in their steps."""
    certainty = scores.confidence if isinstance(rule, Confidence) else rule.certainty(scores.log_probs)
    return certainty, scores.prediction


def in_own_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For nn.Module._apply: fn, but for what it does to dtypes."""

    def moved(tensor: Tensor) -> Tensor:
        there = fn(tensor)
        return there if there.dtype is tensor.dtype else torch.empty_like(there, dtype=tensor.dtype).copy_(tensor)

    return moved


def refuse_non_finite(x: Tensor) -> None:
    if not x.is_floating_point() or x.numel() == 0:
        return
    if not all(v.isfinite() for v in x.aminmax()):  # a NaN is both the least and the greatest
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"`x` holds NaN or infinity in sample {bad} of the batch: all that is learned would be spoiled; look for "
            "it in the image or in the network"
        )


def positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"`{name}` holds {value!r}; wanted whole numbers from 1 up")
    return value.__index__()
