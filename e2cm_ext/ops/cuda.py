"""The ops for tensors on an NVIDIA GPU: what functional.py calls after validation.py has looked at the arguments.

Everything runs on torch's current stream of the tensor's device. The host waits in one place, `SurvivorCount`, where
it must learn how many samples stay; `decide_masked`, scores, distances and statistics never wait and can be captured in
a CUDA graph. Answers are the same bits in every run and whatever batch a sample sits in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from . import validation
from .types import Decisions

_BUILT = hasattr(native, "cuda_exit")


def supports(x: Tensor) -> bool:
    """Are there kernels for where x is?"""
    return _BUILT and x.is_cuda


class HeadParams(NamedTuple):
    """A head as the kernels see it: class means with their scales, or weights with their biases."""

    rows: Tensor  # [classes, dim] in the memory order of what is looked at
    classes: int
    squares: bool  # class means
    per_class: Tensor | None = None
    center: Tensor | None = None


class Departure(NamedTuple):
    """Who leaves, and as whom. `stays` [B] of bytes: written; if `marked`, rows where it is 0 have left before."""

    rule: int
    limit: float
    exit: int
    ids: Tensor
    stays: Tensor
    bad_ids: int  # address of a number that is set to 1 if there are any; 0: nobody wants to know
    marked: bool

    def numbers(self) -> tuple[int, float, int, int, int, int, bool]:
        return (
            self.rule, self.limit, self.exit, self.ids.data_ptr(), self.stays.data_ptr(), self.bad_ids, self.marked,
        )  # fmt: skip


def class_distances(look: validation.HeadInput, vectors: HeadParams) -> Tensor:
    x = look.features
    out = _empty(x.tensor, x.rows, vectors.classes)
    _run(look, vectors, distances=out)
    return out


def scores(look: validation.HeadInput, vectors: HeadParams) -> tuple[Tensor, Tensor, Tensor]:
    x = look.features
    confidence, log_probs = _empty(x.tensor, x.rows), _empty(x.tensor, x.rows, vectors.classes)
    prediction = _integers(x.tensor, x.rows)
    _run(look, vectors, answers=Decisions(prediction, confidence, None, log_probs))  # type: ignore[arg-type]
    return confidence, prediction, log_probs


def step(
    x: Tensor,
    look: validation.HeadInput,
    vectors: HeadParams,
    rule: int,
    limit: float,
    exit: int,
    ids: Tensor,
    out: Decisions,
) -> tuple[Tensor, Tensor]:
    rows = look.batch.rows
    stays, told = _bytes(x, rows), SurvivorCount(x, rows)
    _run(look, vectors, answers=out, departure=Departure(rule, limit, exit, ids, stays, told.bad_ids, False))
    return _survivors(x, look.batch, stays, ids, told)


def decide(
    x: Tensor,
    f: validation.Batch,
    scores: validation.Batch,
    scale: Tensor | None,
    rule: int,
    limit: float,
    exit: int,
    ids: Tensor,
    out: Decisions,
) -> tuple[Tensor, Tensor]:
    stays, told = _bytes(x, f.rows), SurvivorCount(x, f.rows)
    _decide(scores, scale, Departure(rule, limit, exit, ids, stays, told.bad_ids, False), out)
    return _survivors(x, f, stays, ids, told)


def decide_masked(
    scores: validation.Batch,
    scale: Tensor | None,
    rule: int,
    limit: float,
    exit: int,
    pending: Tensor,
    ids: Tensor,
    out: Decisions,
) -> None:
    _decide(scores, scale, Departure(rule, limit, exit, ids, pending, 0, True), out)


def statistics(look: validation.HeadInput) -> Tensor:
    x, numbers = look.features, look.numbers or ()
    out = _empty(x.tensor, x.rows, look.dim)
    workspace = _bytes(x.tensor, native.cuda_statistics_workspace(x.rows, numbers))
    with _on(x.tensor):
        native.cuda_statistics(*_rows(x), numbers, out.data_ptr(), workspace.data_ptr(), _place(x.tensor))
    return out


def compact(f: validation.Batch, keep: Tensor) -> tuple[Tensor, Tensor]:
    told = SurvivorCount(f.tensor, f.rows)
    index = _kept(keep, None, told)[0]
    survivors = _gathered(f, index, told)
    count = told.count()
    # Unlike the survivors of a step, these are never x itself.
    survivors = f.tensor.clone() if count == f.rows else survivors[:count]
    return survivors, index[:count]


class SurvivorCount:
    """How many rows stay, from the device to the host: asked for early, waited for late."""

    def __init__(self, x: Tensor, rows: int) -> None:
        self._rows = rows
        self.numbers = torch.zeros(2, dtype=torch.int64, device=x.device)  # how many stay; is there a wrong id
        self.bad_ids = self.numbers.data_ptr() + 8
        self._host = self.numbers
        self._event: torch.cuda.Event | None = None

    def ask(self) -> None:
        self._host, self._event = _to_host(self.numbers)

    def count(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        count, bad_ids = self._host.tolist()
        if bad_ids:
            raise IndexError("`ids` holds a number that is not a row of `out`; all other samples have been answered")
        return int(count)


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    with torch.cuda.device(numbers.device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an exit that moves its survivors together must tell the host how many there are, which a CUDA graph "
                "cannot; capture ops.decide_masked instead, see e2cm_ext.runtime.cuda_graphs"
            )
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return host, event


def _survivors(
    x: Tensor, f: validation.Batch, stays: Tensor, ids: Tensor, told: SurvivorCount
) -> tuple[Tensor, Tensor]:
    """The rows are moved while the host waits to be told how many there are: into room for all, cut afterwards."""
    index, kept_ids = _kept(stays, ids, told)
    survivors = _gathered(f, index, told)
    count = told.count()
    return (x, ids) if count == f.rows else (survivors[:count], kept_ids[:count])


def _kept(stays: Tensor, ids: Tensor | None, told: SurvivorCount) -> tuple[Tensor, Tensor]:
    rows = stays.shape[0]
    index, kept_ids = _integers(stays, rows), _integers(stays, 0 if ids is None else rows)
    workspace = _bytes(stays, native.cuda_kept_rows_workspace(rows))
    with _on(stays):
        native.cuda_kept_rows(
            stays.data_ptr(), rows, _address(ids), index.data_ptr(), kept_ids.data_ptr(), told.numbers.data_ptr(),
            workspace.data_ptr(), _place(stays),
        )  # fmt: skip
    told.ask()
    return index, kept_ids


def _gathered(f: validation.Batch, index: Tensor, told: SurvivorCount) -> Tensor:
    """Rows `index` of a batch; those that told.numbers counts, unless that is all of them."""
    x = f.tensor
    if f.channels_last:
        last = validation.channels_last_format(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=last)
    else:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.element_size()
    with _on(x):
        native.cuda_gather_rows(
            x.data_ptr(), f.dim * size, f.stride * size, index.data_ptr(), told.numbers.data_ptr(), f.rows,
            out.data_ptr(), _place(x),
        )  # fmt: skip
    return out


def _run(
    look: validation.HeadInput,
    vectors: HeadParams,
    distances: Tensor | None = None,
    answers: Decisions | None = None,
    departure: Departure | None = None,
) -> None:
    x, rows = look.features, _float32(vectors.rows)
    workspace = _bytes(x.tensor, native.cuda_exit_workspace(x.rows, vectors.classes, look.dim, look.numbers))
    with _on(x.tensor):
        native.cuda_exit(
            *_rows(x), look.numbers, rows.data_ptr(), vectors.classes, look.dim, vectors.squares,
            _address(vectors.center), _address(vectors.per_class), _address(distances), _answers(answers),
            None if departure is None else departure.numbers(), workspace.data_ptr(), _place(x.tensor),
        )  # fmt: skip


def _decide(scores: validation.Batch, scale: Tensor | None, departure: Departure, out: Decisions) -> None:
    x = scores.tensor
    with _on(x):
        native.cuda_decide(
            x.data_ptr(), scores.dtype, scores.rows, scores.dim, scores.stride, _address(scale), _answers(out),
            departure.numbers(), _place(x),
        )  # fmt: skip


def _answers(out: Decisions | None) -> tuple[int, int, int, int, int]:
    if out is None:
        return 0, 0, 0, 0, 0
    prediction, confidence, exit, log_probs = out
    addresses = _address(confidence), _address(prediction), _address(exit), _address(log_probs)
    return prediction.shape[0], *addresses


def _float32(rows: Tensor) -> Tensor:
    """Class vectors are float32 in the kernels: heads store no others, and a copy of a few others costs little."""
    return rows.float()


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device)


def _place(x: Tensor) -> tuple[int, int]:
    """Device and current stream. Only inside of _on."""
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _rows(f: validation.Batch) -> tuple[int, int, int, int, int]:
    return f.tensor.data_ptr(), f.dtype, f.rows, f.dim, f.stride


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _integers(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=like.device)


def _bytes(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)
