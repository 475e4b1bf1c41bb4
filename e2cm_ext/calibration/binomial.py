"""The binomial distribution: how many of n independent samples have an outcome of probability p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pmf", "upper_limit"]

_ROUNDS, _POINTS = 4, 65  # of a grid search that narrows an interval to a 64th each time


def pmf(n: int, p: Tensor | Sequence[float] | float, upto: int | None = None) -> Tensor:
    """The probabilities of 0, 1, ... n, or only up to `upto`.

    Args:
        n: Number of samples.
        p: [...] probabilities.
        upto: The last count wanted; None: n.

    Returns:
        [..., n + 1] float64, or [..., upto + 1].
    """
    last = n if upto is None else min(n, upto)
    p = torch.as_tensor(p, dtype=torch.float64, device="cpu")[..., None]
    k = torch.arange(last + 1, dtype=torch.float64, device="cpu")
    total = torch.tensor(n + 1, dtype=torch.float64, device="cpu")
    log_combinations = total.lgamma() - (k + 1).lgamma() - (total - k).lgamma()
    log_pmf: Tensor = log_combinations + torch.xlogy(k, p) + torch.special.xlog1py(n - k, -p)
    return log_pmf.exp()


def upper_limit(k: int, n: int, error: float) -> float:
    """An upper confidence limit on p, after k of n samples (Clopper and Pearson, 1934).

    It is the p at which k or fewer of n have the probability `error`, so it is too low with at most that probability.
    """
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(_ROUNDS):
        points = torch.linspace(low, high, _POINTS, dtype=torch.float64, device="cpu")
        below = int((pmf(n, points[1:-1], k).sum(1) > error).sum())
        low, high = points[below : below + 2].tolist()
    return high
