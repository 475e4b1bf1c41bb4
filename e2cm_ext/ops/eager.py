"""The ops outside of compilers: one `run` for all of them, and their kernels on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from . import cuda
from .calls import Batch, CompactCall, DecideCall, HeadCall, HeadInput, StepCall, address, answers

_threads = torch.get_num_threads


class Op(NamedTuple):
    """Everything that is said about an op, once; see the table in library.py."""

    name: str
    schema: str  # of the operator of torch; (a!) marks what is written
    resolve: Callable[
        ..., Any
    ]  # checks the arguments, which are named as in the schema; returns what the next three take
    cpu: Callable[[Any], Any]
    cuda: Callable[[Any], Any]
    reference: Callable[[Any], Any]  # on other devices, and in a build without CUDA
    fake: Callable[..., Any]  # shapes, from the arguments in the order of the schema


def run(op: Op, **arguments: Any) -> Any:
    call = op.resolve(**arguments)
    if cuda.supports(call.x):
        return op.cuda(call)
    return op.cpu(call) if call.x.is_cpu else op.reference(call)


def statistics(call: HeadInput) -> Tensor:
    f = call.features
    out = _floats(f.rows, call.dim)
    native.statistics(f.native(), call.numbers or (), address(out), _threads())
    return out


def class_distances(call: HeadCall) -> Tensor:
    f = call.input.features
    out = _floats(f.rows, call.head.classes)
    native.class_distances(f.native(), call.head.native(), address(out), _threads())
    return out


def scores(call: HeadCall) -> tuple[Tensor, Tensor, Tensor]:
    input, head = call.input, call.head
    rows = input.batch.rows
    confidence, prediction, log_probs = _floats(rows), _integers(rows), _floats(rows, head.classes)
    out = answers(prediction, confidence, None, log_probs)
    native.scores(input.native(), head.native(), out, _threads())
    return confidence, prediction, log_probs


def step(call: StepCall) -> tuple[Tensor, Tensor]:
    x, input, head, departure = call
    keep = _integers(input.batch.rows)
    count = native.step(
        input.native(), head.native(), departure.native(), answers(*departure.out), address(keep), _threads()
    )
    return _survivors(x, input.batch, departure.ids, keep, count)


def decide(call: DecideCall) -> tuple[Tensor, Tensor]:
    departure = call.departure
    keep = _integers(call.batch.rows)
    count = native.decide(
        call.scores.native(), address(call.scale), departure.native(), answers(*departure.out), address(keep),
        _threads(),
    )  # fmt: skip
    return _survivors(call.x, call.batch, departure.ids, keep, count)


def compact(call: CompactCall) -> tuple[Tensor, Tensor]:
    f = call.batch
    index = _integers(f.rows)
    count = native.kept_rows(address(call.keep), f.rows, address(index))
    index = index[:count].clone()
    return _take(f, index), index


def _survivors(x: Tensor, f: Batch, ids: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == f.rows:
        return x, ids
    if count == 0:
        return f.new_rows(0), ids.new_empty(0)
    index = keep[:count]
    kept_ids = _integers(count)
    native.gather_rows(address(ids), 8, 8, address(index), count, address(kept_ids), 1)
    return _take(f, index), kept_ids


def _take(f: Batch, index: Tensor) -> Tensor:
    """Rows `index` of a batch, moved together in its memory format."""
    count = index.shape[0]
    out = f.new_rows(count)
    size = out.element_size()
    native.gather_rows(
        address(f.tensor), f.dim * size, f.stride * size, address(index), count, address(out), _threads()
    )
    return out


# Whatever torch's default dtype and device are.
def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu")
