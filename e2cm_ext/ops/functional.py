"""The kernels: tensors in, tensors out.

On the CPU and on NVIDIA GPUs a call goes straight to the compiled module; elsewhere, and in a build without CUDA, the
same functions of `reference` run. Inside torch.compile, torch.export and fake tensors a call becomes an operator of the
library `e2cm_ext`. Features may be float32, bfloat16 or float16, [B, ...] in NCHW or channels_last order; they are not
copied. All arithmetic is float32 or wider. The answer for a sample is the same bits whatever the number of threads and
whatever batch it sits in.

Class means or weights that meet many batches on the CPU should be packed once (`pack`) if there are more than 24 of
them: otherwise every call does that work, which takes most of its time if the batch is small. The heads do so.

A sample with a NaN or an infinity among its features gets NaN for a confidence and never leaves. A class whose scale
is not a positive finite number has no mean: it is never predicted. Ties go to the lowest class. Results carry no
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from . import validation
from .calls import HeadParams
from .eager import run
from .library import OPS, call_operator
from .packing import Packed
from .types import ClassScores, Decisions, Statistics

# Looked up once: an attribute of a module costs as much as a test of a tensor.
_is_tracing = validation.is_tracing
_threads = torch.get_num_threads
_PLAIN = frozenset((Tensor, torch.nn.Parameter, Statistics, type(None), str, int, float))

# The fast path (csrc/fast_path.cpp): an exit is done in one native call if its arguments are what nearly every call
# brings: plain tensors on the CPU, in shapes, dtypes and memory orders that fit. For anything else, and with a torch
# older than 2.10, these return None before anything is written, and the validated path is taken: it converts arguments
# or says what is wrong with them.
native.register_torch_types(Tensor, torch.nn.Parameter, Decisions, Statistics)
_try_exit_step, _try_linear_step, _try_decide = native.try_exit_step, native.try_linear_step, native.try_decide


def statistics(x: Tensor, wanted: Statistics) -> Tensor:
    """Compute statistics of feature maps, in one pass over them.

    A NaN reaches every statistic of its cell, and so does an infinity: a maximum, which would hide -inf, is NaN then.
    Squares are float32: features above 1e18 may have an infinite root mean square.

    Args:
        x: Features [B, ...].
        wanted: Which statistics.

    Returns:
        float32 [B, wanted.size(...)].
    """
    result: Tensor = _call("statistics", x, wanted)
    return result


def class_distances(x: Tensor, means: Tensor | Packed, center: Tensor | None = None) -> Tensor:
    """Compute the Euclidean distance of every sample to every class mean.

    Args:
        x: Features [B, ...].
        means: Class means [K, ...] in the shape of a sample of x, or [K, D]; or what `pack` has made of them.
        center: Any vector near the data, best the average of the means. It changes no result but what rounding does to
            it: with many classes and features that share a large offset the fast way of computing a distance cancels,
            which is noticed and corrected at a cost; a center avoids it. Up to 24 classes nothing can cancel, and it is
            not read.

    Returns:
        Distances, float32 [B, K].
    """
    means, center, packed = _unpack_means(means, center)
    result: Tensor = _call("class_distances", x, HeadParams("distances", means, None, center, packed))
    return result


def class_scores(
    x: Tensor,
    means: Tensor | Packed,
    scale: Tensor,
    center: Tensor | None = None,
    statistics: Statistics | None = None,
) -> ClassScores:
    """Compute the answers of a class-mean head: the softmax over k of -||x[b] - means[k]|| / scale[k].

    Args:
        x: Features [B, ...].
        means: Class means [K, ...] in the shape of a sample of x, or [K, D], fastest if stored in the memory order of
            x; or what `pack` has made of them and the center.
        scale: The average distance of the training samples to each mean, [K].
        center: See `class_distances`.
        statistics: Statistics of x that are read in its place; means are [K, size] then, and the center is [size].

    Returns:
        Confidence, prediction and log-probabilities of every sample.

    Example:
        import torch
        from e2cm_ext import ops

        x, means = torch.randn(8, 64), torch.randn(10, 64)
        confidence, prediction, log_probs = ops.class_scores(x, means, scale=torch.full((10,), 8.0))
    """
    means, center, packed = _unpack_means(means, center)
    head = HeadParams("distances", means, scale, center, packed)
    return ClassScores(*_call("class_scores", x, head, statistics))


def linear_scores(
    x: Tensor, weight: Tensor | Packed, bias: Tensor, statistics: Statistics | None = None
) -> ClassScores:
    """Compute the answers of a linear head: the softmax over k of x[b] . weight[k] + bias[k].

    Features that are so large that a product with their weights is infinite count as infinite themselves.

    Args:
        x: Features [B, ...].
        weight: Weights [K, ...] in the shape of a sample of x, or [K, D]; or what `pack` has made of them.
        bias: [K]; -inf for a class that is never predicted.
        statistics: Statistics of x that are read in its place; weight is [K, size] then.

    Returns:
        Confidence, prediction and log-probabilities of every sample.
    """
    weight, packed = _unpack_weight(weight)
    head = HeadParams("logits", weight, bias, None, packed)
    return ClassScores(*_call("linear_scores", x, head, statistics))


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
    """Run one exit: scores, rule, answers of the samples that leave, and compaction of the survivors.

    Args:
        x: Features [B, ...].
        means: See `class_scores`.
        scale: See `class_scores`.
        threshold: A sample leaves if its confidence is strictly above (compared in float32), or, with rule="entropy",
            if the entropy of its probabilities (natural logarithm) is strictly below.
        ids: The number of each sample, int64 [B], distinct. The answer of sample b, if it leaves, is written into row
            ids[b] of `out`.
        out: Where the answers go; see `Decisions.empty`.
        center: See `class_distances`.
        statistics: See `class_scores`.
        rule: "confidence" or "entropy".
        exit: The number of this exit, for `out.exit`.

    Returns:
        The survivors, in their old order and memory format, and their ids. If all survive these are `x` and `ids`
        themselves, not copies.

    Raises:
        IndexError: An id is no row of `out`. On the CPU nothing has been written then.

    Example:
        import torch
        from e2cm_ext import Decisions, ops

        x, means, scale = torch.randn(8, 64), torch.randn(10, 64), torch.full((10,), 8.0)
        ids, out = torch.arange(8), Decisions.empty(8, num_classes=10)
        x, ids = ops.exit_step(x, means, scale, 0.5, ids, out)  # the samples that stay
        out.prediction  # -1 for them
    """
    means, center, packed = _unpack_means(means, center)
    if not _is_tracing():
        done = _try_exit_step(x, means, scale, threshold, ids, out, center, statistics, rule, exit, packed, _threads())
        if done is not None:
            return done
    head = HeadParams("distances", means, scale, center, packed)
    result: tuple[Tensor, Tensor] = _call("exit_step", x, head, statistics, threshold, ids, out, rule, exit)
    return result


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
    """Run one exit with a linear head. The confidences are those of `linear_scores`, bit for bit.

    Args:
        x: Features [B, ...].
        weight: See `linear_scores`.
        bias: See `linear_scores`.
        threshold: See `exit_step`.
        ids: See `exit_step`.
        out: See `exit_step`.
        statistics: See `linear_scores`.
        rule: "confidence" or "entropy".
        exit: The number of this exit, for `out.exit`.

    Returns:
        The survivors and their ids, as `exit_step` does.

    Raises:
        IndexError: An id is no row of `out`. On the CPU nothing has been written then.
    """
    weight, packed = _unpack_weight(weight)
    if not _is_tracing():
        done = _try_linear_step(x, weight, bias, threshold, ids, out, statistics, rule, exit, packed, _threads())
        if done is not None:
            return done
    head = HeadParams("logits", weight, bias, None, packed)
    result: tuple[Tensor, Tensor] = _call("linear_step", x, head, statistics, threshold, ids, out, rule, exit)
    return result


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
    """Run one exit with scores that any other head has made of x.

    Args:
        x: What survivors carry on, of any dtype, [B, ...].
        scores: Logits [B, K]; with `scale` they are distances, and -scores / scale are the logits. A logit of -inf
            rules its class out; a row with a NaN or +inf never leaves.
        threshold: See `exit_step`.
        ids: See `exit_step`.
        out: See `exit_step`.
        scale: [K], or None.
        rule: "confidence" or "entropy".
        exit: The number of this exit, for `out.exit`.

    Returns:
        The survivors and their ids, as `exit_step` does.

    Raises:
        IndexError: An id is no row of `out`. On the CPU nothing has been written then.
    """
    if not _is_tracing():
        done = _try_decide(x, scores, threshold, ids, out, scale, rule, exit, _threads())
        if done is not None:
            return done
    result: tuple[Tensor, Tensor] = _call("decide", x, scores, threshold, ids, out, scale, rule, exit)
    return result


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
    """Run one exit without compaction: samples that leave stay in the batch and are marked.

    The number of survivors is not asked for: on a GPU the host does not wait, and a CUDA graph can hold the call.

    Args:
        scores: See `decide`.
        threshold: See `exit_step`.
        pending: Which rows have no answer yet, bool [B]. Written: false for the rows that leave. Rows where it is false
            are passed over.
        ids: See `exit_step`. Ids that are no row of `out` are trusted not to occur.
        out: See `exit_step`.
        scale: See `decide`.
        rule: "confidence" or "entropy".
        exit: The number of this exit, for `out.exit`.
    """
    _call("decide_masked", scores, threshold, pending, ids, out, scale, rule, exit)


def compact(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Move some samples of a batch together.

    Args:
        x: Samples of any dtype, [B, ...].
        keep: Which of them, bool [B].

    Returns:
        These samples, in their old order and memory format, and their row numbers in x, int64.
    """
    result: tuple[Tensor, Tensor] = _call("compact", x, keep)
    return result


def _call(name: str, *arguments: Any) -> Any:
    """Runs an op now, or as an operator of torch where torch must see it."""
    if _is_traced(arguments):
        return call_operator(name, *arguments)
    return run(OPS[name], *arguments)


def _is_traced(arguments: tuple[object, ...]) -> bool:
    """Is a compiler or a dispatch mode at work, or an argument a tensor that is not plain memory?"""
    if _is_tracing():
        return True
    for argument in arguments:
        if type(argument) in _PLAIN:
            continue
        values = argument if isinstance(argument, tuple) else (argument,)  # HeadParams and Decisions are tuples
        if not _PLAIN.issuperset(map(type, values)) and any(map(_is_other_tensor, values)):
            return True
    return False


def _is_other_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and type(value) not in _PLAIN


def _unpack_means(means: Tensor | Packed, center: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Means, center, and what was packed of them."""
    if type(means) is not Packed:
        return means, center, None  # type: ignore[return-value]
    if center is not None:
        raise ValueError("`center` is given, but `means` are packed: with the center that `pack` was given")
    return means.vectors, means.center, _panels(means)


def _unpack_weight(weight: Tensor | Packed) -> tuple[Tensor, Tensor | None]:
    if type(weight) is not Packed:
        return weight, None  # type: ignore[return-value]
    if weight.center is not None:
        raise ValueError("`weight` was packed with a center; a linear head has none")
    return weight.vectors, _panels(weight)


def _panels(packed: Packed) -> Tensor | None:
    return None if _is_tracing() else packed.panels
