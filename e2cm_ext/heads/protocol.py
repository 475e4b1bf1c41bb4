"""What fitting and recording need of a network with exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ["Visit", "Walk"]

Visit = Callable[[int, Tensor], None]


class Walk(Protocol):
    def __call__(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor: ...
