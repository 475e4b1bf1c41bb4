"""Cascades in fixed shapes: every stage and exit at a few batch sizes only, each captured once as a CUDA graph.

A kernel launched by Python costs some microseconds of the host, and a network with exits has hundreds: at small batches
that is most of the time. A graph replays all of them in one call, but its shapes are fixed. Two ways to live with that:

- mode="bucket": survivors are moved together at every exit, as in cascade.py, and the next stage runs at the smallest
  of the given sizes that holds them; rows that are too many are ignored. The host is told at each exit how many are
  left.
- mode="masked": nobody is moved. All samples go through the whole network, those that have left are passed over by
  later exits. Nothing is saved but launches: for latency, where the host must never wait, and as the yardstick of what
  moving costs.

On other devices the same code runs without graphs. The network must not look at its numbers to decide what it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..heads.base import Head
from ..heads.rules import Confidence, Entropy, Rule
from ..ops.types import Decisions
from ..stages import Stages
from .cascade import final_decisions

__all__ = ["MODES", "FixedCascade"]

MODES = ("bucket", "masked")


class FixedCascade:
    """A network with exits, for batches of up to the largest of `sizes`; answers are those of cascade.run, up to what
    the network's own layers round differently in batches of another size.

    Thresholds are captured with the rest: for others, make another one. One at a time: a FixedCascade owns the memory
    that its graphs read and write. `example`: a batch, of which the shape and the device of a sample are taken.
    """

    def __init__(
        self,
        stages: Stages,
        heads: Sequence[Head],
        rule: Rule,
        thresholds: Sequence[float],
        example: Tensor,
        num_classes: int,
        sizes: Sequence[int] = (1, 8, 32, 128),
        mode: str = "bucket",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"`mode` is {mode!r}; wanted one of {', '.join(map(repr, MODES))}")
        self.sizes = sorted(set(sizes))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"`sizes` is {list(sizes)}; wanted batch sizes of 1 or more")
        *early, last = stages
        if not len(early) == len(heads) == len(thresholds):
            raise ValueError(
                f"`thresholds` has {len(thresholds)} numbers and `heads` {len(heads)} heads, for {len(early)} exits"
            )
        self._rule, self._num_classes, self._mode = rule, num_classes, mode
        self._last_exit = len(early)
        exits: list[_Part] = []
        waiting: list[Callable[[Tensor], Tensor]] = []
        for number, (stage, head, threshold) in enumerate(zip(early, heads, thresholds, strict=True)):
            waiting.append(stage)
            if threshold != math.inf:
                exits.append(_Part(tuple(waiting), head, threshold, number))
                waiting = []
        self._parts = [*exits, _Part((*waiting, last), None, math.inf, self._last_exit)]
        self._example = example[:1]
        self._steps: dict[tuple[int, int], _Step] = {}

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Decisions:
        rows = x.shape[0]
        if rows > self.sizes[-1]:
            raise ValueError(f"`x` has {rows} samples; wanted at most {self.sizes[-1]}, the largest of `sizes`")
        if x.shape[1:] != self._example.shape[1:] or x.device != self._example.device:
            raise ValueError(
                f"`x` has samples of shape {list(x.shape[1:])} on {x.device}; wanted those of `example`, "
                f"{list(self._example.shape[1:])} on {self._example.device}"
            )
        out = Decisions.empty(rows, self._num_classes, x.device)
        if rows == 0:
            return out
        return self._masked(x, out) if self._mode == "masked" else self._in_buckets(x, out)

    def _masked(self, x: Tensor, out: Decisions) -> Decisions:
        step = self._step(self._parts, 0, x)
        step.run(x)
        for column, of_step in zip(out, step.out, strict=True):
            assert column is not None and of_step is not None
            column.copy_(of_step[: x.shape[0]])
        return out

    def _in_buckets(self, x: Tensor, out: Decisions) -> Decisions:
        ids = torch.arange(x.shape[0], device=x.device)
        for number, part in enumerate(self._parts):
            rows = x.shape[0]
            step = self._step([part], number, x)
            step.run(x)
            waits = step.waiting[:rows]
            stay = waits.nonzero().flatten()  # here the host learns how many
            gone = ids if len(stay) == 0 else ids[~waits]
            for column, of_step in zip(out, step.out, strict=True):
                assert column is not None and of_step is not None
                column[gone] = of_step[:rows] if len(stay) == 0 else of_step[:rows][~waits]
            if len(stay) == 0:
                break
            x, ids = step.features[:rows].index_select(0, stay), ids.index_select(0, stay)
        return out

    def _step(self, parts: list[_Part], number: int, x: Tensor) -> _Step:
        """For parts that begin with this number, at the smallest size that holds x."""
        size = next(size for size in self.sizes if size >= x.shape[0])
        key = number, size
        if key not in self._steps:
            self._steps[key] = _Step(parts, self._rule, size, x, self._num_classes)
        return self._steps[key]


class _Part:
    """The stages up to the next exit that can fire, and that exit; or those up to the end."""

    def __init__(self, stages: tuple[Any, ...], head: Head | None, threshold: float, number: int) -> None:
        self.stages, self.head, self.threshold, self.number = stages, head, threshold, number

    def features(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class _Step:
    """Parts that follow each other, at one batch size, in memory of their own: captured at the first run."""

    def __init__(self, parts: list[_Part], rule: Rule, size: int, example: Tensor, num_classes: int) -> None:
        self._parts, self._rule = parts, rule
        device = example.device
        self._input = self.features = _room_for(example, size)
        self._rows = torch.arange(size, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.waiting = torch.zeros(size, dtype=torch.bool, device=device)
        self.out = Decisions.empty(size, num_classes, device)

    def run(self, x: Tensor) -> None:
        """Answers those of x that leave, into `out`; who does not is still `waiting`, with `features`."""
        if self._graph is None and x.is_cuda:
            self._capture(x)
        self._load(x)
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()

    def _load(self, x: Tensor) -> None:
        rows = x.shape[0]
        self._input[:rows].copy_(x)
        self.waiting.fill_(False)
        self.waiting[:rows] = True

    def _capture(self, x: Tensor) -> None:
        """Twice for real before, so that libraries choose their kernels and reserve their memory."""
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._load(x)
                    self._work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._work()
            self._graph = graph

    def _work(self) -> None:
        self.features = self._input
        for part in self._parts:
            self.features = part.features(self.features)
            self._answer(part)

    def _answer(self, part: _Part) -> None:
        if part.head is None:
            logits = self.features
            _write(self.waiting, self.out, final_decisions(logits, logits.log_softmax(1), part.number))
            self.waiting.fill_(False)
            return
        log_probs = part.head(self.features)
        if isinstance(self._rule, Confidence | Entropy):
            limit, name = self._rule.limit(part.threshold), self._rule.name
            ops.decide_masked(log_probs, limit, self.waiting, self._rows, self.out, rule=name, exit=part.number)
            return
        leaving = (self._rule.certainty(log_probs) > part.threshold) & self.waiting
        _write(leaving, self.out, final_decisions(log_probs, log_probs, part.number))
        self.waiting.logical_and_(~leaving)


def _write(where: Tensor, out: Decisions, answers: Decisions) -> None:
    for column, values in zip(out, answers, strict=True):
        assert column is not None and values is not None
        chosen = where if values.dim() == 1 else where[:, None]
        column.copy_(torch.where(chosen, values, column))


def _room_for(example: Tensor, size: int) -> Tensor:
    """Zeros in the shape and the memory order of its samples."""
    shape = (size, *example.shape[1:])
    if example.dim() == 4 and example[:1].is_contiguous(memory_format=torch.channels_last):
        return torch.zeros(shape, dtype=example.dtype, device=example.device).contiguous(
            memory_format=torch.channels_last
        )
    return torch.zeros(shape, dtype=example.dtype, device=example.device)
