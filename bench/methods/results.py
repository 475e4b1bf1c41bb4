"""What a method gives: pairs of FLOPs and accuracy, and what is reported of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import e2cm_ext as e2cm
from e2cm_ext.calibration.search import Points, hull, pareto_front
from e2cm_ext.methods import training

from .. import markdown

BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.5, 0.75)
HEADER = ["method", "training", *(f"{b:.2f}" for b in BUDGETS), "exits", "numbers added", "core-seconds"]
Curve = Callable[[e2cm.Record], e2cm.Curve]


class Option(NamedTuple):
    """One threshold vector (or lambda, ...): mean FLOPs and accuracy where it was found, and on the test images."""

    flops: float
    accuracy: float
    test_flops: float
    test_accuracy: float


class Found(NamedTuple):
    options: list[Option]
    seconds: float  # of training, all cores
    parameters: int  # that the exits add
    exits: int


def options_of(held_out: e2cm.Record, test: e2cm.Record, curve: Curve = e2cm.curve) -> list[Option]:
    """The corners of a curve on the held-out images, and what they give on the test images."""
    found = []
    line = curve(held_out)
    for flops, accuracy, thresholds in zip(line.flops.tolist(), line.accuracy.tolist(), line.thresholds, strict=True):
        on_test = test.replay(thresholds)
        found.append(Option(flops, accuracy, on_test.flops, on_test.accuracy))
    return found


def at_budgets(budgets: Sequence[float], options: Sequence[Option]) -> list[dict[str, float] | None]:
    """By time sharing between the corners of the hull of all options, where they were found; measured on the test."""
    points = Points(*(torch.tensor([o[i] for o in options], dtype=torch.float64) for i in (0, 1, 0)))
    front = pareto_front(points)
    corners = [options[front[i]] for i in hull(points.pick(front))]

    def measured(budget: float) -> dict[str, float] | None:
        if budget < corners[0].flops:
            return None
        for left, right in itertools.pairwise(corners):
            if left.flops <= budget < right.flops:
                share = (right.flops - budget) / (right.flops - left.flops)
                flops, accuracy = (share * left[i] + (1 - share) * right[i] for i in (2, 3))
                return {"budget": budget, "flops": flops, "accuracy": accuracy}
        return {"budget": budget, "flops": corners[-1].test_flops, "accuracy": corners[-1].test_accuracy}

    return [measured(budget) for budget in budgets]


@torch.no_grad()
def record_from(cached: training.Cached, ee: e2cm.EarlyExit) -> e2cm.Record:
    """The same record as ee.record makes, from features (rule "confidence")."""
    assert ee.rule.name == "confidence"
    pieces = []
    for rows in torch.arange(len(cached.labels)).split(500):
        features, _ = cached.batch(rows)
        *early, last = (logits.log_softmax(1) for logits in training.ExitHeads(ee)(features))
        memory, answers = None, []
        for j, log_probs in enumerate([*early, last]):
            if ee.combination is not None:
                log_probs, memory = ee.combination(log_probs, memory, j, j == len(early))
            answers.append(log_probs)
        pieces.append(torch.stack(answers, 1))
    log_probs = torch.cat(pieces)
    return e2cm.Record(log_probs.amax(2).exp(), log_probs.argmax(2), cached.labels, ee.costs)


def parameters(ee: e2cm.EarlyExit) -> int:
    """Numbers that the exits hold, learned or averaged."""
    return sum(value.numel() for value in ee.heads.state_dict().values() if value.is_floating_point())


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    accuracies = [f"{point['accuracy']:.3f}" if point else "" for point in row["points"]]
    last = [str(row["exits"]), f"{row['parameters']:,}", f"{row['seconds']:.0f}"]
    return [row["method"], row["training"], *accuracies, *last]


def table(rows: list[dict[str, Any]]) -> str:
    return markdown.table(HEADER, map(cells, rows), left=2)
