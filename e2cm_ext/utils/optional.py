"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_optional"]


def import_optional(module: str, extra: str = "vision") -> Any:
    """Import a module of an optional package.

    Args:
        module: Such as "torchvision.datasets".
        extra: The extra of this package that installs it.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed, or cannot be imported; the error says what to install.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        package = module.partition(".")[0]
        raise ImportError(f"this needs {package}: pip install 'e2cm_ext[{extra}]' ({error})") from error
