"""A profile: how long stages and exit steps take on one device, and how long a batch takes by that.

Times between the batch sizes that were measured are taken to be linear, and a batch of no sample to take no time.

The expected time of a batch of B samples, drawn independently: the number of those that reach a stage is binomial, with
the share of the record's samples that reach it; the mean of the stage's time over that, summed over the stages, and the
same for the exit steps of the active exits. That is exact for the table of times.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..heads.thresholds import threshold_vector
from ..runtime import stream
from ..utils import serialization
from . import binomial
from .record import Record, Replay

__all__ = ["Profile", "check_batch_size"]


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Seconds that every stage and every exit step takes on one device, at S batch sizes.

    Attributes:
        stages: [S, M+1] float64.
        heads: [S, M] float64: the whole exit step, survivors moved.
        sizes: S batch sizes, rising from 1.
        names: Names of the M exits.
        device: What it was measured on.
        moves: [S, M] float64: moving so many survivors together; None: not measured.

    Raises:
        ValueError: Tables and names do not fit, or `sizes` do not rise from 1.

    Example:
        >>> profile = ee.profile(images, batch_size=128)
        >>> print(profile)                                      # microseconds of every stage and exit step
        >>> profile.expected_seconds(record, ee.thresholds, 128) / profile.base_seconds(128)
        >>> profile.save("this_machine.profile")
    """

    stages: Tensor
    heads: Tensor
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    device: str = "unknown"
    moves: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sizes[:1] != (1,) or any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"`sizes` is {self.sizes}; wanted batch sizes that rise from 1")
        for name, table, columns in (
            ("stages", self.stages, len(self.names) + 1),
            ("heads", self.heads, len(self.names)),
            ("moves", self.moves, len(self.names)),
        ):
            if table is None:
                continue
            if table.shape != (len(self.sizes), columns):
                raise ValueError(f"`{name}` has shape {list(table.shape)}; wanted [{len(self.sizes)}, {columns}]")
            object.__setattr__(self, name, table.detach().double().cpu())

    def seconds(self, stage: int, samples: float) -> float:
        """Time of stage number `stage` on so many samples."""
        return float(_interpolate(self.sizes, self.stages[:, stage], self._checked_count(samples)))

    def head_seconds(self, exit: int, samples: float) -> float:
        """Time of the exit step number `exit` on so many samples."""
        return float(_interpolate(self.sizes, self.heads[:, exit], self._checked_count(samples)))

    def move_seconds(self, exit: int, samples: float) -> float:
        """Time of moving so many survivors together at exit number `exit`; 0 if that was not measured."""
        if self.moves is None:
            return 0.0
        return float(_interpolate(self.sizes, self.moves[:, exit], self._checked_count(samples)))

    def base_seconds(self, batch_size: int) -> float:
        """Time of the base network, without any exit."""
        return float(_interpolate(self.sizes, self.stages.sum(1), self._checked_count(batch_size)))

    def expected_seconds(self, record: Record, thresholds: Tensor | Sequence[float], batch_size: int) -> float:
        """Mean time of a batch.

        Args:
            record: The batch is drawn from samples like these.
            thresholds: [M].
            batch_size: At most the largest of `sizes`.

        Raises:
            ValueError: The record is of another network, or the batch size is not covered.
        """
        self.refuse_foreign(record)
        check_batch_size(batch_size, self)
        limits = threshold_vector(thresholds, record.exits)
        return self.expected_seconds_of(record.replay(limits), limits, batch_size)

    def expected_seconds_of(self, replay: Replay, thresholds: Tensor, batch_size: int) -> float:
        """As expected_seconds, from a replay under these thresholds; nothing is checked."""
        counts = np.arange(batch_size + 1)
        stages, heads = (
            torch.from_numpy(
                np.array([_interpolate(self.sizes, column, counts) for column in table.T]).reshape(-1, len(counts))
            )
            for table in (self.stages, self.heads)
        )
        leavers = replay.exit.bincount(minlength=len(stages)).double()
        reach = leavers.flip(0).cumsum(0).flip(0) / leavers.sum()
        weights = binomial.pmf(batch_size, reach)  # [M+1, batch_size + 1]
        active = thresholds < math.inf
        return float((weights * stages).sum() + (weights[:-1] * heads)[active].sum())

    def refuse_foreign(self, record: Record) -> None:
        """Refuse records of networks with other exits."""
        if record.names != self.names:
            raise ValueError(
                f"the profile is of another network, with exits {', '.join(self.names)}; "
                f"wanted {', '.join(record.names)}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. What was at `path` stays as it is until the new file is complete."""
        info = {"sizes": self.sizes, "names": self.names, "device": self.device}
        tensors = {"stages": self.stages, "heads": self.heads}
        if self.moves is not None:
            tensors["moves"] = self.moves
        serialization.write(path, "profile", tensors, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a file that `save` has written.

        Raises:
            ValueError: The file is not a profile, truncated, or altered.
        """
        tensors, info = serialization.read(path, "profile")
        return cls(
            tensors["stages"], tensors["heads"], tuple(info["sizes"]), tuple(info["names"]), info["device"],
            tensors.get("moves"),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Profile({len(self.names)} exits, batches of 1 to {self.sizes[-1]}, {self.device})"

    def __str__(self) -> str:
        names = [text for name in self.names for text in (name, f"{name}, exit step")] + ["(end)"]
        columns = [column for pair in zip(self.stages.T, self.heads.T, strict=False) for column in pair]
        width = max(map(len, ("microseconds per batch of", *names)))
        lines = [f"{'microseconds per batch of':{width}}" + "".join(f"{size:>10}" for size in self.sizes)]
        for name, column in zip(names, [*columns, self.stages[:, -1]], strict=True):
            lines.append(f"{name:{width}}" + "".join(f"{1e6 * seconds:10.1f}" for seconds in column.tolist()))
        return "\n".join([*lines, self.device])

    def _checked_count(self, samples: float) -> float:
        if not 0 <= samples <= self.sizes[-1]:
            raise ValueError(f"{samples} samples are no batch that the profile knows; wanted 0 to {self.sizes[-1]}")
        return samples


def _interpolate(sizes: Sequence[int], seconds: Tensor, samples: Any) -> Any:
    """Linear between the sizes; 0 for no sample."""
    return np.interp(samples, (0, *sizes), (0.0, *seconds.tolist()))


def check_batch_size(batch_size: int, profile: Profile | None = None) -> None:
    """Refuse what is no batch size, or larger than the profile covers."""
    stream.check_batch_size(batch_size)
    if profile is not None and batch_size > profile.sizes[-1]:
        raise ValueError(
            f"`batch_size` is {batch_size}; the profile knows batches of up to {profile.sizes[-1]} samples"
        )
