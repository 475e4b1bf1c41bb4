"""Warnings that point at the line outside of this package, and of torch, from which all began."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

__all__ = ["warn"]

_OURS = (
    f"{Path(__file__).parents[1].as_posix()}/",  # of the whole package
    f"{Path(torch.__file__).parent.as_posix()}/",
)


def warn(message: str) -> None:
    """Python shows a warning once for every line that it points at: not once for all callers of a function of ours."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).as_posix().startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
