"""The ops on an NVIDIA GPU: each function takes the normalised call of an op.

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
from .calls import (
    Batch,
    Departure,
    HeadInput,
    HeadParams,
    address,
    answers,
)

_BUILT = hasattr(native, "cuda_exit")
_NO_ANSWERS = (0, 0, 0, 0, 0)


def supports(x: Tensor) -> bool:
    """Are there kernels for the device of x?"""
    return _BUILT and x.is_cuda


class Marks(NamedTuple):
    """`stays` [B] of bytes: written, 1 for the rows that stay. With `marked`, rows where it is 0 have left before."""

    stays: Tensor
    bad_ids: int  # address of a number that is set to 1 if an id is no row of the answers; 0: not wanted
    marked: bool

    def native(self) -> tuple[int, int, bool]:
        return self.stays.data_ptr(), self.bad_ids, self.marked


def class_distances(x: Tensor, input: HeadInput, head: HeadParams) -> Tensor:
    out = _empty(x, input.batch.rows, head.classes)
    _exit(input, head, distances=out)
    return out


def scores(x: Tensor, input: HeadInput, head: HeadParams) -> tuple[Tensor, Tensor, Tensor]:
    rows = input.batch.rows
    confidence, prediction, log_probs = _empty(x, rows), _integers(x, rows), _empty(x, rows, head.classes)
    _exit(input, head, out=answers(prediction, confidence, None, log_probs))
    return confidence, prediction, log_probs


def step(x: Tensor, input: HeadInput, head: HeadParams, departure: Departure) -> tuple[Tensor, Tensor]:
    rows = input.batch.rows
    stays, count = _bytes(x, rows), SurvivorCount(x, rows)
    leaving = departure.native(), Marks(stays, count.bad_ids, False).native()
    _exit(input, head, out=answers(*departure.out), departure=leaving)
    return _survivors(x, input.batch, stays, departure.ids, count)


def decide(x: Tensor, f: Batch, scores: Batch, scale: Tensor | None, departure: Departure) -> tuple[Tensor, Tensor]:
    stays, count = _bytes(x, f.rows), SurvivorCount(x, f.rows)
    _decide(scores, scale, departure, Marks(stays, count.bad_ids, False))
    return _survivors(x, f, stays, departure.ids, count)


def decide_masked(x: Tensor, scores: Batch, scale: Tensor | None, departure: Departure, pending: Tensor) -> None:
    _decide(scores, scale, departure, Marks(pending, 0, True))


def statistics(x: Tensor, input: HeadInput) -> Tensor:
    rows, numbers = input.batch.rows, input.numbers or ()
    out = _empty(x, rows, input.dim)
    workspace = _bytes(x, native.cuda_statistics_workspace(rows, numbers))
    with _on(x):
        native.cuda_statistics(input.features.native(), numbers, out.data_ptr(), workspace.data_ptr(), _place(x))
    return out


def compact(x: Tensor, f: Batch, keep: Tensor) -> tuple[Tensor, Tensor]:
    survivor_count = SurvivorCount(f.tensor, f.rows)
    index = _kept(keep, None, survivor_count)[0]
    survivors = _gathered(f, index, survivor_count)
    count = survivor_count.wait()
    # Unlike the survivors of a step, these are never x itself.
    survivors = f.tensor.clone() if count == f.rows else survivors[:count]
    return survivors, index[:count]


class SurvivorCount:
    """How many rows stay, from the device to the host: requested early, waited for late."""

    def __init__(self, x: Tensor, rows: int) -> None:
        self._rows = rows
        self.numbers = torch.zeros(2, dtype=torch.int64, device=x.device)  # how many stay; is there a wrong id
        self.bad_ids = self.numbers.data_ptr() + 8
        self._host = self.numbers
        self._event: torch.cuda.Event | None = None

    def request(self) -> None:
        self._host, self._event = _to_host(self.numbers)

    def wait(self) -> int:
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


def _survivors(x: Tensor, f: Batch, stays: Tensor, ids: Tensor, survivor_count: SurvivorCount) -> tuple[Tensor, Tensor]:
    """The rows are moved while the host waits for their number: into memory for all, which is cut afterwards."""
    index, kept_ids = _kept(stays, ids, survivor_count)
    survivors = _gathered(f, index, survivor_count)
    count = survivor_count.wait()
    return (x, ids) if count == f.rows else (survivors[:count], kept_ids[:count])


def _kept(stays: Tensor, ids: Tensor | None, survivor_count: SurvivorCount) -> tuple[Tensor, Tensor]:
    rows = stays.shape[0]
    index, kept_ids = _integers(stays, rows), _integers(stays, 0 if ids is None else rows)
    workspace = _bytes(stays, native.cuda_kept_rows_workspace(rows))
    with _on(stays):
        native.cuda_kept_rows(
            stays.data_ptr(), rows, address(ids), index.data_ptr(), kept_ids.data_ptr(),
            survivor_count.numbers.data_ptr(), workspace.data_ptr(), _place(stays),
        )  # fmt: skip
    survivor_count.request()
    return index, kept_ids


def _gathered(f: Batch, index: Tensor, survivor_count: SurvivorCount) -> Tensor:
    """Rows `index` of a batch; those that survivor_count counts, unless that is all of them."""
    out = f.new_rows(f.rows)
    size = out.element_size()
    with _on(out):
        native.cuda_gather_rows(
            f.tensor.data_ptr(), f.dim * size, f.stride * size, index.data_ptr(),
            survivor_count.numbers.data_ptr(), f.rows, out.data_ptr(), _place(out),
        )  # fmt: skip
    return out


def _exit(
    input: HeadInput,
    head: HeadParams,
    distances: Tensor | None = None,
    out: tuple[int, int, int, int, int] = _NO_ANSWERS,
    departure: tuple[tuple[int, float, int, int], tuple[int, int, bool]] | None = None,
) -> None:
    x = input.features
    # Vectors are float32 in the kernels: heads store no others, and a copy of a few others costs little.
    head = head._replace(vectors=head.vectors.float())
    workspace = _bytes(x.tensor, native.cuda_exit_workspace(input.native(), head.native()))
    with _on(x.tensor):
        native.cuda_exit(
            input.native(), head.native(), address(distances), out, departure, workspace.data_ptr(), _place(x.tensor)
        )


def _decide(scores: Batch, scale: Tensor | None, departure: Departure, marks: Marks) -> None:
    x = scores.tensor
    with _on(x):
        native.cuda_decide(
            scores.native(), address(scale), answers(*departure.out), (departure.native(), marks.native()), _place(x)
        )


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device)


def _place(x: Tensor) -> tuple[int, int]:
    """Device and current stream. Only inside of _on."""
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _integers(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=like.device)


def _bytes(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)
