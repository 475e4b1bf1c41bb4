"""Communication between processes under torch.distributed.

Every process has a part of the data. What each gathers is combined, and an error in one of them ends the others, too,
instead of letting them wait. Without torch.distributed there is one process, and everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_objects", "all_reduce_sum", "broadcast_from_rank0", "synchronize_errors", "world_size"]

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes; 1 if torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place.

    A head of your own calls it in `finish` for each of its statistics. Every process must call it, also one without
    samples. With one process it does nothing.

    Args:
        tensor: Of the same shape and dtype in every process.

    Returns:
        The tensor itself.

    Raises:
        RuntimeError: Another process has ended, or did not call it within the timeout of the process group.
    """
    if world_size() > 1:
        _communicate(lambda: dist.all_reduce(tensor))
    return tensor


def all_gather_objects(value: T) -> list[T]:
    """Collect one value from every process.

    Args:
        value: Anything that can be pickled, with tensors on the CPU.

    Returns:
        The values of all processes, by rank.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    _communicate(lambda: dist.all_gather_object(values, value))
    return values


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """Call a function in process 0 alone, and return its result in every process."""
    if world_size() == 1:
        return function()
    values: list[Any] = [None]
    with synchronize_errors("process 0"):
        if dist.get_rank() == 0:
            values = [function()]
    _communicate(lambda: dist.broadcast_object_list(values, src=0))
    result: T = values[0]
    return result


@contextmanager
def synchronize_errors(what: str) -> Iterator[None]:
    """Let all processes leave this block together; if one raises an error, all do.

    Args:
        what: Names the block in the errors of the other processes.
    """
    error = None
    try:
        yield
    except Exception as raised:
        if world_size() == 1:
            raise
        error = raised
    if world_size() == 1:
        return
    try:
        errors = all_gather_objects(error and f"{type(error).__name__}: {error}")
    except RuntimeError:
        if error is None:
            raise
        errors = []
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message:
            raise RuntimeError(f"{what}: process {rank} of {world_size()} has failed with {message}")


def _communicate(collective: Callable[[], Any]) -> None:
    try:
        collective()
    except RuntimeError as error:
        reason, _, _ = str(error).strip().partition("\n")
        raise RuntimeError(
            f"process {dist.get_rank()} of {world_size()} cannot reach the others: one of them has ended, or did not "
            f"arrive within the timeout of the process group ({reason})"
        ) from error
