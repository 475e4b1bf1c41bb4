"""The cascade: stage, exit, compaction, next stage, until every sample has its answer.

Nothing is computed at an exit whose threshold is +inf. At an active exit survivors are moved together, so that later
stages do not compute exited samples. Where moving them costs more than that saves, exited rows stay in the batch for a
while, and their later outputs are discarded: see compaction_policy.py. A Cascade is made for one batch and holds all of
its state, so any number of threads may run one network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..heads import Head
from ..heads.base import exit_by_certainty
from ..heads.ensemble import Combination, combine_at_exit
from ..heads.rules import Rule
from ..ops.types import Decisions
from .compaction_policy import CompactionPolicy
from .segments import Stage, next_active_exits

__all__ = ["Cascade", "Stage", "final_decisions", "run", "run_cascade", "scores", "write_decisions"]


def run(
    stages: Iterable[Stage],
    heads: Iterable[Head],
    rule: Rule,
    thresholds: Sequence[float],
    x: Tensor,
    num_classes: int,
    *,
    compaction: CompactionPolicy | None = None,
    combination: Combination | None = None,
) -> Decisions:
    """Run a batch through a network with exits.

    A sample leaves at the first exit where its certainty is above the threshold. Samples that never leave get the
    network's own answer, with the exit number M. If all thresholds are +inf, log_probs are log_softmax of the network's
    logits and carry their gradient.

    Args:
        stages: The M+1 stages.
        heads: The M heads.
        rule: Turns scores into a certainty.
        thresholds: [M]; +inf: the exit never fires, and its head is not computed.
        x: A batch, as the first stage takes it.
        num_classes: Number of classes.
        compaction: When survivors are moved together; None: at every active exit at which a sample leaves. Decisions
            are the same, up to what the network's own layers round differently in batches of another size.
        combination: How exits answer together; None: each answers for itself.

    Returns:
        Decisions in input order.
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
    compaction: CompactionPolicy | None = None,
    combination: Combination | None = None,
) -> Cascade:
    """Run a batch as `run` does, and return the finished cascade, whose log_probs() have the network's dtype."""
    cascade = Cascade(num_classes, compaction, combination)
    *early, last = stages
    exits = zip(early, heads, thresholds, next_active_exits(thresholds), strict=True)
    for stage, head, threshold, next_active_exit in exits:
        x = cascade.exit(stage(x), head, rule, threshold, next_active_exit)
        if cascade.done:
            return cascade
    cascade.finish(last(x))
    return cascade


def scores(stages: Iterable[Stage], heads: Iterable[Head], x: Tensor) -> Iterator[Tensor]:
    """Yield the log-probabilities [B, K] float32 of every exit, then those of the network itself. No sample leaves.

    They are computed one after the other as the batch goes on, since a stage may overwrite the features it is given.
    """
    *early, last = stages
    for stage, head in zip(early, heads, strict=True):
        x = stage(x)
        yield head(x)
    yield last(x).log_softmax(1).float()


class Cascade:
    """One batch on its way through a network: which samples survive, and the decisions about the others.

    Args:
        num_classes: Number of classes.
        compaction: When survivors are moved together; None: at every active exit at which a sample leaves.
        combination: How exits answer together. Its memory moves with the survivors, so `compaction` is not asked.
    """

    __slots__ = (
        "_batch_size", "_carry_cost", "_combination", "_compaction", "_dtype", "_ids", "_memory", "_next_exit",
        "_num_classes", "_out", "_out_rows", "_result", "_survivors",
    )  # fmt: skip
    # Set at the first active exit:
    _ids: Tensor  # which sample each row of the features is
    _out_rows: Tensor  # the row of `_out` for each row of the features: `_ids`, but unread rows for exited samples

    def __init__(
        self, num_classes: int, compaction: CompactionPolicy | None = None, combination: Combination | None = None
    ) -> None:
        self._num_classes = num_classes
        self._compaction = compaction if combination is None else None
        self._combination = combination
        self._memory: Tensor | None = None  # the combination's, for all samples of the batch
        self._next_exit = 0  # number of the exit that comes next
        self._batch_size = 0  # samples, known from the first active exit on
        self._survivors: int | None = None  # how many of them have not left; None before the first active exit
        self._out: Decisions | None = None
        self._carry_cost = 0.0  # of exited rows since the last compaction
        self._dtype: torch.dtype | None = None  # of log_softmax of the network's logits
        self._result: Decisions | None = None

    @property
    def done(self) -> bool:
        """Whether every sample has its answer, so that later layers have nothing to do."""
        return self._result is not None

    def exit(self, x: Tensor, head: Head, rule: Rule, threshold: float, next_active_exit: int = 0) -> Tensor:
        """Let samples leave at the next exit.

        Args:
            x: Features of the batch as the last call returned it.
            head: The head of this exit.
            rule: Turns scores into a certainty.
            threshold: Samples leave above it; +inf: nothing is computed.
            next_active_exit: For the compaction policy: the number of the next exit that can fire.

        Returns:
            The survivors' features; x itself if the threshold is +inf, or if exited rows are carried on.
        """
        number = self._next_exit
        self._next_exit = number + 1
        if threshold == math.inf:
            return x
        out = self._out
        if out is None:
            rows, device = x.shape[0], x.device
            out = self._out = Decisions.empty(rows, self._num_classes, device)
            self._ids = self._out_rows = torch.arange(rows, device=device)
            self._batch_size = self._survivors = rows
        if self._combination is not None:
            x, self._ids = self._combined_step(self._combination, x, head, rule, threshold, out, number)
            self._out_rows, self._survivors = self._ids, x.shape[0]
        elif self._always_compacts(x, head, number, next_active_exit):
            x, self._ids = head.step(x, threshold, self._ids, out, rule=rule, exit=number)
            self._out_rows, self._survivors = self._ids, x.shape[0]
        else:
            x = self._decide(x, head, rule, threshold, out, number, next_active_exit)
        if self._survivors == 0:
            self._result, self._dtype = self._read(out), _dtype_of_log_softmax(x)
        return x

    def _combined_step(
        self, combination: Combination, x: Tensor, head: Head, rule: Rule, threshold: float, out: Decisions, number: int
    ) -> tuple[Tensor, Tensor]:
        """Head.step, for exits that answer together: the survivors' features and ids."""
        ids = self._ids
        memory = None if self._memory is None else self._memory[ids]
        log_probs, certainty, memory = combine_at_exit(combination, head, rule, x, memory, number)
        if self._memory is None:  # the first active exit: all samples are there
            self._memory = memory.clone()
        else:
            self._memory[ids] = memory
        return exit_by_certainty(x, log_probs, certainty, threshold, ids, out, number)

    def _always_compacts(self, x: Tensor, head: Head, number: int, next_active_exit: int) -> bool:
        """Whether the batch is compacted here even if only one sample leaves."""
        rows = x.shape[0]
        if self._compaction is None or rows < 2 or type(head).decide is Head.decide:
            return rows == self._survivors
        return rows == self._survivors and self._compaction.should_compact(number, next_active_exit, rows, rows - 1)

    def _decide(
        self, x: Tensor, head: Head, rule: Rule, threshold: float, out: Decisions, number: int, next_active_exit: int
    ) -> Tensor:
        """Let samples leave, then ask the policy whether to compact."""
        assert self._compaction is not None
        rows, ids = x.shape[0], self._ids
        staying = head.decide(x, threshold, self._out_rows, out, rule=rule, exit=number)
        if len(staying) == rows == self._survivors:
            return x
        survives = out.exit[ids] < 0  # also tells survivors from rows that have exited before and were carried on
        survivors = self._survivors = len(staying) if rows == self._survivors else int(survives.sum())
        if survivors == 0:
            return x
        if self._compaction.should_compact(number, next_active_exit, rows, survivors, self._carry_cost):
            self._carry_cost = 0.0
            x, kept = ops.compact(x, survives)
            self._ids = self._out_rows = ids[kept]
        else:
            self._carry_cost += self._compaction.carry_cost(number, next_active_exit, rows, survivors)
            self._make_room_for_exited(out)
            self._out_rows = torch.where(survives, ids, ids + self._batch_size)
        return x

    def _make_room_for_exited(self, out: Decisions) -> None:
        """Double `_out`: the later outputs of exited rows go to the second half. Few batches need that."""
        if out.exit.shape[0] > self._batch_size:
            return
        self._out = Decisions.empty(2 * self._batch_size, self._num_classes, out.exit.device)
        write_decisions(self._out, slice(self._batch_size), out)

    def finish(self, logits: Tensor) -> None:
        """Give the samples that are left the network's own answer, with the number of the next exit."""
        log_probs = logits.log_softmax(1)
        self._dtype = log_probs.dtype
        out = self._out
        if self._combination is not None and self._memory is not None:
            logits, _ = self._combination(log_probs.float(), self._memory[self._ids], self._next_exit, True)
            log_probs = logits
        decisions = final_decisions(logits, log_probs, self._next_exit)
        if out is None or self._survivors == self._batch_size:
            self._result = decisions
            return
        write_decisions(out, self._out_rows, decisions)
        self._result = self._read(out)

    def _read(self, out: Decisions) -> Decisions:
        """The decisions about the batch, without the half for exited rows. Copies: a view would keep that half."""
        if out.exit.shape[0] == self._batch_size:
            return out
        return Decisions(*(column[: self._batch_size].clone() for column in out if column is not None))

    def log_probs(self) -> Tensor:
        """Log-probabilities of the result, in the dtype that log_softmax of the network's logits has or would have."""
        log_probs = self.result().log_probs
        assert log_probs is not None
        return log_probs.to(self._dtype)

    def result(self) -> Decisions:
        """Return the decisions in input order.

        Raises:
            RuntimeError: Some samples have no answer yet.
        """
        if self._result is None:
            count = "all" if self._survivors is None else self._survivors
            raise RuntimeError(f"{count} samples have no answer yet; it takes their logits to give them one")
        return self._result


def final_decisions(logits: Tensor, log_probs: Tensor, exit: int) -> Decisions:
    """The network's own decisions.

    Args:
        logits: [B, K].
        log_probs: log_softmax of the logits, in any dtype.
        exit: The exit number to give them: M, the number of exits.
    """
    # Of the logits: rounding can make equal in log_probs what is not.
    prediction = logits.detach().argmax(1)
    log_probs = log_probs.float()
    confidence = log_probs.detach().amax(1).exp()
    return Decisions(prediction, confidence, torch.full_like(prediction, exit), log_probs)


def write_decisions(out: Decisions, rows: Tensor | slice, decisions: Decisions) -> None:
    """Write decisions into these rows of `out`."""
    for column, values in zip(out, decisions, strict=True):
        assert column is not None and values is not None
        column[rows] = values.detach()


def _dtype_of_log_softmax(x: Tensor) -> torch.dtype:
    """Under autocast logits come from a linear layer; what log_softmax makes of them differs from device to device."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x.dtype
    return x.new_empty((0, 1), dtype=torch.get_autocast_dtype(kind)).log_softmax(1).dtype
