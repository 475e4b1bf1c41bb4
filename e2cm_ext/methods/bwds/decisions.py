"""How the decision functions of BWDS are learned from losses and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FitDecision", "decision_score", "exit_labels", "fit_decision", "learn_at_price", "sweep"]

_RIDGE = 1e-4  # of standardised inputs, where weights have the mean 1
_MAX_ITERATIONS, _GRADIENT_TOLERANCE = 100, 1e-5  # of L-BFGS

FitDecision = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, labels, weights -> a decision function [F+1]


def exit_labels(
    loss_here: Tensor, loss_there: Tensor, cost_here: float, cost_there: Tensor, price: float
) -> tuple[Tensor, Tensor]:
    """Compute the labels and weights of the samples at one exit.

    Args:
        loss_here: [N], of leaving at this exit.
        loss_there: [N], of leaving where each sample would leave if it continued.
        cost_here: FLOPs of leaving at this exit.
        cost_there: [N], FLOPs of leaving there.
        price: FLOPs that a loss of 1 is worth.

    Returns:
        Which samples should leave [N] bool, and their weights [N].

    Example:
        leave, weight = bwds.exit_labels(torch.tensor([1.0]), torch.tensor([0.0]), 0.4, torch.tensor([0.7]), price=0.5)
    """
    gain = (cost_there - cost_here) - price * (loss_here - loss_there)
    return gain >= 0, gain.abs()


def sweep(
    inputs: Sequence[Tensor],
    losses: Tensor,
    costs: Sequence[float],
    prices: Sequence[float],
    fit: FitDecision | None = None,
) -> list[Tensor]:
    """Learn decision functions for rising prices. A sample that stays at a price stays at all higher ones.

    Args:
        inputs: Of the decision functions of the M exits [N, F] each.
        losses: [N, M+1], of leaving at each exit and at the end.
        costs: M+1 numbers, FLOPs of leaving there.
        prices: P rising numbers.
        fit: Learns one decision function; None: `fit_decision`.

    Returns:
        Decision functions of the M exits [P, F+1] each.
    """
    left = [torch.ones(len(losses), dtype=torch.bool, device=losses.device) for _ in inputs]
    decisions: list[list[Tensor]] = [[] for _ in inputs]
    for price in prices:
        at_price = learn_at_price(inputs, losses, costs, price, left, fit or fit_decision)
        for of_exit, decision in zip(decisions, at_price, strict=True):
            of_exit.append(decision)
    return [torch.stack(of_exit) for of_exit in decisions]


def learn_at_price(
    inputs: Sequence[Tensor],
    losses: Tensor,
    costs: Sequence[float],
    price: float,
    left: list[Tensor],
    fit: FitDecision,
) -> list[Tensor]:
    """Learn the decision functions for one price, from the last exit to the first.

    Args:
        inputs: Of the decision functions of the M exits [N, F] each.
        losses: [N, M+1], of leaving at each exit and at the end.
        costs: M+1 numbers, FLOPs of leaving there.
        price: FLOPs that a loss of 1 is worth.
        left: For each exit which samples leave there at all lower prices [N] bool. It is updated in place.
        fit: Learns one decision function.

    Returns:
        Decision functions of the M exits [F+1] each.
    """
    loss_there, cost_there = losses[:, -1], torch.full_like(losses[:, -1], costs[-1])
    decisions: list[Tensor] = []
    for j in reversed(range(len(inputs))):
        leave, weight = exit_labels(losses[:, j], loss_there, costs[j], cost_there, price)
        decisions.insert(0, fit(inputs[j], leave, weight))
        left[j] = left[j] & (decision_score(inputs[j], decisions[0]) > 0)
        loss_there = losses[:, j].where(left[j], loss_there)
        cost_there = cost_there.masked_fill(left[j], costs[j])
    return decisions


def decision_score(inputs: Tensor, decision: Tensor) -> Tensor:
    """Apply a decision function [F+1] to inputs [N, F]; the result [N] is above 0 where samples should leave."""
    return F.linear(inputs, decision[None, :-1], decision[-1:])[:, 0]


def fit_decision(inputs: Tensor, leave: Tensor, weight: Tensor) -> Tensor:
    """Learn one decision function by weighted logistic regression.

    Args:
        inputs: [N, F].
        leave: [N] bool, the labels.
        weight: [N].

    Returns:
        A linear function [F+1], its constant last.
    """
    mean, std = inputs.double().mean(0), inputs.double().std(0, correction=0)
    std = std.where(std > 1e-6 * (1 + mean.abs()), 1.0)  # an input that is the same for all samples
    x = (inputs.double() - mean) / std
    sign = leave.double().mul(-2).add(1)
    weight = weight.double() / weight.double().mean().clamp(min=1e-30)
    decision = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [decision],
        max_iter=_MAX_ITERATIONS,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=_GRADIENT_TOLERANCE,
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = (weight * F.softplus(sign * decision_score(x, decision))).mean() + _RIDGE / 2 * decision.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    slope = decision.detach()[:-1] / std
    return torch.cat([slope, (decision.detach()[-1] - slope @ mean)[None]]).to(inputs.dtype)
