"""The base class of heads.

A head predicts classes at an exit. It is fitted by accumulating statistics over a stream of batches, not by gradients.
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

__all__ = [
    "HEAD_REGISTRY",
    "Head",
    "exit_by_certainty",
    "keep_dtype",
    "positive_int",
    "refuse_non_finite",
    "score_with_rule",
]

HEAD_REGISTRY: dict[str, type[Head]] = {}  # by `kind`


class Head(nn.Module):
    """Base class of heads, which predict classes from the features at an exit.

    `fit` shows a head the training data `passes` times: it calls `update` with every batch of features, and `finish` at
    the end of each pass. A head keeps statistics of the samples, never the samples themselves.

    A head of your own implements four methods:

    - `__init__` registers a buffer for everything that is needed after the fit, and sets the statistics to zero.
    - `update` adds a batch to the statistics. Call `super().update` first.
    - `finish` turns the statistics into buffers. Call `super().finish` first, and `all_reduce_sum` for every statistic,
      which sums it over the processes of torch.distributed.
    - `forward` returns log-probabilities.

    These are needed in some heads only:

    - `reset` sets the statistics back to zero, for heads that are fitted more than once. Call `super().reset`.
    - `merge` adds the statistics of another head. Call `super().merge`.
    - `config` returns the arguments of a constructor that takes more than these two, for saved files.
    - `gate` returns a certainty of the head's own, for the rule "gate".

    Saved files know a head by the name of its class, or by the argument `kind` of the class statement, as in
    `class LeastSquares(Head, kind="least_squares")`. The module that defines the class must be imported before such a
    file is loaded.

    Args:
        num_classes: K, the number of classes.
        feature_shape: Shape of one sample's features, such as (64, 8, 8).

    Attributes:
        kind: The name of the head's class in files, and for `head=` in EarlyExit.
        passes: How many passes over the data a fit needs.
        counts: [K] int64, training samples per class. A class without samples must never be predicted.
        fitted: Whether the head has been fitted.

    Example:
        import math
        import torch
        from e2cm_ext import Head
        from e2cm_ext.heads import all_reduce_sum

        class LeastSquares(Head):
            def __init__(self, num_classes, feature_shape):
                super().__init__(num_classes, feature_shape)
                size = math.prod(feature_shape)
                self.register_buffer("weight", torch.zeros(size, num_classes))
                self.register_buffer("products", torch.zeros(size, size), persistent=False)
                self.register_buffer("targets", torch.zeros(size, num_classes), persistent=False)

            def reset(self):
                super().reset()
                self.products.zero_()
                self.targets.zero_()

            def update(self, x, labels, pass_index):
                super().update(x, labels, pass_index)  # checks x and labels, and counts the labels
                x = x.flatten(1)
                self.products += x.T @ x
                self.targets.index_add_(1, labels, x.T)

            def finish(self, pass_index):
                super().finish(pass_index)  # sets `counts`, and after the last pass `fitted`
                products, targets = all_reduce_sum(self.products), all_reduce_sum(self.targets)
                products.diagonal().add_(1e-3)
                self.weight.copy_(torch.linalg.solve(products, targets))

            def forward(self, x):
                return (x.flatten(1) @ self.weight).log_softmax(1)
    """

    kind: ClassVar[str] = "head"
    passes: int = 1
    counts: Tensor
    fitted: bool

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind or cls.__name__
        HEAD_REGISTRY[cls.kind] = cls
        if "step" in vars(cls) and "decide" not in vars(cls):  # an inherited `decide` might not agree with this `step`
            cls.decide = Head.decide  # type: ignore[method-assign]

    def __init__(self, num_classes: int, feature_shape: Sequence[int]) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)
        self.feature_shape = tuple(positive_int("feature_shape", size) for size in feature_shape)
        if not self.feature_shape:
            raise ValueError("`feature_shape` is empty; wanted the shape of one sample's features, such as (64, 8, 8)")
        self.register_buffer("counts", torch.zeros(self.num_classes, dtype=torch.int64))
        self.fitted = False
        self._finished_passes = 0  # of the current fit
        self._label_counts: Tensor | None = None  # of the current pass
        self._pass_samples = 0  # of the last finished pass, over all processes

    # ---- fitting ----------------------------------------------------------------------------------------------------

    # Not in inference mode, here and below: tensors made in it could not be written to outside of it.
    @torch.inference_mode(False)
    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        """Add a batch to the statistics.

        The base class checks the arguments and counts the labels.

        Args:
            x: Features [B, *feature_shape].
            labels: [B] int64.
            pass_index: The pass over the data, from 0.

        Raises:
            ValueError: The batch does not fit this head, or holds NaN or infinity.
            RuntimeError: Passes are not in order.
        """
        self._check_batch(x, labels, pass_index)
        refuse_non_finite(x)
        self._count_labels(labels)

    def _check_batch(self, x: Tensor, labels: Tensor, pass_index: int) -> None:
        self._check_pass(pass_index)
        validation.strided("x", x, "a tensor [batch, ...]")
        if x.shape[1:] != self.feature_shape:
            raise ValueError(f"`x` has shape {list(x.shape)}; wanted [batch, {str(list(self.feature_shape))[1:]}")
        if labels.dtype is not torch.int64 or labels.shape != x.shape[:1]:
            raise ValueError(f"`labels` are {labels.dtype} {list(labels.shape)}; wanted int64 [{x.shape[0]}]")
        low, high = (int(v) for v in labels.aminmax()) if len(labels) else (0, 0)
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"`labels` go from {low} to {high}; wanted 0 to {self.num_classes - 1}")

    def _check_pass(self, pass_index: int) -> None:
        if pass_index == 0 and self._finished_passes == self.passes:
            self.reset()
        if pass_index != self._finished_passes:
            raise RuntimeError(
                f"pass {pass_index} of {type(self).__name__} cannot start: {self._finished_passes} of {self.passes} "
                "are finished; call reset() to start again"
            )

    def _count_labels(self, labels: Tensor) -> None:
        counts = labels.bincount(minlength=self.num_classes)
        self._label_counts = counts if self._label_counts is None else self._label_counts.add_(counts)

    @torch.inference_mode(False)
    def merge(self, other: Self) -> None:
        """Add the statistics that another head has accumulated in the same pass, on other samples.

        Args:
            other: A head of the same class and configuration; it is not changed.

        Raises:
            ValueError: `other` is another kind of head, or configured otherwise.
            RuntimeError: `other` is in another pass.
        """
        if type(other) is not type(self) or not self._has_same_config(other):
            raise ValueError(f"`other` is {other}; wanted another {self}")
        if other._finished_passes != self._finished_passes:
            raise RuntimeError(
                f"`other` is in pass {other._finished_passes}, this head in pass {self._finished_passes}"
            )
        if other._label_counts is not None:
            counts = other._label_counts.to(self.counts.device, copy=True)
            self._label_counts = counts if self._label_counts is None else self._label_counts.add_(counts)

    @torch.inference_mode(False)
    def finish(self, pass_index: int) -> None:
        """End a pass over the data.

        The base class sums the label counts over all processes. It sets `counts` after pass 0, and `fitted` after the
        last pass. Under torch.distributed every process must call `finish`, also one without samples.

        Args:
            pass_index: The pass over the data, from 0.

        Raises:
            ValueError: There was no sample in this pass.
            RuntimeError: Passes are not in order.
        """
        self._check_pass(pass_index)
        device = self.counts.device
        counts = torch.zeros_like(self.counts) if self._label_counts is None else self._label_counts.to(device)
        all_reduce_sum(counts)
        self._label_counts, self._pass_samples = None, int(counts.sum())
        if self._pass_samples == 0:
            raise ValueError(
                f"no sample in pass {pass_index}: `update` was not called; the loader may be used up or empty"
            )
        if pass_index == 0:
            self.counts.copy_(counts)
        self._finished_passes = pass_index + 1
        self.fitted = self._finished_passes == self.passes

    def reset(self) -> None:
        """Drop the statistics, so that the next fit starts at pass 0. What was fitted before stays."""
        self._label_counts, self._finished_passes = None, 0

    # ---- inference --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Predict classes.

        Args:
            x: Features [B, *feature_shape], in the dtype of the network.

        Returns:
            Log-probabilities [B, K] float32. A row of NaN keeps its sample from leaving.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a forward()")

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict classes, and how certain the head is, for the rule "gate".

        Args:
            x: Features [B, *feature_shape].

        Returns:
            Log-probabilities [B, K] float32, and the certainty [B] float32: by default the largest probability. A
            certainty of NaN keeps its sample from leaving.
        """
        log_probs = self(x)
        return log_probs, Gate().certainty(log_probs)

    def score(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """Compute what `step` decides by, for all samples.

        With the rule "confidence" the certainties are the same bits as in `step`; entropies may differ in the last
        place.

        Args:
            x: Features [B, *feature_shape].
            rule: The rule.

        Returns:
            The certainty [B] float32 and the predictions [B] int64.
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
        """Let the samples leave whose certainty is above the threshold, and move the others together.

        Args:
            x: Features [B, *feature_shape].
            threshold: Of the certainty.
            ids: [B] int64, the samples' rows in `out`.
            out: Decisions of the whole batch, into which those of the leaving samples are written.
            rule: The rule.
            exit: The number of this exit, which is written, too.

        Returns:
            The features and the ids of the survivors, in their order.
        """
        if isinstance(rule, Gate):
            return exit_by_certainty(x, *self.gate(x), threshold, ids, out, exit)
        log_probs = self(x)
        if isinstance(rule, Confidence | Entropy):
            return ops.decide(x, log_probs, rule.limit(threshold), ids, out, rule=rule.name, exit=exit)
        return exit_by_certainty(x, log_probs, rule.certainty(log_probs), threshold, ids, out, exit)

    def decide(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> Tensor:
        """Do what `step` does without moving the survivors' features.

        The runtime calls it only for heads that override it, with something faster than `step`.

        Args:
            x: As in `step`.
            threshold: As in `step`.
            ids: As in `step`.
            out: As in `step`; the same bits are written.
            rule: As in `step`.
            exit: As in `step`.

        Returns:
            The ids of the survivors, in their order.
        """
        return self.step(x, threshold, ids, out, rule=rule, exit=exit)[1]

    def flops(self) -> int:
        """Return the floating-point operations per sample: by default what torch's counter finds in `forward`."""
        return count_flops(self, torch.zeros(1, *self.feature_shape, device=self.counts.device))

    # ---- saving -----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Return the arguments of the constructor and the kind, as JSON can hold them.

        `e2cm_ext.heads.from_config` makes an unfitted head of it.
        """
        return {"kind": self.kind, "num_classes": self.num_classes, "feature_shape": list(self.feature_shape)}

    def _has_same_config(self, other: Head) -> bool:
        mine, theirs = ({k: v for k, v in head.config().items() if k != "channels_last"} for head in (self, other))
        return mine == theirs

    def get_extra_state(self) -> Tensor:
        """Return `fitted` for the state_dict."""
        return torch.tensor(self.fitted)

    def set_extra_state(self, state: Tensor) -> None:
        """Take `fitted` from a state_dict."""
        self.fitted = bool(state)
        self.reset()

    def extra_repr(self) -> str:
        """Show the configuration."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items() if key != "kind")


# ---- helpers of heads ------------------------------------------------------------------------------------------------


def exit_by_certainty(
    x: Tensor, log_probs: Tensor, certainty: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, exit: int
) -> tuple[Tensor, Tensor]:
    """Do what `Head.step` does, given the log-probabilities and the certainty of every sample."""
    leaving = (certainty > threshold) & log_probs.isfinite().any(1)
    leaving_log_probs, index = ops.compact(log_probs, leaving)
    ops.decide(leaving_log_probs, leaving_log_probs, -math.inf, ids[index], out, exit=exit)
    survivors, index = ops.compact(x, ~leaving)
    return survivors, ids[index]


def score_with_rule(scores: ops.ClassScores, rule: Rule) -> tuple[Tensor, Tensor]:
    """Do what `Head.score` does, given the scores of an op: confidences are the same bits as in its exit step."""
    certainty = scores.confidence if isinstance(rule, Confidence) else rule.certainty(scores.log_probs)
    return certainty, scores.prediction


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function of nn.Module._apply so that tensors are moved, but keep their dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype is tensor.dtype else torch.empty_like(moved, dtype=tensor.dtype).copy_(tensor)

    return move


def refuse_non_finite(x: Tensor) -> None:
    """Raise ValueError if a batch holds NaN or infinity."""
    if not x.is_floating_point() or x.numel() == 0:
        return
    if not all(v.isfinite() for v in x.aminmax()):  # aminmax returns NaN if there is one
        sample = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"`x` holds NaN or infinity in sample {sample} of the batch, which would spoil all statistics; look for "
            "it in the image or in the network"
        )


def positive_int(name: str, value: int) -> int:
    """Return `value` as an int; raise ValueError if it is not a whole number from 1 up."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"`{name}` holds {value!r}; wanted whole numbers from 1 up")
    return value.__index__()
