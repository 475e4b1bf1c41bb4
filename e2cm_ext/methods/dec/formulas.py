"""The formulas of DEC."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["divergence", "soft_assignment", "target"]


def soft_assignment(codes: Tensor, centres: Tensor) -> Tensor:
    """Assign samples to clusters by Student's t distribution with one degree of freedom.

    Args:
        codes: [N, D].
        centres: [K, D].

    Returns:
        q [N, K]: 1 / (1 + |code - centre|^2), divided by its sum over the clusters.

    Example:
        q = dec.soft_assignment(torch.randn(5, 10), torch.randn(3, 10))
    """
    squared_distances = (codes[:, None] - centres).square().sum(2)
    q = 1 / (1 + squared_distances)
    return q / q.sum(1, keepdim=True)


def target(q: Tensor) -> Tensor:
    """Compute the target distribution.

    Args:
        q: [N, K], of all samples.

    Returns:
        p [N, K]: q^2 divided by the sum of q over the samples, divided by its sum over the clusters.

    Example:
        p = dec.target(dec.soft_assignment(torch.randn(5, 10), torch.randn(3, 10)))
    """
    weight = q.square() / q.sum(0)
    return weight / weight.sum(1, keepdim=True)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Compute KL(p || q), the mean over the samples.

    Args:
        p: [N, K].
        q: [N, K].

    Returns:
        A scalar.

    Example:
        q = dec.soft_assignment(torch.randn(5, 10), torch.randn(3, 10))
        loss = dec.divergence(dec.target(q), q)
    """
    of_samples: Tensor = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return of_samples.sum(1).mean()
