"""The runtime: stage, exit, compaction, next stage, until every sample has its answer.

Nothing at all is computed at an exit whose threshold is +inf. Survivors are moved together, so that nothing is computed
for samples that have left; or, where moving would take longer than that, who has left is carried on for a while, and
what he says later is not heard (see compaction.py). A Cascade knows one batch on its way through the network; it is
made for that batch and thrown away, so that any number of threads may run one network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..heads import Head
from ..heads.base import leave
from ..heads.ensemble import Combination, combined
from ..heads.rules import Rule
from ..ops.types import Decisions
from .compaction_policy import Compaction

__all__ = ["Cascade", "Stage", "final_decisions", "run", "scores", "run_cascade", "write"]

Stage = Callable[[Tensor], Tensor]


def run(
    stages: Iterable[Stage],
    heads: Iterable[Head],
    rule: Rule,
    thresholds: Sequence[float],
    x: Tensor,
    num_classes: int,
    *,
    compaction: Compaction | None = None,
    combination: Combination | None = None,
) -> Decisions:
    """The answers to a batch, in input order.

    A sample leaves at the first exit where its certainty is above the threshold; who never leaves gets the network's
    own answer, with the exit number len(stages) - 1. If all thresholds are +inf that is everybody: log_probs are then
    log_softmax of the network's logits, and carry their gradient.

    compaction: what moving costs; without it survivors are moved at every exit where somebody leaves. Answers are the
    same, up to what the network's own convolutions round differently in batches of another size.
    """
    return run_cascade(
        stages, heads, rule, thresholds, x, num_classes, compaction=compaction, combination=combination
    ).result()


def run_cascade(
    stages: Iterable[Stage],
    heads: Iterable[Head],
    rule: Rule,
    thresholds: Sequence[float],
    x: Tensor,
    num_classes: int,
    *,
    compaction: Compaction | None = None,
    combination: Combination | None = None,
) -> Cascade:
    """`run`, for those who want to know more than the answers."""
    cascade = Cascade(num_classes, compaction, combination)
    *early, last = stages
    for stage, head, threshold, until in zip(early, heads, thresholds, _next_on(thresholds), strict=True):
        x = cascade.exit(stage(x), head, rule, threshold, until)
        if cascade.done:
            return cascade
    cascade.finish(last(x))
    return cascade


def scores(stages: Iterable[Stage], heads: Iterable[Head], x: Tensor) -> Iterator[Tensor]:
    """The log-probabilities [B, K] float32 of every exit, nobody leaving; behind them those of the network itself.

    One after the other, as the batch goes on: stages may overwrite the features that they are given.
    """
    *early, last = stages
    for stage, head in zip(early, heads, strict=True):
        x = stage(x)
        yield head(x)
    yield last(x).log_softmax(1).float()


def _next_on(thresholds: Sequence[float]) -> list[int]:
    """For every exit the number of the next one that is on, or of the end."""
    end = len(thresholds)
    following = [end] * end
    for j in range(end - 1, 0, -1):
        following[j - 1] = j if thresholds[j] < math.inf else following[j]
    return following


class Cascade:
    """One batch on its way through a network: who is left, and what has been answered."""

    __slots__ = (
        "_combination", "_compaction", "_dtype", "_ids", "_left", "_memory", "_next", "_num_classes", "_out", "_paid",
        "_result", "_rows", "_targets",
    )  # fmt: skip

    def __init__(
        self, num_classes: int, compaction: Compaction | None = None, combination: Combination | None = None
    ) -> None:
        self._num_classes = num_classes
        self._compaction = compaction if combination is None else None  # what is remembered moves with the survivors
        self._combination = combination
        self._memory: Tensor | None = None  # the combination's, of all samples of the batch
        self._next = 0  # the number of the exit that comes next
        self._rows = 0  # how many samples there were
        self._left: int | None = None  # how many samples are still there; None as long as nobody could leave
        self._ids: Tensor | None = None  # which one each row of the features is
        self._targets: Tensor | None = None  # where it answers: who is carried along, where nobody reads
        self._paid = 0.0  # for carrying, since survivors were moved last
        self._out: Decisions | None = None
        self._dtype: torch.dtype | None = None
        self._result: Decisions | None = None

    @property
    def done(self) -> bool:
        """Has every sample its answer? Then later layers have nothing to do."""
        return self._result is not None

    def exit(self, x: Tensor, head: Head, rule: Rule, threshold: float, until: int = 0) -> Tensor:
        """Lets the sure ones among x leave; returns the others: x itself if the threshold is +inf, or if it pays to
        carry on with all until the exit `until`, which is the next one that is on."""
        number = self._next
        self._next = number + 1
        if threshold == math.inf:
            return x
        out, ids = self._out, self._ids
        if out is None or ids is None:
            rows, device = x.shape[0], x.device
            out = self._out = Decisions.empty(rows, self._num_classes, device)
            ids = self._ids = self._targets = torch.arange(rows, device=device)
            self._rows = self._left = rows
        if self._combination is not None:
            x, self._ids = self._remembering(self._combination, x, head, rule, threshold, ids, out, number)
            self._targets, self._left = self._ids, x.shape[0]
        elif self.always_compacts(x, head, number, until):
            x, self._ids = head.step(x, threshold, ids, out, rule=rule, exit=number)
            self._targets, self._left = self._ids, x.shape[0]
        else:
            x = self._leave(x, head, rule, threshold, ids, out, number, until)
        if self._left == 0:
            self._result, self._dtype = self._read(out), _dtype_of_log_softmax(x)
        return x

    def _remembering(
        self,
        combination: Combination,
        x: Tensor,
        head: Head,
        rule: Rule,
        threshold: float,
        ids: Tensor,
        out: Decisions,
        number: int,
    ) -> tuple[Tensor, Tensor]:
        known = None if self._memory is None else self._memory[ids]
        answer, certainty, memory = combined(combination, head, rule, x, known, number)
        if self._memory is None:  # the first exit that is on: nobody has left
            self._memory = memory.clone()
        else:
            self._memory[ids] = memory
        return leave(x, answer, certainty, threshold, ids, out, number)

    def always_compacts(self, x: Tensor, head: Head, number: int, until: int) -> bool:
        """Would survivors be moved even if only one sample left?"""
        rows = x.shape[0]
        if self._compaction is None or rows < 2 or type(head).decide is Head.decide:
            return rows == self._left
        return rows == self._left and self._compaction.pays(number, until, rows, rows - 1)

    def _leave(
        self, x: Tensor, head: Head, rule: Rule, threshold: float, ids: Tensor, out: Decisions, number: int, until: int
    ) -> Tensor:
        assert self._compaction is not None and self._targets is not None
        rows = x.shape[0]
        staying = head.decide(x, threshold, self._targets, out, rule=rule, exit=number)
        if len(staying) == rows == self._left:
            return x
        stays = out.exit[ids] < 0  # by the rows that count: who is carried has an answer there
        left = self._left = int(stays.sum())
        if left == 0:
            return x
        if self._compaction.pays(number, until, rows, left, self._paid):
            self._paid = 0.0
            x, kept = ops.compact(x, stays)
            self._ids = self._targets = ids[kept]
        else:
            self._paid += self._compaction.carrying(number, until, rows, left)
            self._make_room_for_carried(out)
            self._targets = torch.where(stays, ids, ids + self._rows)
        return x

    def _make_room_for_carried(self, out: Decisions) -> None:
        """Most batches carry nobody: they are spared the second half, and the copy of the first in the end."""
        if out.exit.shape[0] > self._rows:
            return
        self._out = Decisions.empty(2 * self._rows, self._num_classes, out.exit.device)
        write(self._out, slice(self._rows), out)

    def finish(self, logits: Tensor) -> None:
        """The network's own answer to the samples that are left, under the next exit's number."""
        log_probs = logits.log_softmax(1)
        self._dtype = log_probs.dtype
        out, ids, targets = self._out, self._ids, self._targets
        if self._combination is not None and self._memory is not None and ids is not None:
            logits, _ = self._combination(log_probs.float(), self._memory[ids], self._next, True)
            log_probs = logits
        answers = final_decisions(logits, log_probs, self._next)
        if out is None or targets is None or self._left == self._rows:
            self._result = answers
            return
        write(out, targets, answers)
        self._result = self._read(out)

    def _read(self, out: Decisions) -> Decisions:
        """Without the rows that nobody reads. Copies: a view would keep them."""
        if out.exit.shape[0] == self._rows:
            return out
        return Decisions(*(column[: self._rows].clone() for column in out if column is not None))

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


def final_decisions(logits: Tensor, log_probs: Tensor, number: int) -> Decisions:
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
