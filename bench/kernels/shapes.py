"""The exit steps that are timed: their sizes, their data, and what a right answer is."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import e2cm_ext as e2cm

Step = Callable[[], tuple[Tensor, Tensor]]  # one whole exit step: survivors and their ids


class Layout(NamedTuple):
    """What a torch user can choose without changing a result; which is fastest depends on the shape and the threads."""

    classes_dim: int  # 1: distances [B, K]; 0: distances [K, B], whose softmax runs over contiguous samples
    transposed: bool = False  # class means stored as [D, K]

    def broadcast(self, per_class: Tensor) -> Tensor:
        return per_class if self.classes_dim == 1 else per_class[:, None]


class Shape(NamedTuple):
    classes: int
    batch: int
    features: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = [
    *(Shape(10, *s) for s in [(1, 64), (1, 16384), (8, 4096), (128, 4096), (128, 16384), (32, 200704), (256, 64)]),
    Shape(10, 64, 802816),
    *(Shape(100, 128, features) for features in (64, 4096, 16384)),
    *(Shape(1000, *s) for s in [(64, 2048), (256, 1280), (64, 50176)]),
    *(Shape(*s) for s in [(100, 1, 4096), (100, 8, 512), (1000, 1, 2048), (1000, 8, 512)]),
]


@dataclass
class Problem:
    shape: Shape
    x: Tensor
    means: Tensor
    scale: Tensor
    center: Tensor
    ids: Tensor
    out: e2cm.Decisions
    log_probs: Tensor  # the right ones, from float64
    threshold: float
    layouts: dict[int, Layout] = field(default_factory=dict)  # number of threads: the fastest, see rivals.mm_layout

    @property
    def confidence(self) -> Tensor:
        return self.log_probs.amax(1).exp()

    @property
    def bytes(self) -> int:
        """What must be read at least: the features and the class means, each once."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.means))

    @property
    def operations(self) -> int:
        return 2 * math.prod(self.shape)


def make_problem(shape: Shape, dtype: torch.dtype = torch.float32, leave: str = "half") -> Problem:
    """Features as behind a ReLU: positive class means, and noise of another strength for every sample."""
    random_numbers = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=random_numbers)
    uniform = functools.partial(torch.rand, generator=random_numbers)
    means = normal(shape.classes, shape.features).abs_()
    labels = torch.arange(shape.batch) % shape.classes
    strength = 0.05 + uniform(shape.batch, 1)
    x = normal(shape.batch, shape.features).mul_(strength).add_(means[labels]).to(dtype)
    scale = (0.5 + 0.1 * uniform(shape.classes)) * math.sqrt(shape.features)
    log_probs = true_log_probs(x, means, scale)
    ids = torch.randperm(shape.batch, generator=random_numbers)
    out = e2cm.Decisions.empty(shape.batch, shape.classes)
    threshold = -math.inf if leave == "all" else threshold_between(log_probs.amax(1).exp())
    return Problem(shape, x, means, scale, means.mean(0), ids, out, log_probs, threshold)


def true_log_probs(x: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    squares = torch.zeros(x.shape[0], means.shape[0], dtype=torch.float64)
    for a, c in zip(x.split(1 << 16, dim=1), means.split(1 << 16, dim=1), strict=True):
        center = c.double().mean(0)
        a, c = a.double() - center, c.double() - center
        squares += a.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * a @ c.T
    return (squares.clamp_min(0).sqrt() / -scale.double()).log_softmax(1)


def threshold_between(confidence: Tensor) -> float:
    """In the widest gap near the median, so that no rounding changes a decision."""
    count = len(confidence)
    if count == 1:
        return float(confidence) / 2
    values = confidence.sort().values[math.floor(0.45 * count) : math.ceil(0.55 * count) + 1].tolist()
    low, high = max(itertools.pairwise(values), key=lambda pair: pair[1] / pair[0])
    return (low + high) / 2


def check(problem: Problem, step: Step) -> None:
    """Raises if one step does not do all that it should: its time would mean nothing."""
    for tensor in problem.out:
        tensor.fill_(-1)
    survivors, ids = step()
    leaving = problem.confidence > problem.threshold
    rows, out = problem.ids[leaving], problem.out
    expected = problem.log_probs[leaving]
    assert torch.equal(ids, problem.ids[~leaving]), "other samples leave"
    assert torch.equal(survivors, problem.x[~leaving]), "wrong survivors"
    assert torch.equal(out.prediction[rows], expected.argmax(1)), "wrong predictions"
    assert (out.exit[rows] == 0).all() and (out.exit[ids] == -1).all(), "wrong exits"
    torch.testing.assert_close(out.confidence[rows].double(), problem.confidence[leaving], rtol=1e-3, atol=0)
    torch.testing.assert_close(out.log_probs[rows].double(), expected, rtol=1e-3, atol=1e-3)
