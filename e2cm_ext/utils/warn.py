"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

__all__ = ["warn"]

_INTERNAL = (
    f"{Path(__file__).parents[1].as_posix()}/",  # of this package
    f"{Path(torch.__file__).parent.as_posix()}/",
)


def warn(message: str) -> None:
    """Warn at the innermost line outside of this package and of torch.

    Python shows a warning once per line that it points at. So every line of the user that calls into this package is
    warned, and not only the first one.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).as_posix().startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
