"""What has been decided about each sample of a batch or a data set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decisions(NamedTuple):
    """Answers in input order; row i belongs to sample i.

    Exits write into the rows of the samples that leave there. A row that nobody has written yet holds prediction -1,
    exit -1 and NaN elsewhere.
    """

    prediction: Tensor  # [N] int64
    confidence: Tensor  # [N] float32: the largest probability
    exit: Tensor  # [N] int64: the number of the exit that answered
    log_probs: Tensor | None  # [N, K] float32, or None where nobody needs them

    @classmethod
    def empty(cls, count: int, num_classes: int | None = None, device: torch.device | str | None = None) -> Decisions:
        """Room for `count` answers; without `num_classes` no log-probabilities are kept."""
        nan = float("nan")
        return cls(
            prediction=torch.full((count,), -1, dtype=torch.int64, device=device),
            confidence=torch.full((count,), nan, dtype=torch.float32, device=device),
            exit=torch.full((count,), -1, dtype=torch.int64, device=device),
            log_probs=None
            if num_classes is None
            else torch.full((count, num_classes), nan, dtype=torch.float32, device=device),
        )
