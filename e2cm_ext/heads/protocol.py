"""What fitting, recording, timing and calibration need of a network with exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..stages.flops import Costs
from .base import Head
from .ensemble import Combination
from .rules import Rule

__all__ = ["ExitNetwork", "Visit", "Walk"]

Visit = Callable[[int, Tensor], None]


class Walk(Protocol):
    """Runs a network on a batch; calls visit(j, features) at exit j, before the network goes on and may overwrite them.

    Returns the logits; anything if `logits` is false.
    """

    def __call__(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor: ...


class ExitNetwork(Protocol):
    """A network with exits: EarlyExit, or a network with FastExit layers.

    `combination` says how exits answer together; None: each answers for itself. `costs` may be asked for only after the
    network has run.
    """

    @property
    def exit_names(self) -> tuple[str, ...]: ...

    @property
    def rule(self) -> Rule: ...

    @property
    def combination(self) -> Combination | None: ...

    @property
    def costs(self) -> Costs: ...

    def head_list(self) -> list[Head]: ...

    def walk(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor: ...
