"""The compiled module `_native`. Nothing else imports it."""

import torch  # noqa: F401  # before _native, so that both share one OpenMP runtime

try:
    from ._native import *  # noqa: F403
except ModuleNotFoundError as error:
    raise ImportError(
        "e2cm_ext has no compiled module here: `pip install .` makes one (`pip install -e .`, to work on the package); "
        "a checkout that is not installed cannot be imported"
    ) from error
