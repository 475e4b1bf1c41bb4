"""The runtime for many batches: survivors wait for company, so that late stages run at nearly full batch, too.

A cascade runs a batch to its end, however few of its samples are left. Here samples wait in a pool before each stage
that follows an exit, until they are more than half a batch, whatever batches they came with. The deepest pool that has
enough runs first; so none is given more before it has passed on what it can. Whole tensors go from pool to pool:
nothing is done per sample, and only what has waited is copied once more than in a cascade.

Half a batch, not a full one: batches of 64 and of 128 take the same time per sample, so waiting for the other half
gains nothing, but nearly all features are copied then, where now those of large batches go straight on.

Each pool is first in, first out. So the samples in a deeper pool came before those in any other, and the oldest one
that has no answer is the first in the deepest pool: all before it can be given out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..heads import Head
from ..heads.rules import Rule
from ..ops.types import Decisions
from .cascade import Stage, final_decisions, write

__all__ = ["Stream", "check_batch_size"]

# Batches' worth of samples that are taken in before one has waited long enough, if the caller does not say: what is run
# too small then is at most one batch per stage in so many.
_PATIENCE = 64
T = TypeVar("T")


def check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; wanted a whole number from 1 on")


class Stream:
    """Batches of one loader under way through a network. Thresholds and heads are those that it is given here.

    ready: called before anything is run; it raises if the network must not be run now. For the rest, and what is
    given out, see EarlyExit.predict_stream.
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
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        if batch_size is not None:
            check_batch_size(batch_size)
        if max_wait is not None and (isinstance(max_wait, bool) or not isinstance(max_wait, int) or max_wait < 0):
            raise ValueError(f"`max_wait` is {max_wait!r}; wanted a whole number of batches, 0 or more")
        self._legs = _legs(stages, heads, thresholds)
        self._pools = [_Pool() for _ in self._legs]
        self._rule, self._num_classes, self._ready = rule, num_classes, ready
        self._batch_size = batch_size or 0  # 0: that of the first batch, which has not come yet
        self._max_wait = max_wait
        # Samples are numbered as they come.
        self._taken = 0  # how many have come
        self._given = 0  # the answers to all before this one have been given out
        self._ends: deque[int] = (
            deque()
        )  # of the batches that have not been given out: the number behind the last sample
        self._out = Decisions.empty(0, num_classes)  # the answers, given out or not,
        self._first = 0  # from this sample on

    # ---- from the first batch to the last ---------------------------------------------------------------------------

    def in_order(self, batches: Iterator[Tensor]) -> Generator[Decisions, None, None]:
        """The answers to every batch, in the order of the batches."""
        return self._run_all(batches, self._complete)

    def completed(self, batches: Iterator[Tensor]) -> Generator[tuple[Tensor, Decisions], None, None]:
        """All answers as they come: the numbers of some samples, and the answers to these."""
        return self._run_all(batches, self._new)

    def _run_all(self, batches: Iterator[Tensor], answers: Callable[[], list[T]]) -> Generator[T, None, None]:
        inference = torch.is_inference_mode_enabled()

        def after(step: Callable[..., None], *what: Any) -> list[T]:
            # What waits must stay usable, whichever mode the caller is in when he asks for more.
            with torch.inference_mode(inference), torch.no_grad():
                step(*what)
                return answers()

        while True:
            try:
                images = next(batches)
            except Exception as error:
                # The end, or a loader that failed: what it had given before is answered first.
                yield from after(self._run_until, self._taken)
                if isinstance(error, StopIteration):
                    return
                raise
            yield from after(self._take, images)

    # ---- in ---------------------------------------------------------------------------------------------------------

    def _take(self, images: Tensor) -> None:
        """One more batch; what has enough company then, or has waited long enough, is run."""
        count = images.shape[0]
        self._make_room(count, images.device)
        numbers = torch.arange(self._taken, self._taken + count, device=images.device)
        self._taken += count
        self._ends.append(self._taken)
        self._batch_size = self._batch_size or count
        self._pools[0].add(images, numbers)
        self._run_until(self._overdue())

    def _overdue(self) -> int:
        """The samples before this one must not wait until one more batch is taken in."""
        if self._max_wait is None:
            return self._taken - _PATIENCE * self._batch_size
        return self._ends[-1 - self._max_wait] if len(self._ends) > self._max_wait else 0

    def _make_room(self, count: int, device: torch.device) -> None:
        """For the answers to so many more samples; those that have been given out are forgotten then."""
        if self._taken + count - self._first <= self._out.exit.shape[0]:
            return
        kept = self._rows(self._given, self._taken)
        waiting = self._taken - self._given
        out = Decisions.empty(2 * (waiting + count), self._num_classes, device)
        write(out, slice(waiting), Decisions(*(column[kept] for column in self._out if column is not None)))
        self._out, self._first = out, self._given

    # ---- through ----------------------------------------------------------------------------------------------------

    def _run_until(self, overdue: int) -> None:
        """Runs until nobody waits who has company, or has a number below `overdue`."""
        while (j := self._next(overdue)) is not None:
            self._run(j)

    def _next(self, overdue: int) -> int | None:
        """The deepest pool with enough samples. Of those that must be run without, the shallowest: its survivors are
        company to the next."""
        half = self._batch_size // 2
        for j in reversed(range(len(self._pools))):
            if self._pools[j].count > half:
                return j
        if self._done() >= overdue:
            return None
        return next(j for j, pool in enumerate(self._pools) if pool.count and pool.first < overdue)

    def _run(self, j: int) -> None:
        self._ready()
        stages, head, threshold, exit = self._legs[j]
        x, numbers = self._pools[j].take(self._batch_size)
        for stage in stages:
            x = stage(x)
        ids = numbers - self._first
        if head is None:
            write(self._out, ids, final_decisions(x, x.log_softmax(1), exit))
        else:
            x, ids = head.step(x, threshold, ids, self._out, rule=self._rule, exit=exit)
            self._pools[j + 1].add(x, ids + self._first)

    # ---- out --------------------------------------------------------------------------------------------------------

    def _complete(self) -> list[Decisions]:
        """Batches that are complete, and all before them, each once."""
        start, sizes = self._given, self._give_up_to(self._done())
        # One copy for all of them: a view of self._out would keep the whole of it.
        rows = self._rows(start, self._given)
        parts = (torch.split(column[rows].clone(), sizes) for column in self._out if column is not None)
        return [Decisions(*columns) for columns in zip(*parts, strict=True)] if sizes else []

    def _new(self) -> list[tuple[Tensor, Decisions]]:
        """Everything that has been answered and not given out, if there is anything."""
        exit = self._out.exit[self._rows(self._given, self._taken)]
        found = (exit >= 0).nonzero()[:, 0]
        numbers = found + self._given
        rows = numbers - self._first
        answers = Decisions(*(column[rows] for column in self._out if column is not None))
        exit[found] = -1  # as if nobody had written there: it is not found again
        self._give_up_to(self._done())
        return [(numbers, answers)] if len(numbers) else []

    def _give_up_to(self, done: int) -> list[int]:
        """The batches whose samples are all before this one count as given out; returns their sizes."""
        sizes = []
        while self._ends and self._ends[0] <= done:
            end = self._ends.popleft()
            sizes.append(end - self._given)
            self._given = end
        return sizes

    def _done(self) -> int:
        """All samples before this one have their answers."""
        for pool in reversed(self._pools):
            if pool.count:
                return pool.first
        return self._taken

    def _rows(self, start: int, end: int) -> slice:
        return slice(start - self._first, end - self._first)


class _Leg(NamedTuple):
    """What is run in one go: the stages up to the next exit that can fire, and that exit."""

    stages: Sequence[Stage]
    head: Head | None  # None: behind the last stage is the network's own answer
    threshold: float
    exit: int


def _legs(stages: Iterable[Stage], heads: Iterable[Head], thresholds: Sequence[float]) -> list[_Leg]:
    legs: list[_Leg] = []
    together: list[Stage] = []
    *early, last = stages
    for number, (stage, head, threshold) in enumerate(zip(early, heads, thresholds, strict=True)):
        together.append(stage)
        if threshold < math.inf:
            legs.append(_Leg(together, head, threshold, number))
            together = []
    return [*legs, _Leg([*together, last], None, math.inf, len(early))]


class _Pool:
    """Samples that wait before a leg, in input order, and their numbers; in parts, as they came."""

    def __init__(self) -> None:
        self._parts: deque[tuple[Tensor, Tensor]] = deque()
        self.count = 0
        self.first = -1  # the number of the first, if there is one

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
