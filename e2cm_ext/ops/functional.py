"""The kernels: tensors in, tensors out.

On the CPU and on NVIDIA GPUs (cuda.py) a call goes straight to the compiled module; elsewhere, and in a build without
CUDA, the same functions of `reference` run. Inside torch.compile, torch.export and fake tensors a call becomes an
operator of the library `e2cm_ext`. Features may be float32, bfloat16 or float16, [B, ...] in NCHW or channels_last
order; they are not copied. All arithmetic is float32 or wider, and a sample's answer is the same bits whatever the
number of threads and whatever batch it sits in.

Class means or weights that meet many batches on the CPU should be packed once (`pack`) if there are more than 24 of
them: otherwise every call does that work, which takes most of its time if the batch is small. The heads do so.

A sample with a NaN or an infinity among its features gets NaN for a confidence and never leaves. A class whose scale
is not a positive finite number has no mean: it is never predicted. Ties go to the lowest class. Results carry no
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from . import cuda as gpu
from . import reference, validation
from .packing import Packed, pack
from .types import Decisions, Statistics

__all__ = [
    "ClassScores",
    "Packed",
    "class_distances",
    "class_scores",
    "compact",
    "decide",
    "decide_masked",
    "exit_step",
    "linear_scores",
    "linear_step",
    "pack",
    "statistics",
]

# Looked up once: an attribute of a module costs as much as looking at a tensor.
_is_tracing = validation.is_tracing
_threads = torch.get_num_threads
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

# An exit is done in one native call if its arguments are what nearly every call brings: plain tensors on the CPU, in
# shapes, dtypes and memory orders that fit (csrc/fast_path.cpp). For anything else, and for everything before torch
# 2.10, these give None, and the validated path is taken: it makes arguments fit or says what is wrong with them.
native.register_torch_types(Tensor, torch.nn.Parameter, Decisions, Statistics)
_try_exit_step, _try_decide = native.try_exit_step, native.try_decide
_try_linear_step = native.try_linear_step


class ClassScores(NamedTuple):
    confidence: Tensor  # [B] float32: the largest probability
    prediction: Tensor  # [B] int64
    log_probs: Tensor  # [B, K] float32


def statistics(x: Tensor, wanted: Statistics) -> Tensor:
    """[B, wanted.size(...)] float32: per channel means, root mean squares and maxima, of cells of the maps x [B, ...],
    and mean products of pairs of channels.

    All in one pass over x. A NaN reaches every statistic of its cell, and so does an infinity: a maximum, which would
    hide -inf, is NaN then. Squares are float32: features above 1e18 may have an infinite root mean square.
    """
    if _traced(x):
        made: Tensor = _statistics_op(x, wanted.numbers)
        return made
    return _statistics(x, wanted)


def class_distances(x: Tensor, means: Tensor | Packed, center: Tensor | None = None) -> Tensor:
    """Euclidean distances [B, K] float32 of every sample to every class mean.

    `center` is any vector near the data, best the average of the means. It changes no result but what rounding does to
    it: with many classes and features that share a large offset the fast way of computing a distance cancels, which is
    noticed and mended the slow way; a center avoids it. Up to 24 classes nothing can cancel, and it is not looked at.
    """
    means, center, panels = _parts(means, center)
    if _traced(x, means, center):
        distances: Tensor = _class_distances_op(x, means, center)
        return distances
    return _class_distances(x, means, center, panels)


def class_scores(
    x: Tensor,
    means: Tensor | Packed,
    scale: Tensor,
    center: Tensor | None = None,
    statistics: Statistics | None = None,
) -> ClassScores:
    """softmax over k of -||x[b] - means[k]|| / scale[k]: confidence, prediction and log-probabilities of every sample.

    x [B, ...]; means [K, ...] in the shape of x's samples, or [K, D], fastest if stored in x's memory order, or what
    `pack` has made of them and the center; scale [K]: the average distance of the training samples to that mean;
    `center`: see class_distances.
    `statistics`: of x, to be looked at in its place; means are [K, size] then, and the center is [size].
    """
    means, center, panels = _parts(means, center)
    if _traced(x, means, scale, center):
        return ClassScores(*_class_scores_op(x, means, scale, center, _numbers(statistics)))
    return ClassScores(*_class_scores(x, means, scale, center, panels, statistics))


def linear_scores(
    x: Tensor, weight: Tensor | Packed, bias: Tensor, statistics: Statistics | None = None
) -> ClassScores:
    """softmax over k of x[b] . weight[k] + bias[k]: class_scores of a linear head.

    x [B, ...]; weight [K, ...] in the shape of x's samples, or [K, D]; bias [K], -inf for a class that is never
    predicted. `statistics`: of x, to be looked at in its place; weight is [K, size] then. Features that are so large
    that a product with their weights is infinite count as infinite themselves.
    """
    weight, panels = _weight(weight)
    if _traced(x, weight, bias):
        return ClassScores(*_linear_scores_op(x, weight, bias, _numbers(statistics)))
    return ClassScores(*_linear_scores(x, weight, bias, panels, statistics))


def exit_step(
    x: Tensor,
    means: Tensor | Packed,
    scale: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    center: Tensor | None = None,
    statistics: Statistics | None = None,
    *,
    rule: str = "confidence",
    exit: int = 0,
) -> tuple[Tensor, Tensor]:
    """One exit, whole: class_scores, the rule, the leavers' answers, and the survivors moved together.

    Sample b has the number ids[b]; if it leaves, its answer is written into row ids[b] of `out` (ids must be distinct)
    with `exit` as the number of the exit. It leaves if its confidence is strictly above the threshold (compared in
    float32), or, with rule="entropy", if the entropy of its probabilities (natural logarithm) is strictly below.

    Returns the survivors, in their old order and memory format, and their ids. If all survive these are `x` and `ids`
    themselves, not copies.
    """
    means, center, panels = _parts(means, center)
    if not _is_tracing():
        done = _try_exit_step(x, means, scale, threshold, ids, out, center, statistics, rule, exit, panels, _threads())
        if done is not None:
            return done
    if _traced(x, means, scale, ids, center, out=out):
        result: tuple[Tensor, Tensor] = _exit_step_op(
            x, means, scale, _threshold_tensor(threshold), ids, *out, center, _numbers(statistics), rule, exit
        )
        return result
    return _exit_step(x, means, scale, threshold, ids, out, center, panels, statistics, rule, exit)


def linear_step(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    statistics: Statistics | None = None,
    *,
    rule: str = "confidence",
    exit: int = 0,
) -> tuple[Tensor, Tensor]:
    """exit_step of a linear head: see linear_scores, whose confidences these are, bit for bit."""
    weight, panels = _weight(weight)
    if not _is_tracing():
        done = _try_linear_step(x, weight, bias, threshold, ids, out, statistics, rule, exit, panels, _threads())
        if done is not None:
            return done
    if _traced(x, weight, bias, ids, out=out):
        result: tuple[Tensor, Tensor] = _linear_step_op(
            x, weight, bias, _threshold_tensor(threshold), ids, *out, _numbers(statistics), rule, exit
        )
        return result
    return _linear_step(x, weight, bias, threshold, ids, out, panels, statistics, rule, exit)


def decide(
    x: Tensor,
    scores: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    *,
    scale: Tensor | None = None,
    rule: str = "confidence",
    exit: int = 0,
) -> tuple[Tensor, Tensor]:
    """exit_step for the scores [B, K] that any other head has made of x.

    `scores` are logits; with `scale` [K] they are distances, and -scores / scale are the logits. A logit of -inf rules
    its class out; a row with a NaN or +inf never leaves.
    """
    if not _is_tracing():
        done = _try_decide(x, scores, threshold, ids, out, scale, rule, exit, _threads())
        if done is not None:
            return done
    if _traced(x, scores, ids, scale, out=out):
        result: tuple[Tensor, Tensor] = _decide_op(
            x, scores, _threshold_tensor(threshold), ids, *out, scale, rule, exit
        )
        return result
    return _decide(x, scores, threshold, ids, out, scale, rule, exit)


def decide_masked(
    scores: Tensor,
    threshold: float,
    pending: Tensor,
    ids: Tensor,
    out: Decisions,
    *,
    scale: Tensor | None = None,
    rule: str = "confidence",
    exit: int = 0,
) -> None:
    """decide without moving anybody: `pending` [B] says who has no answer yet, and is set to false for those who leave.

    Rows that do not wait are passed over. Nobody needs to know how many are left: on a GPU the host does not wait, and
    a CUDA graph can hold the call. Ids that are no row of `out` are trusted not to occur.
    """
    if _traced(scores, pending, ids, scale, out=out):
        _decide_masked_op(scores, threshold, pending, ids, *out, scale, rule, exit)
    else:
        _decide_masked(scores, threshold, pending, ids, out, scale, rule, exit)


def compact(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The samples of x (any dtype) where keep [B] is true, in their old order and memory format, and their numbers."""
    if _traced(x, keep):
        result: tuple[Tensor, Tensor] = _compact_op(x, keep)
        return result
    return _compact(x, keep)


# ---- eager: check, allocate, call -----------------------------------------------------------------------------------


def _traced(*tensors: Tensor | None, out: Decisions | tuple[()] = ()) -> bool:
    """Is this call to be seen by torch: by a compiler, a dispatch mode, a tensor that is not plain memory?"""
    if _is_tracing():
        return True
    if isinstance(out, tuple):
        tensors += out
    if _PLAIN.issuperset(map(type, tensors)):
        return False
    return any(isinstance(t, Tensor) and type(t) not in _PLAIN for t in tensors)


def _statistics(x: Tensor, wanted: Statistics) -> Tensor:
    look = validation.resolve_input("wanted", x, wanted)
    f = look.features
    if gpu.supports(x):
        return gpu.statistics(look)
    if not x.is_cpu:
        return reference.statistics(x, wanted)
    out = _floats(f.rows, look.dim)
    native.statistics(*_rows(f), look.numbers or (), out.data_ptr(), _threads())
    return out


def _parts(means: Tensor | Packed, center: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if type(means) is not Packed:
        return means, center, None  # type: ignore[return-value]
    if center is not None:
        raise ValueError("`center` is given, but `means` are packed: with the center that `pack` was given")
    return means.vectors, means.center, _panels(means)


def _panels(packed: Packed) -> Tensor | None:
    return None if _is_tracing() else packed.panels


def _weight(weight: Tensor | Packed) -> tuple[Tensor, Tensor | None]:
    if type(weight) is not Packed:
        return weight, None  # type: ignore[return-value]
    if weight.center is not None:
        raise ValueError("`weight` was packed with a center; a linear head has none")
    return weight.vectors, _panels(weight)


def _class_distances(x: Tensor, means: Tensor, center: Tensor | None, panels: Tensor | None = None) -> Tensor:
    look = validation.resolve_input("statistics", x, None)
    f = look.features
    m, m_dtype, classes = validation.class_vectors("means", look, means)
    center = validation.center(look, center)
    if gpu.supports(x):
        return gpu.class_distances(look, gpu.HeadParams(m, classes, True, center=center))
    if not x.is_cpu:
        return reference.class_distances(x, _like(look, means), center).float()
    out = _floats(f.rows, classes)
    native.class_distances(
        *_rows(f), m.data_ptr(), m_dtype, classes, _address(center), _usable(panels, m, means), out.data_ptr(),
        _threads(),
    )  # fmt: skip
    return out


def _class_scores(
    x: Tensor,
    means: Tensor,
    scale: Tensor,
    center: Tensor | None,
    panels: Tensor | None,
    statistics: Statistics | None,
) -> tuple[Tensor, Tensor, Tensor]:
    look = validation.resolve_input("statistics", x, statistics)
    f = look.features
    m, m_dtype, classes = validation.class_vectors("means", look, means)
    scale = validation.per_class("scale", scale, classes, x)
    center = validation.center(look, center)
    if gpu.supports(x):
        return gpu.scores(look, gpu.HeadParams(m, classes, True, scale, center))
    if not x.is_cpu:
        return reference.class_scores(x, _like(look, means), scale, center, statistics)
    confidence, prediction, log_probs = _floats(f.rows), _integers(f.rows), _floats(f.rows, classes)
    native.class_scores(
        *_rows(f), m.data_ptr(), m_dtype, classes, look.dim, _address(center), _usable(panels, m, means),
        scale.data_ptr(), confidence.data_ptr(), prediction.data_ptr(), log_probs.data_ptr(), look.numbers, _threads(),
    )  # fmt: skip
    return confidence, prediction, log_probs


def _linear_scores(
    x: Tensor, weight: Tensor, bias: Tensor, panels: Tensor | None, statistics: Statistics | None
) -> tuple[Tensor, Tensor, Tensor]:
    look = validation.resolve_input("statistics", x, statistics)
    f = look.features
    w, w_dtype, classes = validation.class_vectors("weight", look, weight)
    bias = validation.per_class("bias", bias, classes, x)
    if gpu.supports(x):
        return gpu.scores(look, gpu.HeadParams(w, classes, False, bias))
    if not x.is_cpu:
        return reference.linear_scores(x, _like(look, weight), bias, statistics)
    confidence, prediction, log_probs = _floats(f.rows), _integers(f.rows), _floats(f.rows, classes)
    native.linear_scores(
        *_rows(f), w.data_ptr(), w_dtype, classes, look.dim, _usable(panels, w, weight), bias.data_ptr(),
        confidence.data_ptr(), prediction.data_ptr(), log_probs.data_ptr(), look.numbers, _threads(),
    )  # fmt: skip
    return confidence, prediction, log_probs


def _exit_step(
    x: Tensor,
    means: Tensor,
    scale: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    center: Tensor | None,
    panels: Tensor | None,
    statistics: Statistics | None,
    rule: str,
    exit: int,
) -> tuple[Tensor, Tensor]:
    limit, code, exit = validation.threshold_value(threshold), validation.rule_code(rule), validation.exit_number(exit)
    look = validation.resolve_input("statistics", x, statistics)
    f = look.features
    m, m_dtype, classes = validation.class_vectors("means", look, means)
    scale = validation.per_class("scale", scale, classes, x)
    center = validation.center(look, center)
    ids = validation.sample_ids(ids, f.rows, x)
    out_rows = validation.decisions(out, classes, x)
    if gpu.supports(x):
        return gpu.step(x, look, gpu.HeadParams(m, classes, True, scale, center), code, limit, exit, ids, out)
    if not x.is_cpu:
        means = _like(look, means)
        return reference.exit_step(x, means, scale, limit, ids, out, center, statistics, rule=rule, exit=exit)
    keep = _integers(f.rows)
    prediction, confidence, exited, log_probs = out
    count = native.exit_step(
        *_rows(f), m.data_ptr(), m_dtype, classes, look.dim, _address(center), _usable(panels, m, means),
        scale.data_ptr(), code, limit, exit, ids.data_ptr(), out_rows, confidence.data_ptr(), prediction.data_ptr(),
        exited.data_ptr(), _address(log_probs), keep.data_ptr(), look.numbers, _threads(),
    )  # fmt: skip
    return _survivors(x, look.batch, ids, keep, count)


def _linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    panels: Tensor | None,
    statistics: Statistics | None,
    rule: str,
    exit: int,
) -> tuple[Tensor, Tensor]:
    limit, code, exit = validation.threshold_value(threshold), validation.rule_code(rule), validation.exit_number(exit)
    look = validation.resolve_input("statistics", x, statistics)
    f = look.features
    w, w_dtype, classes = validation.class_vectors("weight", look, weight)
    bias = validation.per_class("bias", bias, classes, x)
    ids = validation.sample_ids(ids, f.rows, x)
    out_rows = validation.decisions(out, classes, x)
    if gpu.supports(x):
        return gpu.step(x, look, gpu.HeadParams(w, classes, False, bias), code, limit, exit, ids, out)
    if not x.is_cpu:
        weight = _like(look, weight)
        return reference.linear_step(x, weight, bias, limit, ids, out, statistics, rule=rule, exit=exit)
    keep = _integers(f.rows)
    prediction, confidence, exited, log_probs = out
    count = native.linear_step(
        *_rows(f), w.data_ptr(), w_dtype, classes, look.dim, _usable(panels, w, weight), bias.data_ptr(), code, limit,
        exit, ids.data_ptr(), out_rows, confidence.data_ptr(), prediction.data_ptr(), exited.data_ptr(),
        _address(log_probs), keep.data_ptr(), look.numbers, _threads(),
    )  # fmt: skip
    return _survivors(x, look.batch, ids, keep, count)


def _decide(
    x: Tensor,
    scores: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    scale: Tensor | None,
    rule: str,
    exit: int,
) -> tuple[Tensor, Tensor]:
    f = validation.batch("x", x)
    s = validation.features("scores", scores)
    if scores.dim() != 2 or s.rows != f.rows or s.dim < 1:
        raise ValueError(f"`scores` has shape {list(scores.shape)}; wanted [{f.rows}, classes], one row per sample")
    validation.same_device("scores", scores, x)
    if scale is not None:
        scale = validation.per_class("scale", scale, s.dim, x)
    limit, code, exit = validation.threshold_value(threshold), validation.rule_code(rule), validation.exit_number(exit)
    ids = validation.sample_ids(ids, f.rows, x)
    out_rows = validation.decisions(out, s.dim, x)
    if gpu.supports(x):
        return gpu.decide(x, f, s, scale, code, limit, exit, ids, out)
    if not x.is_cpu:
        return reference.decide(x, scores, limit, ids, out, scale=scale, rule=rule, exit=exit)
    keep = _integers(f.rows)
    prediction, confidence, exited, log_probs = out
    count = native.decide(
        s.tensor.data_ptr(), s.dtype, s.rows, s.dim, s.stride, _address(scale), code, limit,
        exit, ids.data_ptr(), out_rows, confidence.data_ptr(), prediction.data_ptr(), exited.data_ptr(),
        _address(log_probs), keep.data_ptr(), _threads(),
    )  # fmt: skip
    return _survivors(x, f, ids, keep, count)


def _decide_masked(
    scores: Tensor,
    threshold: float,
    pending: Tensor,
    ids: Tensor,
    out: Decisions,
    scale: Tensor | None,
    rule: str,
    exit: int,
) -> None:
    s = validation.features("scores", scores)
    if scores.dim() != 2 or s.dim < 1:
        raise ValueError(f"`scores` has shape {list(scores.shape)}; wanted [batch, classes]")
    if validation.keep_mask(pending, s.rows, scores, "pending") is not pending:
        raise ValueError("`pending` is not contiguous; it is written in place")
    if scale is not None:
        scale = validation.per_class("scale", scale, s.dim, scores)
    limit, code, exit = validation.threshold_value(threshold), validation.rule_code(rule), validation.exit_number(exit)
    ids = validation.sample_ids(ids, s.rows, scores)
    validation.decisions(out, s.dim, scores)
    if gpu.supports(scores):
        gpu.decide_masked(s, scale, code, limit, exit, pending, ids, out)
    else:
        reference.decide_masked(scores, limit, pending, ids, out, scale=scale, rule=rule, exit=exit)


def _compact(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    f = validation.batch("x", x)
    keep = validation.keep_mask(keep, f.rows, x)
    if gpu.supports(x):
        return gpu.compact(f, keep)
    if not x.is_cpu:
        return reference.compact(x, keep)
    index = _integers(f.rows)
    count = native.kept_rows(keep.data_ptr(), f.rows, index.data_ptr())
    index = index[:count].clone()
    return _take(f, index), index


def _survivors(x: Tensor, f: validation.Batch, ids: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == f.rows:
        return x, ids
    if count == 0:
        return _empty_rows(f, 0), ids.new_empty(0)
    index = keep[:count]
    kept_ids = _integers(count)
    native.gather_rows(ids.data_ptr(), 8, 8, index.data_ptr(), count, kept_ids.data_ptr(), 1)
    return _take(f, index), kept_ids


def _take(f: validation.Batch, index: Tensor) -> Tensor:
    """Rows `index` of a batch, moved together in its memory format."""
    x = f.tensor
    out = _empty_rows(f, index.shape[0])
    size = x.element_size()
    native.gather_rows(
        x.data_ptr(), f.dim * size, f.stride * size, index.data_ptr(), index.shape[0], out.data_ptr(),
        _threads(),
    )  # fmt: skip
    return out


def _empty_rows(f: validation.Batch, count: int | torch.SymInt) -> Tensor:
    x = f.tensor
    if not f.channels_last:
        return x.new_empty((count, *x.shape[1:]))
    last = validation.channels_last_format(x)
    return torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=last)


# Whatever torch's default dtype and device are.
def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _usable(panels: Tensor | None, vectors: Tensor, packed: Tensor) -> int:
    """The panels' address, unless the vectors that they are of had to be brought into another order."""
    return 0 if panels is None or vectors.data_ptr() != packed.data_ptr() else panels.data_ptr()


def _rows(f: validation.Batch) -> tuple[int, int, int, int, int]:
    return f.tensor.data_ptr(), f.dtype, f.rows, f.dim, f.stride


def _like(look: validation.HeadInput, vectors: Tensor) -> Tensor:
    return vectors.reshape(-1, *look.shape)


# ---- torch.library: what torch.compile and torch.export see ---------------------------------------------------------


def _threshold_tensor(threshold: float | Tensor) -> Tensor:
    return threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float32)


def _numbers(statistics: Statistics | None) -> tuple[int, ...] | None:
    return None if statistics is None else statistics.numbers


def _of_numbers(n: Sequence[int]) -> Statistics:
    return Statistics((n[0], n[1]), (n[2], n[3]), (n[4], n[5]), n[6], n[7])


def _of_numbers_or_none(numbers: Sequence[int] | None) -> Statistics | None:
    return None if numbers is None else _of_numbers(numbers)


def _not_aliased(x: Tensor, ids: Tensor, survivors: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """An operator must not hand back its own inputs, which the eager call does when all survive."""
    if survivors is x:
        survivors = _empty_rows(_order_of(x), x.shape[0]).copy_(x)
    return survivors, kept.clone() if kept is ids else kept


def _order_of(x: Tensor) -> validation.Batch:
    """What _empty_rows must know of x, without a question about the size of the batch, which may be unknown."""
    return validation.Batch(x, -1, -1, -1, -1, validation.is_channels_last(x))


@torch.library.custom_op("e2cm_ext::class_distances", mutates_args=())
def _class_distances_op(x: Tensor, means: Tensor, center: Tensor | None) -> Tensor:
    return _class_distances(x, means, center)


@_class_distances_op.register_fake
def _(x: Tensor, means: Tensor, center: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], means.shape[0]), dtype=torch.float32)


@torch.library.custom_op("e2cm_ext::statistics", mutates_args=())
def _statistics_op(x: Tensor, wanted: Sequence[int]) -> Tensor:
    return _statistics(x, _of_numbers(wanted))


@_statistics_op.register_fake
def _(x: Tensor, wanted: Sequence[int]) -> Tensor:
    return x.new_empty((x.shape[0], _of_numbers(wanted).size(x.shape[1:])), dtype=torch.float32)


@torch.library.custom_op("e2cm_ext::class_scores", mutates_args=())
def _class_scores_op(
    x: Tensor, means: Tensor, scale: Tensor, center: Tensor | None, statistics: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _class_scores(x, means, scale, center, None, _of_numbers_or_none(statistics))


@_class_scores_op.register_fake
def _(
    x: Tensor, means: Tensor, scale: Tensor, center: Tensor | None, statistics: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _scores_like(x, means)


@torch.library.custom_op("e2cm_ext::linear_scores", mutates_args=())
def _linear_scores_op(
    x: Tensor, weight: Tensor, bias: Tensor, statistics: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _linear_scores(x, weight, bias, None, _of_numbers_or_none(statistics))


@_linear_scores_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, statistics: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    return _scores_like(x, weight)


def _scores_like(x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = x.shape[0], vectors.shape[0]
    return (
        x.new_empty((rows,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.int64),
        x.new_empty((rows, classes), dtype=torch.float32),
    )


_OUT = ("prediction", "confidence", "exited", "log_probs")


@torch.library.custom_op("e2cm_ext::exit_step", mutates_args=_OUT)
def _exit_step_op(
    x: Tensor,
    means: Tensor,
    scale: Tensor,
    threshold: Tensor,
    ids: Tensor,
    prediction: Tensor,
    confidence: Tensor,
    exited: Tensor,
    log_probs: Tensor | None,
    center: Tensor | None,
    statistics: Sequence[int] | None,
    rule: str,
    exit: int,
) -> tuple[Tensor, Tensor]:
    out = Decisions(prediction, confidence, exited, log_probs)
    looked = _of_numbers_or_none(statistics)
    survivors, kept = _exit_step(x, means, scale, threshold, ids, out, center, None, looked, rule, exit)
    return _not_aliased(x, ids, survivors, kept)


@torch.library.custom_op("e2cm_ext::linear_step", mutates_args=_OUT)
def _linear_step_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: Tensor,
    ids: Tensor,
    prediction: Tensor,
    confidence: Tensor,
    exited: Tensor,
    log_probs: Tensor | None,
    statistics: Sequence[int] | None,
    rule: str,
    exit: int,
) -> tuple[Tensor, Tensor]:
    out = Decisions(prediction, confidence, exited, log_probs)
    looked = _of_numbers_or_none(statistics)
    survivors, kept = _linear_step(x, weight, bias, threshold, ids, out, None, looked, rule, exit)
    return _not_aliased(x, ids, survivors, kept)


@torch.library.custom_op("e2cm_ext::decide", mutates_args=_OUT)
def _decide_op(
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    ids: Tensor,
    prediction: Tensor,
    confidence: Tensor,
    exited: Tensor,
    log_probs: Tensor | None,
    scale: Tensor | None,
    rule: str,
    exit: int,
) -> tuple[Tensor, Tensor]:
    out = Decisions(prediction, confidence, exited, log_probs)
    survivors, kept = _decide(x, scores, threshold, ids, out, scale, rule, exit)
    return _not_aliased(x, ids, survivors, kept)


@torch.library.custom_op("e2cm_ext::decide_masked", mutates_args=("pending", *_OUT))
def _decide_masked_op(
    scores: Tensor,
    threshold: float,
    pending: Tensor,
    ids: Tensor,
    prediction: Tensor,
    confidence: Tensor,
    exited: Tensor,
    log_probs: Tensor | None,
    scale: Tensor | None,
    rule: str,
    exit: int,
) -> None:
    out = Decisions(prediction, confidence, exited, log_probs)
    _decide_masked(scores, threshold, pending, ids, out, scale, rule, exit)


@_decide_masked_op.register_fake
def _(*_: object) -> None:
    return None


@torch.library.custom_op("e2cm_ext::compact", mutates_args=())
def _compact_op(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return _compact(x, keep)


def _some_rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """As many rows of x, in its memory format, as will be known only at run time; and one number for each."""
    count = torch.library.get_ctx().new_dynamic_size()
    return _empty_rows(_order_of(x), count), x.new_empty((count,), dtype=torch.int64)


@_exit_step_op.register_fake
def _(x, means, scale, threshold, ids, prediction, confidence, exited, log_probs, center, statistics, rule, exit):  # type: ignore[no-untyped-def]
    return _some_rows_of(x)


@_linear_step_op.register_fake
def _(x, weight, bias, threshold, ids, prediction, confidence, exited, log_probs, statistics, rule, exit):  # type: ignore[no-untyped-def]
    return _some_rows_of(x)


@_decide_op.register_fake
def _(x, scores, threshold, ids, prediction, confidence, exited, log_probs, scale, rule, exit):  # type: ignore[no-untyped-def]
    return _some_rows_of(x)


@_compact_op.register_fake
def _(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return _some_rows_of(x)
