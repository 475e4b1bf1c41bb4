"""Thresholds as the rest of the package takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["threshold_vector"]


def threshold_vector(thresholds: Tensor | Sequence[float], exits: int) -> Tensor:
    """[M] float32, in which thresholds are compared."""
    vector = torch.as_tensor(thresholds, dtype=torch.float32).detach().cpu()
    if vector.shape != (exits,):
        raise ValueError(f"`thresholds` has shape {list(vector.shape)}; wanted [{exits}], one per exit")
    if vector.isnan().any():
        raise ValueError(
            f"`thresholds` holds NaN at exit {int(vector.isnan().nonzero()[0])}; wanted numbers, or +-inf for an exit "
            "that never or always fires"
        )
    return vector
