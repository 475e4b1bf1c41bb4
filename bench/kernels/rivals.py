"""The ways to do an exit step: `ops.exit_step`, the best that can be written in torch, and two yardsticks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import e2cm_ext as e2cm

from .shapes import Layout, Problem, Shape, Step
from .timing import fastest

Scores = Callable[[Tensor], tuple[Tensor, Tensor]]  # features to confidence and log-probabilities
COMPILED = ("compile", "compile frozen", "max-autotune")  # by torch.compile, which may lack a compiler or a platform


def ours(p: Problem) -> Step:
    means = e2cm.ops.pack(p.means, p.center)
    return lambda: e2cm.ops.exit_step(p.x, means, p.scale, p.threshold, p.ids, p.out)


def unpacked(p: Problem) -> Step:
    return lambda: e2cm.ops.exit_step(p.x, p.means, p.scale, p.threshold, p.ids, p.out, p.center)


# ---- in torch -------------------------------------------------------------------------------------------------------


ROWS, COLUMNS = Layout(classes_dim=1), Layout(classes_dim=0)
ROWS_TRANSPOSED, COLUMNS_TRANSPOSED = ROWS._replace(transposed=True), COLUMNS._replace(transposed=True)


def cdist(p: Problem) -> Step:
    def scores(layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        distances = torch.cdist(x, p.means) if layout is ROWS else torch.cdist(p.means, x)
        return confidences(distances.mul_(layout.broadcast(-1 / p.scale)), layout.classes_dim)

    steps = [whole_step(p, functools.partial(scores, layout), layout) for layout in (ROWS, COLUMNS)]
    return steps[fastest(steps)]


def mm(p: Problem) -> Step:
    return mm_step(p, mm_layout(p))


def mm_centered(p: Problem) -> Step:
    return mm_step(p, mm_layout(p), p.center)


def compiled(p: Problem) -> Step:
    return mm_step(p, mm_layout(p), transform=functools.partial(torch.compile, dynamic=False, fullgraph=True))


class FrozenHead(torch.nn.Module):
    """Scores with constant weights, which inductor may pack for the matrix product; it does so for F.linear alone."""

    def __init__(self, p: Problem) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(-2 * p.means, requires_grad=False)
        self.bias = torch.nn.Parameter(p.means.square().sum(1), requires_grad=False)
        self.register_buffer("slope", -1 / p.scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        squares = torch.nn.functional.linear(x, self.weight, self.bias) + x.square().sum(1, keepdim=True)
        return confidences(squares.clamp_min(0).sqrt() * self.slope, 1)


def frozen(p: Problem, **options: bool) -> Step:
    head = FrozenHead(p).eval()
    scores = torch.compile(head, dynamic=False, fullgraph=True, options={"freezing": True, **options})
    return whole_step(p, scores, ROWS)


def mm_step(
    p: Problem, layout: Layout, center: Tensor | None = None, transform: Callable[[Any], Any] = lambda f: f
) -> Step:
    """||x - c||^2 = ||x||^2 - 2 x c + ||c||^2: one matrix product, with all that follows in place."""
    means = p.means if center is None else p.means - center
    norms, slope = layout.broadcast(means.square().sum(1)), layout.broadcast(-1 / p.scale)
    if layout.transposed:
        means = means.T.contiguous().T

    def scores(x: Tensor, means: Tensor, norms: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float() if center is None else x.float() - center
        x_norms = torch.linalg.vector_norm(x, dim=1).square_()  # the fastest of torch's ways to this sum
        if layout.classes_dim == 1:
            squares = torch.addmm(norms, x, means.T, alpha=-2).add_(x_norms[:, None])
        else:
            squares = torch.addmm(norms, means, x.T, alpha=-2).add_(x_norms)
        return confidences(squares.clamp_min_(0).sqrt_().mul_(slope), layout.classes_dim)

    scores = transform(scores)
    return whole_step(p, lambda x: scores(x, means, norms, slope), layout)


def mm_layout(p: Problem) -> Layout:
    """The fastest for this problem at this number of threads."""
    threads = torch.get_num_threads()
    if threads not in p.layouts:
        layouts = [ROWS, ROWS_TRANSPOSED, COLUMNS, COLUMNS_TRANSPOSED]
        p.layouts[threads] = layouts[fastest([mm_step(p, layout) for layout in layouts])]
    return p.layouts[threads]


def confidences(logits: Tensor, classes_dim: int) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(classes_dim)
    return log_probs.amax(classes_dim).exp(), log_probs


def whole_step(p: Problem, scores: Scores, layout: Layout) -> Step:
    """Scores, and what follows from them; predictions are computed for the samples that leave, and no others."""
    x, ids, out, classes_dim = p.x, p.ids, p.out, layout.classes_dim
    threshold = torch.tensor(p.threshold)  # compares faster than a float

    def step() -> tuple[Tensor, Tensor]:
        confidence, log_probs = scores(x)
        leaving = confidence > threshold
        rows = leaving.nonzero().squeeze(1)
        count = rows.shape[0]
        if count == 0:
            return x, ids
        at = ids.index_select(0, rows)
        answers = log_probs.index_select(1 - classes_dim, rows)
        out.prediction.scatter_(0, at, answers.argmax(classes_dim))
        out.confidence.scatter_(0, at, confidence.index_select(0, rows))
        out.exit.index_fill_(0, at, 0)
        out.log_probs.index_copy_(0, at, answers if classes_dim == 1 else answers.T)
        if count == x.shape[0]:
            return x[:0], ids[:0]
        stay = leaving.logical_not_().nonzero().squeeze(1)
        return x.index_select(0, stay), ids.index_select(0, stay)

    return step


# ---- yardsticks -----------------------------------------------------------------------------------------------------


def bare_product(p: Problem) -> Callable[[], Tensor]:
    means = p.means.to(p.x.dtype)
    steps = [lambda: p.x @ means.T, lambda: means @ p.x.T]
    return steps[fastest(steps)]


def bare_read(p: Problem) -> Callable[[], Tensor]:
    flat = p.x.flatten()
    steps = [flat.sum, lambda: torch.dot(flat, flat), flat.amax]
    return steps[fastest(steps)]


# ---- all of them ----------------------------------------------------------------------------------------------------

RIVALS: dict[str, Callable[[Problem], Step]] = {
    "cdist": cdist,
    "mm": mm,
    "mm centered": mm_centered,
    "compile": compiled,
    "compile frozen": frozen,
    "max-autotune": functools.partial(frozen, max_autotune=True),
}
YARDSTICKS: dict[str, Callable[[Problem], Callable[[], Any]]] = {"product": bare_product, "read": bare_read}
WAYS = {"ours": ours, "unpacked": unpacked, **RIVALS, **YARDSTICKS}
NOTES = """\
- ours: `e2cm_ext.ops.exit_step` with class means that `e2cm_ext.ops.pack` has packed with a center. unpacked (from 100
  classes on): with means as they are. Every way does the whole exit step, moving the survivors included.
- cdist: `torch.cdist`. mm: `torch.addmm` with the norms of the means. mm centered: the same after subtracting the
  center from x, as accuracy demands where features share an offset. For these the fastest layout ([B, K] or [K, B];
  means stored [K, D] or [D, K]) is found for every shape and number of threads before the clock runs.
- compile: `torch.compile` of what mm does up to the confidences. compile frozen (from 100 classes on): the same with
  constant weights, which inductor packs.
- product: x @ means.T alone. read: the fastest of `torch.sum`, `torch.dot(x, x)` and `torch.amax`. Neither is a rival.
- ratio: time of the best rival / ours, within one round: median [10th, 90th percentile] over the rounds.
- GB/s counts the features and the class means, each once; GFLOP/s counts 2 B K D.
- limit: max(bytes / read bandwidth of a working set of that size, operations / peak of multiply-add), both probed in
  every round; share: limit / time of ours, median over the rounds. Moving the survivors is in the time, not in the
  limit."""


def ways_for(shape: Shape, max_autotune: bool = False) -> list[str]:
    """Packing constant weights pays with many classes only; autotuning takes 10 s a shape and seldom finds anything."""
    left_out = set() if max_autotune else {"max-autotune"}
    if shape.classes < 100:
        left_out |= {"unpacked", "compile frozen"}
    return [way for way in WAYS if way not in left_out]
