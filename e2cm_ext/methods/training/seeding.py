"""Seeds of random numbers, and the rank of a process, on which they depend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["generator", "mix_seeds", "rank_and_world_size", "seeded"]


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: (0, 1) if torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mix_seeds(*numbers: int) -> int:
    """Make one seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """Make a generator on the CPU whose random numbers are determined by these numbers."""
    return torch.Generator().manual_seed(mix_seeds(*numbers))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generators inside the block, and restore their state at its end.

    Example:
        with training.seeded(0):
            layer = torch.nn.Linear(16, 10)  # always the same initial weights
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
