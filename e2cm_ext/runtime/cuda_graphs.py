"""The cascade at fixed batch sizes: every segment of the network is captured as a CUDA graph for a few of them.

A kernel launched from Python costs the host some microseconds, and a network with exits has hundreds of them: at small
batches that is most of the time. A graph replays all of them in one call, but its shapes are fixed. There are two ways
to live with that:

- mode="bucket": survivors are moved together at every active exit, as in cascade.py, and the next segment runs at the
  smallest of the given sizes that holds them; the outputs of the rows left over are ignored. At each exit the host
  waits to learn how many samples are left.
- mode="masked": no sample is moved. All rows go through the whole network, and later exits skip those that have exited.
  That saves launches and nothing else: for latency, where the host must never wait, and as a measure of what compaction
  costs.

On other devices the same code runs without graphs. The network must not branch on the values of its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..heads.base import Head
from ..heads.rules import Confidence, Entropy, Rule
from ..ops.types import Decisions
from ..stages import Stages
from .cascade import final_decisions
from .segments import Segment, segments

__all__ = ["MODES", "FixedCascade"]

MODES = ("bucket", "masked")


class FixedCascade:
    """A network with exits that runs in CUDA graphs, at a few batch sizes.

    Decisions are those of cascade.run, up to what the network's own layers round differently in batches of another
    size. Thresholds are captured with the rest: for others, make another FixedCascade. It owns the memory that its
    graphs read and write, so only one thread may call it at a time.

    Args:
        stages: The M+1 stages.
        heads: The M heads.
        rule: Turns scores into a certainty.
        thresholds: [M]; +inf: the exit never fires, and its head is not computed.
        example: A batch, of which the shape and the device of a sample are taken.
        num_classes: Number of classes.
        sizes: The batch sizes to capture; the largest is the most samples that a call may have.
        mode: "bucket" or "masked".

    Raises:
        ValueError: An argument does not fit the others.
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
        exits = len(stages) - 1
        if not exits == len(heads) == len(thresholds):
            raise ValueError(
                f"`thresholds` has {len(thresholds)} numbers and `heads` {len(heads)} heads, for {exits} exits"
            )
        self._rule, self._num_classes, self._mode = rule, num_classes, mode
        self._segments = segments(stages, heads, thresholds)
        self._example = example[:1]
        self._captured: dict[tuple[int, int], _Captured] = {}

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Decisions:
        """Run a batch.

        Args:
            x: At most as many samples as the largest of `sizes`.

        Returns:
            Decisions in input order.
        """
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
        captured = self._get(self._segments, 0, x)
        captured.run(x)
        for column, values in zip(out, captured.out, strict=True):
            assert column is not None and values is not None
            column.copy_(values[: x.shape[0]])
        return out

    def _in_buckets(self, x: Tensor, out: Decisions) -> Decisions:
        ids = torch.arange(x.shape[0], device=x.device)
        for number, segment in enumerate(self._segments):
            rows = x.shape[0]
            captured = self._get([segment], number, x)
            captured.run(x)
            pending = captured.pending[:rows]
            staying = pending.nonzero().flatten()  # here the host waits
            none_stays = len(staying) == 0
            leaving_ids = ids if none_stays else ids[~pending]
            for column, values in zip(out, captured.out, strict=True):
                assert column is not None and values is not None
                column[leaving_ids] = values[:rows] if none_stays else values[:rows][~pending]
            if none_stays:
                break
            x, ids = captured.features[:rows].index_select(0, staying), ids.index_select(0, staying)
        return out

    def _get(self, segments: list[Segment[nn.Module]], number: int, x: Tensor) -> _Captured:
        """For segments that begin with this number, at the smallest size that holds x."""
        size = next(size for size in self.sizes if size >= x.shape[0])
        key = number, size
        if key not in self._captured:
            self._captured[key] = _Captured(segments, self._rule, size, x, self._num_classes)
        return self._captured[key]


class _Captured:
    """Segments that follow each other, at one batch size, in memory of their own; captured at the first run."""

    def __init__(
        self, segments: list[Segment[nn.Module]], rule: Rule, size: int, example: Tensor, num_classes: int
    ) -> None:
        self._segments, self._rule = segments, rule
        device = example.device
        self._input = self.features = _zero_batch(example, size)
        self._rows = torch.arange(size, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.pending = torch.zeros(size, dtype=torch.bool, device=device)
        self.out = Decisions.empty(size, num_classes, device)

    def run(self, x: Tensor) -> None:
        """Write the decisions about those that leave into `out`; the others are still `pending`, with `features`."""
        if self._graph is None and x.is_cuda:
            self._capture(x)
        self._load(x)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def _load(self, x: Tensor) -> None:
        rows = x.shape[0]
        self._input[:rows].copy_(x)
        self.pending.fill_(False)
        self.pending[:rows] = True

    def _capture(self, x: Tensor) -> None:
        """After two runs without a graph, in which libraries choose their kernels and reserve their memory."""
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._load(x)
                    self._compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._compute()
            self._graph = graph

    def _compute(self) -> None:
        self.features = self._input
        for segment in self._segments:
            for stage in segment.stages:
                self.features = stage(self.features)
            self._decide(segment)

    def _decide(self, segment: Segment[nn.Module]) -> None:
        if segment.head is None:
            logits = self.features
            _write_where(self.pending, self.out, final_decisions(logits, logits.log_softmax(1), segment.exit))
            self.pending.fill_(False)
            return
        log_probs = segment.head(self.features)
        if isinstance(self._rule, Confidence | Entropy):
            limit, name = self._rule.limit(segment.threshold), self._rule.name
            ops.decide_masked(log_probs, limit, self.pending, self._rows, self.out, rule=name, exit=segment.exit)
            return
        leaving = (self._rule.certainty(log_probs) > segment.threshold) & self.pending
        _write_where(leaving, self.out, final_decisions(log_probs, log_probs, segment.exit))
        self.pending.logical_and_(~leaving)


def _write_where(mask: Tensor, out: Decisions, decisions: Decisions) -> None:
    for column, values in zip(out, decisions, strict=True):
        assert column is not None and values is not None
        chosen = mask if values.dim() == 1 else mask[:, None]
        column.copy_(torch.where(chosen, values, column))


def _zero_batch(example: Tensor, size: int) -> Tensor:
    """Zeros in the shape and the memory format of its samples."""
    shape = (size, *example.shape[1:])
    if example.dim() == 4 and example[:1].is_contiguous(memory_format=torch.channels_last):
        return torch.zeros(shape, dtype=example.dtype, device=example.device).contiguous(
            memory_format=torch.channels_last
        )
    return torch.zeros(shape, dtype=example.dtype, device=example.device)
