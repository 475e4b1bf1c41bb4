"""The binomial distribution: how many of n independent samples something happens to that has the probability p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["probabilities", "upper_limit"]

_ROUNDS, _POINTS = 4, 65  # of a search that narrows a limit down to a 64th each time


def probabilities(n: int, p: Tensor | Sequence[float] | float, upto: int | None = None) -> Tensor:
    """[..., n + 1] float64: of 0, 1, ... n, or only up to `upto`, for every number in `p` [...]."""
    last = n if upto is None else min(n, upto)
    p = torch.as_tensor(p, dtype=torch.float64, device="cpu")[..., None]
    k = torch.arange(last + 1, dtype=torch.float64, device="cpu")
    total = torch.tensor(n + 1, dtype=torch.float64, device="cpu")
    ways = total.lgamma() - (k + 1).lgamma() - (total - k).lgamma()
    logarithms: Tensor = ways + torch.xlogy(k, p) + torch.special.xlog1py(n - k, -p)
    return logarithms.exp()


def upper_limit(k: int, n: int, error: float) -> float:
    """An upper confidence limit on p (Clopper and Pearson, 1934): it is too low with at most the probability `error`.

    It is the p at which k or fewer of n are as improbable as that.
    """
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(_ROUNDS):
        points = torch.linspace(low, high, _POINTS, dtype=torch.float64, device="cpu")
        below = int((probabilities(n, points[1:-1], k).sum(1) > error).sum())
        low, high = points[below : below + 2].tolist()
    return high
