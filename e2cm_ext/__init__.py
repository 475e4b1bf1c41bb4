"""Early exits for trained image classifiers: every sample leaves the network as soon as it is recognised."""

import torch  # before _native, so that both share one OpenMP runtime

try:
    from ._native import build_info
except ModuleNotFoundError as error:
    raise ImportError(
        "e2cm_ext has no compiled module here: `pip install .` makes one (`pip install -e .`, to work on the package); "
        "a checkout that is not installed cannot be imported"
    ) from error
from . import ops, reference
from .decisions import Decisions

__version__: str = build_info()["version"]
__all__ = ["Decisions", "__version__", "build_info", "ops", "reference"]

del torch
