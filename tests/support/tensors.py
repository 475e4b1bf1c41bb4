"""What several test files share: problems to solve, memory layouts, and what it means for two answers to agree."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from e2cm_ext import Decisions, ops
from e2cm_ext.ops import reference

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = ("contiguous", "channels_last", "rows apart", "channels_last rows apart", "features apart", "transposed")

# Of a distance, relative to float64: the contract. Seen at worst: 5e-6, where norms are 32 times what is left of them.
DISTANCE_ERROR = 1e-5
# Of a log-probability: absolute, per unit of the largest distance / scale, whose own rounding is its floor.
LOG_PROB_ERROR = 1e-5


class Problem(NamedTuple):
    x: Tensor
    means: Tensor
    scale: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(
    rows: int,
    shape: int | tuple[int, ...],
    classes: int,
    dtype: torch.dtype = torch.float32,
    means_dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    spread: float = 1.0,
    offset: float = 0.0,
) -> Problem:
    """Class means, and samples around them: some near, some far, so that scores of every size occur."""
    g = generator(seed)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    means = torch.randn(classes, *shape, generator=g)
    labels = torch.randint(classes, (rows,), generator=g)
    width = torch.rand(rows, *[1] * len(shape), generator=g) * spread
    x = means[labels] + width * torch.randn(rows, *shape, generator=g)
    scale = (0.03 + 0.3 * torch.rand(classes, generator=g)) * math.sqrt(2 * max(1, math.prod(shape)))
    return Problem((x + offset).to(dtype), (means + offset).to(means_dtype), scale)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other places; what lies between them is NaN, so that reading it is noticed."""
    if "channels_last" in layout and x.dim() in FORMATS:
        x = x.contiguous(memory_format=FORMATS[x.dim()])
    if layout.endswith("rows apart"):
        apart = torch.cat([x, torch.full_like(x, NAN)]) if x.is_floating_point() else torch.cat([x, x])
        if x.dim() in FORMATS and "channels_last" in layout:
            apart = apart.contiguous(memory_format=FORMATS[x.dim()])
        rows = x.shape[0]
        apart[0::2], apart[1::2] = x, apart[rows:].clone()
        return apart[::2]
    if layout == "features apart":
        apart = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), NAN if x.is_floating_point() else 1)
        apart[..., ::3] = x
        return apart[..., ::3]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaNs too, and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


@contextlib.contextmanager
def one_thread():
    """For the reference, whose many small operations otherwise wait for threads that a busy machine does not run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def in_float64(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, prediction and log-probabilities by the reference, in float64."""
    x, means, scale = problem
    return reference.class_scores(x.double(), means.double(), scale.double())


@one_thread()
def assert_distances_match(got: Tensor, x: Tensor, means: Tensor, error: float = DISTANCE_ERROR) -> None:
    expected = reference.class_distances(x.double(), means.double())
    assert got.shape == expected.shape
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=error, atol=0)


@one_thread()
def log_prob_tolerance(x: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    """[B, 1]: how far a log-probability of each row may be from its float64 value."""
    z = reference.class_distances(x.double(), means.double()) / scale.double()
    z = z.nan_to_num(posinf=0).clamp(min=0)
    return LOG_PROB_ERROR * (1 + z.amax(1, keepdim=True)) + 1e-6


def assert_log_probs_match(got: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """NaN and -inf where they are expected and nowhere else; the rest within the tolerance (of each row)."""
    assert got.shape == expected.shape
    assert got.dtype is torch.float32
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    wrong = (got.double() - expected).abs()[finite] - torch.as_tensor(tolerance).expand_as(expected)[finite]
    assert not (wrong > 0).any(), f"off by {wrong.max():.3g} more than allowed"


def assert_scores_match(got: ops.ClassScores, problem: Problem) -> None:
    confidence, prediction, log_probs = in_float64(problem)
    tolerance = log_prob_tolerance(*problem)
    assert_log_probs_match(got.log_probs, log_probs, tolerance)
    assert got.confidence.dtype is torch.float32
    assert got.prediction.dtype is torch.int64
    assert torch.equal(got.confidence.isnan(), confidence.isnan())
    gap = (got.confidence.double() - confidence).abs() / confidence
    assert not (gap > 2 * tolerance[:, 0]).any()
    assert_predictions_match(got.prediction, prediction, log_probs, tolerance)
    likeliest = got.log_probs.nan_to_num(nan=0).max(1).values
    at_prediction = got.log_probs.nan_to_num(nan=0).gather(1, got.prediction[:, None])[:, 0]
    assert torch.equal(at_prediction, likeliest)


def assert_predictions_match(got: Tensor, expected: Tensor, log_probs: Tensor, tolerance: Tensor) -> None:
    """The same class, unless two are so close that rounding decides: then one of these."""
    best = log_probs.amax(1, keepdim=True)
    close = (log_probs >= best - 2 * tolerance) & ~log_probs.isneginf()
    clear = close.sum(1) <= 1
    assert torch.equal(got[clear], expected[clear])
    assert close.gather(1, got[:, None])[~clear].all()


def entropy_of(log_probs: Tensor) -> Tensor:
    p = log_probs.double().exp()
    return -(p * log_probs.double()).nan_to_num(nan=0.0).sum(1).where(~log_probs.isnan().any(1), torch.tensor(NAN))


def leaving_in_float64(
    log_probs: Tensor, threshold: float, rule: str, margin: Tensor | float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Which rows leave, and which of these decisions is beyond doubt: further than `margin` from the threshold."""
    score = reference.best(log_probs)[0] if rule == "confidence" else entropy_of(log_probs)
    certain = ((score - threshold).abs() > margin) | score.isnan()
    return reference.leaves(log_probs, threshold, rule), certain


def sentinels(count: int, classes: int | None) -> Decisions:
    """Room for answers, every number of which is recognisable if it is not written."""
    return Decisions(
        torch.arange(count) - 10_000,
        torch.arange(count) + 0.5,
        torch.arange(count) - 20_000,
        None if classes is None else torch.arange(count * classes).float().reshape(count, classes) + 0.25,
    )


def copy_of(out: Decisions) -> Decisions:
    return Decisions(*(None if t is None else t.clone() for t in out))


def assert_same_decisions(got: Decisions, expected: Decisions) -> None:
    for name, a, b in zip(Decisions._fields, got, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or same_bits(a, b), name


def assert_survivors(survivors: Tensor, kept: Tensor, x: Tensor, ids: Tensor, stays: Tensor) -> None:
    """Bit for bit the rows of x that stay, in their old order, each dense and in the memory format of x."""
    assert same_bits(survivors, x[stays])
    assert torch.equal(kept, ids[stays])
    assert survivors.dtype is x.dtype
    if survivors.numel() == 0 or stays.all():  # nothing to lay out, or x as it came
        return
    if x.dim() in FORMATS and x[:1].is_contiguous(memory_format=FORMATS[x.dim()]):
        assert survivors.is_contiguous(memory_format=FORMATS[x.dim()])
    else:
        assert survivors.is_contiguous()


def shuffled_ids(rows: int, room: int, seed: int = 0) -> Tensor:
    """`rows` distinct numbers below `room`, in no order."""
    return torch.randperm(room, generator=generator(seed))[:rows]


# ---- hypothesis ----------------------------------------------------------------------------------

seeds = st.integers(0, 2**31 - 1)
row_counts = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 13, 16, 17, 31, 33, 64, 65, 67])
class_counts = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 10, 11, 13, 31, 47, 48, 49, 50, 97, 101])
flat_shapes = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 61, 127, 511, 512, 513, 1009, 1024, 1549]).map(
    lambda n: (n,)
)
image_shapes = st.tuples(*[st.sampled_from([1, 2, 3, 5, 7, 8, 11])] * 3)
volume_shapes = st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 4)
shapes = st.one_of(flat_shapes, image_shapes, volume_shapes, st.sampled_from([(0,), (2, 0, 3), (3, 5)]))


@st.composite
def problems(draw, rows=row_counts, classes=class_counts, shape=shapes) -> Problem:
    """x [B, ...] in any layout and dtype, means in the shape of its samples, scale."""
    x, means, scale = clusters(
        draw(rows),
        draw(shape),
        draw(classes),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)),
        seed=draw(seeds),
        spread=draw(st.sampled_from([0.0, 0.2, 1.0, 3.0])),
    )
    return Problem(laid_out(x, draw(st.sampled_from(LAYOUTS))), means, scale)


@st.composite
def forms_of_means(draw, means: Tensor) -> Tensor:
    """The same means as a user might store them: in the shape of a sample, in a row, in either memory order, apart."""
    form = draw(st.sampled_from(["shaped", "flat", "channels_last", "rows apart", "transposed"]))
    return means.flatten(1) if form == "flat" else laid_out(means, form)
