"""Sees the features at every FastExit while a batch runs through a network.

The layers themselves hold no such state: other threads may be using them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from ..heads.protocol import Visit

__all__ = ["Watcher", "current_watcher", "watching"]


class Watcher:
    """Features at every exit, in the order in which the network calls them, and the network's logits."""

    def __init__(self, exits: dict[str, nn.Module], visit: Visit) -> None:
        self._names: Sequence[str] = list(exits)
        self._expected = list(exits.values())
        self._visit = visit
        self._called = 0  # exits so far
        self.logits: Tensor | None = None

    def see(self, exit: nn.Module, x: Tensor) -> None:
        """Take the features at an exit; refuse an exit that is called out of order."""
        j = self._called
        if j == len(self._expected) or exit is not self._expected[j]:
            found = next(
                (name for name, one in zip(self._names, self._expected, strict=True) if one is exit), "another"
            )
            raise RuntimeError(
                f"exit {found!r} was called as number {j}; wanted every exit once, in the order in which they are set "
                f"up: {', '.join(self._names)}"
            )
        self._called = j + 1
        self._visit(j, x)

    def refuse_missing(self, logits: bool) -> None:
        """Refuse a forward() that has left out an exit, or (if `logits`) state.result(logits)."""
        if self._called < len(self._expected):
            raise RuntimeError(f"exit {self._names[self._called]!r} was not called by the network's forward()")
        if logits and self.logits is None:
            raise RuntimeError("the network's forward() has not called state.result(logits)")


_watcher: ContextVar[Watcher | None] = ContextVar("e2cm_ext_watcher", default=None)


def current_watcher() -> Watcher | None:
    """The watcher of this thread's forward pass, if there is one."""
    return _watcher.get()


@contextmanager
def watching(watcher: Watcher) -> Iterator[Watcher]:
    """Let `watcher` see what FastExit layers are called with in this block."""
    token = _watcher.set(watcher)
    try:
        yield watcher
    finally:
        _watcher.reset(token)
