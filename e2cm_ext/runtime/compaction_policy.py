"""When to compact a batch at an exit, and when to carry exited rows on.

Compaction takes the time of copying the survivors' features. Carrying takes the time that the next stages spend on rows
that have exited. How many samples will leave at later exits is not known, so this is a ski-rental problem: exited rows
are carried as long as the cost of carrying since the last compaction, the stages up to the next active exit included,
is below the cost of compaction; then the batch is compacted. So carrying never costs more than compaction, but for the
stages behind the last one; and if as many samples leave at each exit, compactions are as frequent as is best.

Times come from a profile of the device. Without one, FLOPs and bytes take their place, linear in the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

__all__ = ["CompactionPolicy", "StageTimes"]

_FLOPS_PER_BYTE = 10.0  # that a CPU does in the time of moving a byte: an order of magnitude

Row = tuple[float, ...]


class StageTimes(Protocol):
    """What the policy reads from a profile, see `e2cm_ext.calibration.Profile`."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def seconds(self, stage: int, samples: float) -> float: ...

    def move_seconds(self, exit: int, samples: float) -> float: ...


class CompactionPolicy(NamedTuple):
    """Costs of stages and of compaction, in any unit of time. A row of a table is for 0, 1, 2, ... samples.

    Attributes:
        cumulative_stages: [M+1] rows: row j is the cost of all stages before exit j; the last, of the whole network.
        moves: [M] rows: row j is the cost of moving so many survivors together at exit j.
    """

    cumulative_stages: tuple[Row, ...]
    moves: tuple[Row, ...]

    def carry_cost(self, exit: int, next_active_exit: int, rows: int, survivors: int) -> float:
        """What the stages between two exits spend on exited rows.

        Args:
            exit: The exit at which the batch is.
            next_active_exit: The next exit that can fire; M, the number of exits, if there is none.
            rows: Rows of the batch.
            survivors: How many of these have not exited.
        """
        before, behind = self.cumulative_stages[exit], self.cumulative_stages[next_active_exit]
        return (_cost(behind, rows) - _cost(before, rows)) - (_cost(behind, survivors) - _cost(before, survivors))

    def should_compact(self, exit: int, next_active_exit: int, rows: int, survivors: int, spent: float = 0.0) -> bool:
        """Whether to move the survivors together here. spent: on carrying since the last compaction; else as above."""
        return spent + self.carry_cost(exit, next_active_exit, rows, survivors) >= _cost(self.moves[exit], survivors)

    @classmethod
    def from_flops(cls, stages: Sequence[int], feature_bytes: Sequence[int]) -> CompactionPolicy:
        """Estimate the costs for a network that has no profile.

        Args:
            stages: FLOPs per sample of the M+1 stages.
            feature_bytes: Bytes of one sample's features at the M exits.
        """
        return cls(
            tuple((0.0, float(flops)) for flops in accumulate(stages)),
            tuple((0.0, _FLOPS_PER_BYTE * size) for size in feature_bytes),
        )

    @classmethod
    def from_profile(cls, profile: StageTimes) -> CompactionPolicy:
        """Read the costs from a profile of this device."""
        counts = range(profile.sizes[-1] + 1)
        exits = range(len(profile.names))
        stages = [[profile.seconds(j, n) for n in counts] for j in range(len(exits) + 1)]
        cumulative = zip(*(accumulate(column) for column in zip(*stages, strict=True)), strict=True)
        return cls(tuple(cumulative), tuple(tuple(profile.move_seconds(j, n) for n in counts) for j in exits))


def _cost(costs: Row, samples: int) -> float:
    """Beyond the end of a row, every sample costs as much as at the end."""
    last = len(costs) - 1
    return costs[samples] if samples <= last else costs[last] * samples / last
