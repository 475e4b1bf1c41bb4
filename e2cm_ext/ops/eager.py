"""The ops outside of compilers: one `run` for all of them, and their kernels on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from . import cuda
from .calls import Batch, Departure, HeadInput, HeadParams, address, answers

_threads = torch.get_num_threads


class Op(NamedTuple):
    """Everything that is said about an op, once; see the table in library.py."""

    name: str
    schema: str  # of the operator of torch; (a!) marks what is written
    resolve: Callable[..., Any]  # checks the arguments; returns what the next three take
    cpu: Callable[..., Any]
    cuda: Callable[..., Any]
    reference: Callable[..., Any]  # on other devices, and in a build without CUDA
    fake: Callable[..., Any]  # shapes, from the arguments in the order of the schema


def run(op: Op, *arguments: Any) -> Any:
    call = op.resolve(*arguments)
    x: Tensor = call[0]
    if cuda.supports(x):
        return op.cuda(*call)
    return op.cpu(*call) if x.is_cpu else op.reference(*call)


def statistics(x: Tensor, input: HeadInput) -> Tensor:
    out = _floats(input.batch.rows, input.dim)
    native.statistics(input.features.native(), input.numbers or (), out.data_ptr(), _threads())
    return out


def class_distances(x: Tensor, input: HeadInput, head: HeadParams) -> Tensor:
    out = _floats(input.batch.rows, head.classes)
    native.class_distances(input.features.native(), head.native(), out.data_ptr(), _threads())
    return out


def scores(x: Tensor, input: HeadInput, head: HeadParams) -> tuple[Tensor, Tensor, Tensor]:
    rows = input.batch.rows
    confidence, prediction, log_probs = _floats(rows), _integers(rows), _floats(rows, head.classes)
    out = answers(prediction, confidence, None, log_probs)
    native.scores(input.native(), head.native(), out, _threads())
    return confidence, prediction, log_probs


def step(x: Tensor, input: HeadInput, head: HeadParams, departure: Departure) -> tuple[Tensor, Tensor]:
    keep = _integers(input.batch.rows)
    count = native.step(
        input.native(), head.native(), departure.native(), answers(*departure.out), keep.data_ptr(), _threads()
    )
    return _survivors(x, input.batch, departure.ids, keep, count)


def decide(x: Tensor, f: Batch, scores: Batch, scale: Tensor | None, departure: Departure) -> tuple[Tensor, Tensor]:
    keep = _integers(f.rows)
    count = native.decide(
        scores.native(), address(scale), departure.native(), answers(*departure.out), keep.data_ptr(), _threads()
    )
    return _survivors(x, f, departure.ids, keep, count)


def compact(x: Tensor, f: Batch, keep: Tensor) -> tuple[Tensor, Tensor]:
    index = _integers(f.rows)
    count = native.kept_rows(keep.data_ptr(), f.rows, index.data_ptr())
    index = index[:count].clone()
    return _take(f, index), index


def _survivors(x: Tensor, f: Batch, ids: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == f.rows:
        return x, ids
    if count == 0:
        return f.new_rows(0), ids.new_empty(0)
    index = keep[:count]
    kept_ids = _integers(count)
    native.gather_rows(ids.data_ptr(), 8, 8, index.data_ptr(), count, kept_ids.data_ptr(), 1)
    return _take(f, index), kept_ids


def _take(f: Batch, index: Tensor) -> Tensor:
    """Rows `index` of a batch, moved together in its memory format."""
    count = index.shape[0]
    out = f.new_rows(count)
    size = out.element_size()
    native.gather_rows(
        f.tensor.data_ptr(), f.dim * size, f.stride * size, index.data_ptr(), count, out.data_ptr(), _threads()
    )
    return out


# Whatever torch's default dtype and device are.
def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu")
