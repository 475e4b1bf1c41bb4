"""The head of BWDS: a classifier with decision functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pooled_linear import PooledLinear

__all__ = ["PRICES", "Decider", "classifier_scores"]

# What an error may be worth, in FLOPs of the network: the inverse of the slope of a curve of accuracy over FLOPs.
PRICES = tuple(2.0 ** (i / 4) for i in range(-4, 25))

_INPUTS = ("scores", "features")
_MAX_LOG_MARGIN = 50.0  # of log-probabilities; the second probability may be 0


class Decider(PooledLinear, kind="bwds"):
    """A classifier, and one decision function per price.

    Args:
        num_classes: K.
        feature_shape: Of maps [C, H, W], tokens [N, C] or vectors [C].
        prices: P rising numbers above 0.
        inputs: Of the decision functions: "scores" (of the classifier) or "features" (pooled).

    Raises:
        ValueError: Prices do not rise, or `inputs` is unknown.
    """

    decisions: Tensor  # [P, F+1]: linear functions, their constants last; above 0: leave

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        *,
        prices: Sequence[float] = PRICES,
        inputs: str = "scores",
    ) -> None:
        super().__init__(num_classes, feature_shape)
        self.prices = tuple(map(float, prices))
        if not self.prices or not all(a < b for a, b in pairwise((0.0, *self.prices, math.inf))):
            raise ValueError(f"`prices` is {list(prices)}; wanted rising numbers above 0")
        if inputs not in _INPUTS:
            raise ValueError(f"`inputs` is {inputs!r}; wanted one of {', '.join(map(repr, _INPUTS))}")
        self.inputs = inputs
        size = num_classes + 4 if inputs == "scores" else self.linear.in_features
        self.register_buffer("decisions", torch.zeros(len(self.prices), size + 1))

    def decision_inputs(self, squeezed: Tensor, log_probs: Tensor) -> Tensor:
        """Return the inputs of the decision functions [B, F]."""
        return classifier_scores(log_probs) if self.inputs == "scores" else squeezed.float()

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities, and the certainty: the lowest price at which the sample does not leave."""
        squeezed = self.squeeze(x)
        log_probs = self.linear(squeezed).float().log_softmax(1)
        inputs = self.decision_inputs(squeezed, log_probs)
        decisions = self.decisions.float()
        leaves = F.linear(inputs, decisions[:, :-1], decisions[:, -1]) > 0
        left_at = leaves.long().cumprod(1).sum(1)  # at how many prices, from the lowest on
        limits = torch.tensor([*self.prices, 2 * self.prices[-1]], device=inputs.device)
        return log_probs, limits[left_at].masked_fill(log_probs.isnan().any(1), math.nan)

    def flops(self) -> int:
        """Count the classifier and all decision functions."""
        return super().flops() + 2 * self.decisions.shape[0] * (self.decisions.shape[1] - 1)

    def config(self) -> dict[str, Any]:
        return super().config() | {"prices": list(self.prices), "inputs": self.inputs}


def classifier_scores(log_probs: Tensor) -> Tensor:
    """Compute what decision functions may use of a classifier's log-probabilities [B, K].

    Returns:
        [B, K + 4]: the largest probability, its margin to the second, the margin of the logarithms, the entropy, and
        all probabilities.
    """
    probabilities = log_probs.exp()
    best = log_probs.topk(min(2, log_probs.shape[1]), 1).values
    first, second = best[:, 0], best[:, -1]
    entropy = -torch.where(probabilities > 0, probabilities * log_probs, probabilities).sum(1)
    log_margin = (first - second).clamp(max=_MAX_LOG_MARGIN)
    return torch.cat([torch.stack([first.exp(), first.exp() - second.exp(), log_margin, entropy], 1), probabilities], 1)
