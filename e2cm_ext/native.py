"""The one importer of the compiled module."""

import torch  # noqa: F401  (first, so that both share one OpenMP runtime)

try:
    from . import _native as _n
    from ._native import *  # noqa: F403
except ModuleNotFoundError as error:
    raise ImportError(
        "e2cm_ext has no compiled module here: `pip install .` makes one (`pip install -e .`, to work on the package); "
        "a checkout that is not installed cannot be imported"
    ) from error
globals().update({k: v for k, v in vars(_n).items() if not k.startswith("__")})
