"""Many processes on one task, under torch.distributed: what each has is put together, and what goes wrong in one of
them ends the others, too, instead of letting them wait.

Where torch.distributed is not initialised there is one process, and everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["count", "all_gather_objects", "synchronize_errors", "broadcast_from_rank0", "all_reduce_sum"]

T = TypeVar("T")


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The tensor, summed over all processes, in place."""
    if count() > 1:
        _meeting(lambda: dist.all_reduce(tensor))
    return tensor


def all_gather_objects(value: T) -> list[T]:
    """What every process has, in the order of their ranks. Anything that can be pickled, tensors on the CPU."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    _meeting(lambda: dist.all_gather_object(found, value))
    return found


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """What it gives in process 0, where alone it is done."""
    if count() == 1:
        return work()
    found: list[Any] = [None]
    with synchronize_errors("process 0"):
        if dist.get_rank() == 0:
            found = [work()]
    _meeting(lambda: dist.broadcast_object_list(found, src=0))
    result: T = found[0]
    return result


@contextmanager
def synchronize_errors(what: str) -> Iterator[None]:
    """All processes leave it together: without an error, or, if there was one in any of them, each with an error."""
    error = None
    try:
        yield
    except Exception as raised:
        if count() == 1:
            raise
        error = raised
    if count() == 1:
        return
    try:
        errors = all_gather_objects(error and f"{type(error).__name__}: {error}")
    except RuntimeError:
        if error is None:
            raise
        errors = []
    if error is not None:
        raise error
    for rank, said in enumerate(errors):
        if said:
            raise RuntimeError(f"{what}: process {rank} of {count()} has failed with {said}")


def _meeting(communicate: Callable[[], Any]) -> None:
    try:
        communicate()
    except RuntimeError as error:
        why, _, _ = str(error).strip().partition("\n")
        raise RuntimeError(
            f"process {dist.get_rank()} of {count()} waits in vain for the others: one of them is gone, or has not "
            f"come within the timeout of the process group ({why})"
        ) from error
