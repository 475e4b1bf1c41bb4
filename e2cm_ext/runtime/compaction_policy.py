"""When moving the survivors of an exit together pays, and when it is cheaper to carry on with those who have left.

Moving takes the time of copying survivors' features. Carrying takes what the next stages spend on samples that have
left. Nobody knows at an exit how many will leave at the next ones, so it is the choice between renting and buying:
carry as long as all that has been paid for carrying since survivors were moved last, the stages up to the next exit
included, is less than what moving takes; then move. So no more is paid for carrying than for moving, but on the last
stretch; and if as many leave at each exit, survivors are moved as often as is best.

Times come from a Profile of the device. Without one, FLOPs and bytes stand for them: linear in the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..calibration.profile import Profile

__all__ = ["Compaction"]

_FLOPS_PER_BYTE = 10.0  # that a CPU does in the time of moving a byte: to the order of magnitude

Row = tuple[float, ...]


class Compaction(NamedTuple):
    """Costs, in any unit of time. Row j of a table holds those of 0, 1, 2, ... samples."""

    passed: tuple[Row, ...]  # [M+1]: of all stages up to number j, which is the one before exit j
    moving: tuple[Row, ...]  # [M]: of moving so many survivors at exit j

    def carrying(self, exit: int, until: int, rows: int, left: int) -> float:
        """What it costs to run the stages between the exits `exit` and `until` (or the end) on `rows` samples, though
        only `left` of them have no answer yet."""
        before, behind = self.passed[exit], self.passed[until]
        return (_at(behind, rows) - _at(before, rows)) - (_at(behind, left) - _at(before, left))

    def pays(self, exit: int, until: int, rows: int, left: int, paid: float = 0.0) -> bool:
        """Whether to move the `left` survivors among `rows` samples together, after `paid` was spent on carrying."""
        return paid + self.carrying(exit, until, rows, left) >= _at(self.moving[exit], left)

    @classmethod
    def by_flops(cls, stages: Sequence[int], sizes: Sequence[int]) -> Compaction:
        """A guess for networks of which no profile was made, from the FLOPs of the M+1 stages per sample, and how many
        bytes the features of a sample have at the M exits."""
        return cls(
            tuple((0.0, float(flops)) for flops in accumulate(stages)),
            tuple((0.0, _FLOPS_PER_BYTE * size) for size in sizes),
        )

    @classmethod
    def by_time(cls, profile: Profile) -> Compaction:
        """From what was measured on this device."""
        counts = range(profile.sizes[-1] + 1)
        exits = range(len(profile.names))
        stages = [[profile.seconds(j, n) for n in counts] for j in range(len(exits) + 1)]
        passed = zip(*(accumulate(column) for column in zip(*stages, strict=True)), strict=True)
        return cls(tuple(passed), tuple(tuple(profile.move_seconds(j, n) for n in counts) for j in exits))


def _at(costs: Row, samples: int) -> float:
    """More samples than the table knows take as long as its last ones each."""
    last = len(costs) - 1
    return costs[samples] if samples <= last else costs[last] * samples / last
