"""The runtime: stage, exit, compaction, next stage, until every sample has its answer.

Nothing is computed for samples that have left, and nothing at all at an exit whose threshold is +inf. A Cascade knows
one batch on its way through the network; it is made for that batch and thrown away, so that any number of threads may
run one network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .combination import Combination, combined
from .decisions import Decisions
from .head import leave
from .heads import Head
from .rules import Rule
from .stages import Stages

__all__ = ["Cascade", "own_answers", "run", "scores", "through", "write"]


def run(
    stages: Stages,
    heads: Iterable[Head],
    rule: Rule,
    thresholds: Sequence[float],
    x: Tensor,
    num_classes: int,
    combination: Combination | None = None,
) -> Decisions:
    """The answers to a batch, in input order.

    A sample leaves at the first exit where its certainty is above the threshold; who never leaves gets the network's
    own answer, with the exit number len(stages) - 1. If all thresholds are +inf that is everybody: log_probs are then
    log_softmax of the network's logits, and carry their gradient.
    """
    return through(stages, heads, rule, thresholds, x, num_classes, combination).result()


def through(
    stages: Stages,
    heads: Iterable[Head],
    rule: Rule,
    thresholds: Sequence[float],
    x: Tensor,
    num_classes: int,
    combination: Combination | None = None,
) -> Cascade:
    """`run`, for those who want to know more than the answers."""
    cascade = Cascade(num_classes, combination)
    *early, last = stages
    for stage, head, threshold in zip(early, heads, thresholds, strict=True):
        x = cascade.exit(stage(x), head, rule, threshold)
        if cascade.done:
            return cascade
    cascade.finish(last(x))
    return cascade


def scores(stages: Stages, heads: Iterable[Head], x: Tensor) -> Iterator[Tensor]:
    """The log-probabilities [B, K] float32 of every exit, nobody leaving; behind them those of the network itself.

    One after the other, as the batch goes on: stages may overwrite the features that they are given.
    """
    *early, last = stages
    for stage, head in zip(early, heads, strict=True):
        x = stage(x)
        yield head(x)
    yield last(x).log_softmax(1).float()


class Cascade:
    """One batch on its way through a network: who is left, and what has been answered."""

    __slots__ = ("_combination", "_dtype", "_ids", "_left", "_memory", "_next", "_num_classes", "_out", "_result")

    def __init__(self, num_classes: int, combination: Combination | None = None) -> None:
        self._num_classes = num_classes
        self._combination = combination
        self._memory: Tensor | None = None  # the combination's, of all samples of the batch
        self._next = 0  # the number of the exit that comes next
        self._left: int | None = None  # how many samples are still there; None as long as nobody could leave
        self._ids: Tensor | None = None  # which ones
        self._out: Decisions | None = None
        self._dtype: torch.dtype | None = None
        self._result: Decisions | None = None

    @property
    def done(self) -> bool:
        """Has every sample its answer? Then later layers have nothing to do."""
        return self._result is not None

    def exit(self, x: Tensor, head: Head, rule: Rule, threshold: float) -> Tensor:
        """Lets the sure ones among x leave; returns the others: x itself if the threshold is +inf."""
        number = self._next
        self._next = number + 1
        if threshold == math.inf:
            return x
        out, ids = self._out, self._ids
        if out is None or ids is None:
            rows, device = x.shape[0], x.device
            out = self._out = Decisions.empty(rows, self._num_classes, device)
            ids = torch.arange(rows, device=device)
        if self._combination is None:
            x, self._ids = head.step(x, threshold, ids, out, rule=rule, exit=number)
        else:
            known = None if self._memory is None else self._memory[ids]
            answer, certainty, memory = combined(self._combination, head, rule, x, known, number)
            if self._memory is None:  # the first exit that is on: nobody has left
                self._memory = memory.clone()
            else:
                self._memory[ids] = memory
            x, self._ids = leave(x, answer, certainty, threshold, ids, out, number)
        self._left = x.shape[0]
        if self._left == 0:
            self._result, self._dtype = out, _dtype_of_log_softmax(x)
        return x

    def finish(self, logits: Tensor) -> None:
        """The network's own answer to the samples that are left, under the next exit's number."""
        log_probs = logits.log_softmax(1)
        self._dtype = log_probs.dtype
        out, ids = self._out, self._ids
        if self._combination is not None and self._memory is not None and ids is not None:
            logits, _ = self._combination(log_probs.float(), self._memory[ids], self._next, True)
            log_probs = logits
        answers = own_answers(logits, log_probs, self._next)
        if out is None or ids is None or self._left == out.prediction.shape[0]:
            self._result = answers
            return
        write(out, ids, answers)
        self._result = out

    def log_probs(self) -> Tensor:
        """Those of the result, in the dtype of log_softmax of the network's logits, or what it would have been."""
        log_probs = self.result().log_probs
        assert log_probs is not None
        return log_probs.to(self._dtype)

    def result(self) -> Decisions:
        """The answers, in input order."""
        if self._result is None:
            left = "all" if self._left is None else self._left
            raise RuntimeError(f"{left} samples have no answer yet; it takes their logits to give them one")
        return self._result


def own_answers(logits: Tensor, log_probs: Tensor, number: int) -> Decisions:
    """The network's own, under an exit number. log_probs: log_softmax of the logits, in whatever dtype it has."""
    # Of the logits: rounding can make equal in log_probs what is not.
    prediction = logits.detach().argmax(1)
    log_probs = log_probs.float()
    confidence = log_probs.detach().amax(1).exp()
    return Decisions(prediction, confidence, torch.full_like(prediction, number), log_probs)


def write(out: Decisions, ids: Tensor | slice, answers: Decisions) -> None:
    """Answers into the rows of `out` that ids name."""
    for column, values in zip(out, answers, strict=True):
        assert column is not None and values is not None
        column[ids] = values.detach()


def _dtype_of_log_softmax(x: Tensor) -> torch.dtype:
    """Under autocast logits come from a linear layer; what log_softmax makes of them differs from device to device."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x.dtype
    return x.new_empty((0, 1), dtype=torch.get_autocast_dtype(kind)).log_softmax(1).dtype
