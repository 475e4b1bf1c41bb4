"""The runtime for many batches: survivors of several batches are pooled, so that late stages run at nearly full batch.

A cascade runs a batch to its end, however few of its samples are left. Here samples wait in a pool before each segment
of the network (the stages up to the next active exit) until they are more than half a batch, whatever batches they came
with. The deepest pool that has enough runs first, so no pool is filled further before it has passed on what it can.
Whole tensors go from pool to pool: nothing is done per sample, and only what has waited is copied once more than in a
cascade.

Half a batch, not a full one: batches of 64 and of 128 take the same time per sample, so waiting for the other half
gains nothing, but nearly all features would be copied, where now those of large batches go straight on.

Each pool is first in, first out. So samples in a deeper pool are older than those in any other, and the oldest sample
without an answer is the first one in the deepest pool: the answers to all before it can be returned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..heads import Head
from ..heads.rules import Rule
from ..ops.types import Decisions
from .cascade import final_decisions, write_decisions
from .segments import Stage, segments

__all__ = ["Stream", "check_batch_size"]

# Batches' worth of samples that a sample waits for, if the caller does not say: at most one batch per segment in so
# many is then run too small.
_DEFAULT_MAX_WAIT = 64
T = TypeVar("T")


def check_batch_size(batch_size: int) -> None:
    """Refuse what is not a positive int."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; wanted a whole number from 1 on")


class Stream:
    """The batches of one loader on their way through a network, see EarlyExit.predict_stream.

    Args:
        stages: The M+1 stages.
        heads: The M heads.
        rule: Turns scores into a certainty.
        thresholds: [M]; +inf: the exit never fires.
        num_classes: Number of classes.
        batch_size: The most samples that a segment runs at once; None: the size of the first batch.
        max_wait: After so many further batches a sample's segment runs, however few samples wait with it; None: after
            64 times `batch_size` samples.
        before_run: Called before a segment runs; raises if the network must not be run now.
    """

    def __init__(
        self,
        stages: Iterable[Stage],
        heads: Iterable[Head],
        rule: Rule,
        thresholds: Sequence[float],
        num_classes: int,
        *,
        batch_size: int | None = None,
        max_wait: int | None = None,
        before_run: Callable[[], None] = lambda: None,
    ) -> None:
        if batch_size is not None:
            check_batch_size(batch_size)
        if max_wait is not None and (isinstance(max_wait, bool) or not isinstance(max_wait, int) or max_wait < 0):
            raise ValueError(f"`max_wait` is {max_wait!r}; wanted a whole number of batches, 0 or more")
        self._segments = segments(stages, heads, thresholds)
        self._pools = [_Pool() for _ in self._segments]
        self._rule, self._num_classes, self._before_run = rule, num_classes, before_run
        self._batch_size = batch_size or 0  # 0: that of the first batch, which has not come yet
        self._max_wait = max_wait
        # Samples are numbered as they come.
        self._received = 0  # how many have come
        self._returned = 0  # the answers to all before this one have been returned
        self._batch_ends: deque[int] = deque()  # for batches not returned: the number behind the last sample
        self._out = Decisions.empty(0, num_classes)
        self._first_row = 0  # the number of the sample in the first row of `_out`

    # ---- from the first batch to the last ---------------------------------------------------------------------------

    def in_order(self, batches: Iterator[Tensor]) -> Generator[Decisions, None, None]:
        """Yield the answers to every batch, in the order of the batches."""
        return self._run_all(batches, self._pop_batches)

    def completed(self, batches: Iterator[Tensor]) -> Generator[tuple[Tensor, Decisions], None, None]:
        """Yield all answers as soon as they are there: the numbers of some samples, and the answers to these."""
        return self._run_all(batches, self._pop_answers)

    def _run_all(self, batches: Iterator[Tensor], pop: Callable[[], list[T]]) -> Generator[T, None, None]:
        inference = torch.is_inference_mode_enabled()

        def after(step: Callable[..., None], *arguments: Any) -> list[T]:
            # Features that wait must stay usable, whichever mode the caller is in when asking for more.
            with torch.inference_mode(inference), torch.no_grad():
                step(*arguments)
                return pop()

        while True:
            try:
                images = next(batches)
            except Exception as error:
                # The end, or a loader that failed: what it had given before is answered first.
                yield from after(self._run_until, self._received)
                if isinstance(error, StopIteration):
                    return
                raise
            yield from after(self._receive, images)

    # ---- in ---------------------------------------------------------------------------------------------------------

    def _receive(self, images: Tensor) -> None:
        """Take one more batch; run the segments that have enough samples then, or whose samples waited long enough."""
        count = images.shape[0]
        self._make_room(count, images.device)
        numbers = torch.arange(self._received, self._received + count, device=images.device)
        self._received += count
        self._batch_ends.append(self._received)
        self._batch_size = self._batch_size or count
        self._pools[0].add(images, numbers)
        self._run_until(self._overdue())

    def _overdue(self) -> int:
        """Samples before this one must not wait until one more batch is taken."""
        if self._max_wait is None:
            return self._received - _DEFAULT_MAX_WAIT * self._batch_size
        return self._batch_ends[-1 - self._max_wait] if len(self._batch_ends) > self._max_wait else 0

    def _make_room(self, count: int, device: torch.device) -> None:
        """Make room for the answers to so many more samples, dropping answers that have been returned."""
        if self._received + count - self._first_row <= self._out.exit.shape[0]:
            return
        kept = self._rows(self._returned, self._received)
        waiting = self._received - self._returned
        out = Decisions.empty(2 * (waiting + count), self._num_classes, device)
        write_decisions(out, slice(waiting), Decisions(*(column[kept] for column in self._out if column is not None)))
        self._out, self._first_row = out, self._returned

    # ---- through ----------------------------------------------------------------------------------------------------

    def _run_until(self, overdue: int) -> None:
        """Run until no pool has enough samples to run, and none holds a sample with a number below `overdue`."""
        while (j := self._next_segment(overdue)) is not None:
            self._run(j)

    def _next_segment(self, overdue: int) -> int | None:
        """The deepest pool with enough samples. Of those that must run with fewer, the shallowest: its survivors join
        the next."""
        half = self._batch_size // 2
        for j in reversed(range(len(self._pools))):
            if self._pools[j].count > half:
                return j
        if self._first_unanswered() >= overdue:
            return None
        return next(j for j, pool in enumerate(self._pools) if pool.count and pool.first < overdue)

    def _run(self, j: int) -> None:
        self._before_run()
        segment = self._segments[j]
        x, numbers = self._pools[j].take(self._batch_size)
        for stage in segment.stages:
            x = stage(x)
        ids = numbers - self._first_row
        if segment.head is None:
            write_decisions(self._out, ids, final_decisions(x, x.log_softmax(1), segment.exit))
        else:
            x, ids = segment.head.step(x, segment.threshold, ids, self._out, rule=self._rule, exit=segment.exit)
            self._pools[j + 1].add(x, ids + self._first_row)

    # ---- out --------------------------------------------------------------------------------------------------------

    def _pop_batches(self) -> list[Decisions]:
        """The batches that are complete, and all before them, each once."""
        start, sizes = self._returned, self._mark_returned(self._first_unanswered())
        # One copy for all of them: a view of self._out would keep the whole of it.
        rows = self._rows(start, self._returned)
        parts = (torch.split(column[rows].clone(), sizes) for column in self._out if column is not None)
        return [Decisions(*columns) for columns in zip(*parts, strict=True)] if sizes else []

    def _pop_answers(self) -> list[tuple[Tensor, Decisions]]:
        """All answers that have not been returned, if there are any."""
        exit = self._out.exit[self._rows(self._returned, self._received)]
        answered = (exit >= 0).nonzero()[:, 0]
        numbers = answered + self._returned
        rows = numbers - self._first_row
        answers = Decisions(*(column[rows] for column in self._out if column is not None))
        exit[answered] = -1  # as in a row that was not written: it is not found again
        self._mark_returned(self._first_unanswered())
        return [(numbers, answers)] if len(numbers) else []

    def _mark_returned(self, end: int) -> list[int]:
        """Count the batches whose samples are all before this one as returned; their sizes."""
        sizes = []
        while self._batch_ends and self._batch_ends[0] <= end:
            batch_end = self._batch_ends.popleft()
            sizes.append(batch_end - self._returned)
            self._returned = batch_end
        return sizes

    def _first_unanswered(self) -> int:
        """All samples before this one have their answers."""
        for pool in reversed(self._pools):
            if pool.count:
                return pool.first
        return self._received

    def _rows(self, start: int, end: int) -> slice:
        """Where `_out` holds the samples with these numbers."""
        return slice(start - self._first_row, end - self._first_row)


class _Pool:
    """Samples that wait before a segment, in input order, and their numbers; in parts, as they came."""

    def __init__(self) -> None:
        self._parts: deque[tuple[Tensor, Tensor]] = deque()
        self.count = 0
        self.first = -1  # the number of the first sample, if there is one

    def add(self, x: Tensor, numbers: Tensor) -> None:
        rows = x.shape[0]
        if rows:
            self._parts.append((x, numbers))
            if not self.count:
                self.first = int(numbers[0])
            self.count += rows

    def take(self, most: int) -> tuple[Tensor, Tensor]:
        """The first samples, as many as there are, or `most`."""
        taken, room = [], most
        while self._parts and room:
            x, numbers = self._parts.popleft()
            rows = min(x.shape[0], room)
            if rows < x.shape[0]:
                self._parts.appendleft((x[rows:], numbers[rows:]))
                x, numbers = x[:rows], numbers[:rows]
            taken.append((x, numbers))
            room -= rows
        self.count -= most - room
        if self.count:
            self.first = int(self._parts[0][1][0])
        if len(taken) == 1:
            return taken[0]
        features, ids = zip(*taken, strict=True)
        return torch.cat(features), torch.cat(ids)
