"""The command line, `e2cm`."""

from .commands import main

__all__ = ["main"]
