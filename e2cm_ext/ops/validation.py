"""Validation of the arguments of the ops, each call to one normalised form that every backend takes.

Every error names the argument, what came, and what is wanted. Values that can be brought into the form that the kernels
read (dtype, memory order) are converted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from .calls import (
    FEATURE_DTYPES,
    HEAD_NAMES,
    RULES,
    Batch,
    Departure,
    HeadInput,
    HeadParams,
)
from .calls import channels_last_format as channels_last_format
from .types import Decisions, Statistics

# Looked up once: an attribute of a module costs as much as one of these checks.
_STRIDED, _FLOAT32, _INT64 = torch.strided, torch.float32, torch.int64
_is_compiling = torch.compiler.is_compiling
_active_modes = torch._C._len_torch_dispatch_stack
_jit_tracing = torch._C._get_tracing_state


def is_tracing() -> bool:
    """Is there a compiler, a dispatch mode or torch.jit.trace at work? They see nothing but operators of torch."""
    return bool(_is_compiling() or _active_modes() or _jit_tracing())


# ---- the normalised call of each op: a tuple; its first tensor says where the call runs -----------------------------


def resolve_input(name: str, x: Tensor, statistics: Statistics | None) -> HeadInput:
    """What of x is read: `statistics`, which is the argument `name` of the op, or the features themselves."""
    f = features("x", x)
    if statistics is None:
        return HeadInput(x, f, f, None, None, tuple(f.tensor.shape[1:]), f.dim)
    if not isinstance(statistics, Statistics):
        raise TypeError(f"`{name}` is a {_kind(statistics)}; wanted e2cm_ext.Statistics")
    shape = f.tensor.shape[1:]
    size = statistics.size(shape)
    last = statistics.channels == -1
    read = features("x", f.tensor.contiguous()) if last and f.channels_last else f  # their channels lie elsewhere
    numbers = (*statistics.map_of(shape), int(last or f.channels_last), *statistics.numbers[:7])
    return HeadInput(x, f, read, statistics, numbers, (size,), size)


def resolve_head(input: HeadInput, head: HeadParams, scored: bool = True) -> HeadParams:
    """The parameters as the kernels read them. Without `scored`, distances alone are wanted, and no scales."""
    kind, given_vectors, given_per_class, given_center, packed = head
    vectors_name, per_class_name = HEAD_NAMES[kind]
    vectors = class_vectors(vectors_name, input, given_vectors)
    per_class = number_per_class(per_class_name, given_per_class, vectors.size(0), input.x) if scored else None
    center = None if given_center is None else center_of_means(input, given_center)
    if vectors is given_vectors and per_class is given_per_class and center is given_center:
        return head
    # What was packed is of no use if the vectors had to be brought into another order.
    if packed is not None and vectors.data_ptr() != given_vectors.data_ptr():
        packed = None
    return HeadParams(kind, vectors, per_class, center, packed)


def resolve_departure(
    threshold: object, ids: Tensor, out: Decisions, rule: str, exit: object, rows: int, classes: int, like: Tensor
) -> Departure:
    limit, rule, number = threshold_value(threshold), rule_name(rule), exit_number(exit)
    return Departure(limit, sample_ids(ids, rows, like), decisions(out, classes, like), rule, number)


def resolve_statistics(x: Tensor, wanted: Statistics) -> tuple[Tensor, HeadInput]:
    return x, resolve_input("wanted", x, wanted)


def resolve_distances(x: Tensor, head: HeadParams) -> tuple[Tensor, HeadInput, HeadParams]:
    input = resolve_input("statistics", x, None)
    return x, input, resolve_head(input, head, scored=False)


def resolve_scores(x: Tensor, head: HeadParams, statistics: Statistics | None) -> tuple[Tensor, HeadInput, HeadParams]:
    input = resolve_input("statistics", x, statistics)
    return x, input, resolve_head(input, head)


def resolve_step(
    x: Tensor,
    head: HeadParams,
    statistics: Statistics | None,
    threshold: object,
    ids: Tensor,
    out: Decisions,
    rule: str,
    exit: object,
) -> tuple[Tensor, HeadInput, HeadParams, Departure]:
    _, input, head = resolve_scores(x, head, statistics)
    departure = resolve_departure(threshold, ids, out, rule, exit, input.batch.rows, head.classes, x)
    return x, input, head, departure


def resolve_decide(
    x: Tensor,
    scores: Tensor,
    threshold: object,
    ids: Tensor,
    out: Decisions,
    scale: Tensor | None,
    rule: str,
    exit: object,
) -> tuple[Tensor, Batch, Batch, Tensor | None, Departure]:
    f = batch("x", x)
    s = features("scores", scores)
    if scores.dim() != 2 or s.rows != f.rows or s.dim < 1:
        raise ValueError(f"`scores` has shape {list(scores.shape)}; wanted [{f.rows}, classes], one row per sample")
    same_device("scores", scores, x)
    if scale is not None:
        scale = number_per_class("scale", scale, s.dim, x)
    return x, f, s, scale, resolve_departure(threshold, ids, out, rule, exit, f.rows, s.dim, x)


def resolve_decide_masked(
    scores: Tensor,
    threshold: object,
    pending: Tensor,
    ids: Tensor,
    out: Decisions,
    scale: Tensor | None,
    rule: str,
    exit: object,
) -> tuple[Tensor, Batch, Tensor | None, Departure, Tensor]:
    s = features("scores", scores)
    if scores.dim() != 2 or s.dim < 1:
        raise ValueError(f"`scores` has shape {list(scores.shape)}; wanted [batch, classes]")
    if keep_mask(pending, s.rows, scores, "pending") is not pending:
        raise ValueError("`pending` is not contiguous; it is written in place")
    if scale is not None:
        scale = number_per_class("scale", scale, s.dim, scores)
    departure = resolve_departure(threshold, ids, out, rule, exit, s.rows, s.dim, scores)
    return scores, s, scale, departure, pending


def resolve_compact(x: Tensor, keep: Tensor) -> tuple[Tensor, Batch, Tensor]:
    f = batch("x", x)
    return x, f, keep_mask(keep, f.rows, x)


# ---- single arguments -----------------------------------------------------------------------------------------------


def batch(name: str, x: Tensor) -> Batch:
    """x [B, ...] of any dtype, without a copy wherever each sample is dense in NCHW or channels_last order."""
    x = strided(name, x, "a tensor [batch, ...]")
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"`{name}` has shape {list(shape)}; wanted [batch, features ...]: unsqueeze what is missing")
    code = FEATURE_DTYPES.get(x.dtype, -1)
    dim = math.prod(shape[1:])
    if x.is_contiguous():
        return Batch(x, code, shape[0], dim, dim, False)
    last = is_channels_last(x)
    if not last and not _dense(x, range(len(shape) - 1, 0, -1)):
        return Batch(x.contiguous(), code, shape[0], dim, dim, False)
    return Batch(x, code, shape[0], dim, x.stride(0), last)


def is_channels_last(x: Tensor) -> bool:
    """Is each sample dense with its channels innermost, and not in the usual order too? Asks nothing of the batch."""
    n = x.dim()
    return n in (4, 5) and not _dense(x, range(n - 1, 0, -1)) and _dense(x, (1, *range(n - 1, 1, -1)))


def _dense(x: Tensor, innermost_first: Iterable[int]) -> bool:
    expected = 1
    for d in innermost_first:
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return True


def strided(name: str, value: Tensor | None, wanted: str) -> Tensor:
    """A tensor that is memory with strides, and not a lazy negative or conjugate of it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__}; wanted {wanted}")
    if value.layout is not _STRIDED:
        raise TypeError(f"`{name}` has layout {value.layout}; wanted {wanted}, strided: call .to_dense()")
    if value.is_cpu and value.data_ptr() == 0 and value.numel() > 0:  # functionalize, zero tensors of autograd
        raise TypeError(f"`{name}` has no memory behind it; wanted {wanted}")
    return value.resolve_conj().resolve_neg() if value.is_conj() or value.is_neg() else value


def features(name: str, x: Tensor) -> Batch:
    found = batch(name, x)
    if found.dtype < 0:
        raise TypeError(f"`{name}` is {x.dtype}; wanted float32, bfloat16 or float16: call .float()")
    return found


def in_order_of(input: HeadInput, rows: Tensor) -> Tensor:
    """rows [N, ...] in the memory order of what is read: free if they are stored that way, a copy if not."""
    if input.numbers is not None or not input.features.channels_last:
        return rows if rows.is_contiguous() else rows.contiguous()
    last = channels_last_format(input.features.tensor)
    return rows.reshape(-1, *input.shape).contiguous(memory_format=last)


def class_vectors(name: str, input: HeadInput, rows: Tensor) -> Tensor:
    """A vector per class in the memory order of what is read."""
    rows = strided(name, rows, "a tensor [classes, ...]")
    if rows.dtype not in FEATURE_DTYPES:
        raise TypeError(f"`{name}` is {rows.dtype}; wanted float32, bfloat16 or float16: call .float()")
    same_device(name, rows, input.features.tensor)
    shape = rows.shape
    if len(shape) < 2 or shape[0] < 1 or (shape[1:] != input.shape and shape[1:] != (input.dim,)):
        raise ValueError(
            f"`{name}` has shape {list(shape)}; wanted [classes, ...] with classes >= 1 and, behind it, the shape of "
            f"one sample of {input.what}, {list(input.shape)}, or its {input.dim} features in a row"
        )
    return in_order_of(input, rows)


def center_of_means(input: HeadInput, center: Tensor) -> Tensor:
    """The center as float32 in the memory order of what is read."""
    center = strided("center", center, "a float32 tensor [features] or None")
    if not center.is_floating_point():
        raise TypeError(f"`center` is a {_kind(center)}; wanted a float32 tensor [features] or None")
    same_device("center", center, input.features.tensor)
    shape = center.shape
    if shape != (input.dim,) and shape != input.shape:
        raise ValueError(
            f"`center` has shape {list(shape)}; wanted that of one sample of {input.what}, {list(input.shape)}, or "
            f"[{input.dim}]"
        )
    return in_order_of(input, center.float()[None])


def number_per_class(name: str, numbers: Tensor | None, classes: int, like: Tensor) -> Tensor:
    numbers = strided(name, numbers, f"a float32 tensor [{classes}]")
    if not numbers.is_floating_point():
        raise TypeError(f"`{name}` is a {_kind(numbers)}; wanted a float32 tensor [{classes}]")
    same_device(name, numbers, like)
    if numbers.shape != (classes,):
        raise ValueError(f"`{name}` has shape {list(numbers.shape)}; wanted [{classes}], one number per class")
    return numbers if numbers.dtype is _FLOAT32 and numbers.is_contiguous() else numbers.float().contiguous()


def is_number(value: object) -> bool:
    """Also numpy's and torch's; True is none."""
    return hasattr(value, "__float__") and not isinstance(value, bool)


def threshold_value(threshold: object) -> float:
    if type(threshold) is float and threshold == threshold:  # the common case, not NaN
        return threshold
    if isinstance(threshold, Tensor) and threshold.numel() != 1:
        raise ValueError(f"`threshold` has shape {list(threshold.shape)}; wanted one number for this exit")
    if isinstance(threshold, str | bytes):
        raise TypeError(f"`threshold` is a {_kind(threshold)}; wanted a number")
    try:
        value = float(threshold)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"`threshold` is a {_kind(threshold)}; wanted a number") from None
    if math.isnan(value):
        raise ValueError("`threshold` is NaN; wanted a number, or +-inf for an exit that never or always fires")
    return value


def rule_name(rule: str) -> str:
    if rule not in RULES:
        raise ValueError(f"`rule` is {rule!r}; wanted one of {', '.join(map(repr, RULES))}")
    return rule


def exit_number(exit: object) -> int:
    try:
        number = operator.index(exit)  # type: ignore[arg-type]
        if -(2**63) <= number < 2**63:
            return number
    except TypeError:
        pass
    came = f"a {_kind(exit)}" if isinstance(exit, Tensor) else repr(exit)
    raise TypeError(f"`exit` is {came}; wanted the number of the exit, which an int64 can hold")


def sample_ids(ids: Tensor, rows: int, like: Tensor) -> Tensor:
    ids = strided("ids", ids, f"an int64 tensor [{rows}]")
    if ids.dtype is not _INT64:
        raise TypeError(f"`ids` is a {_kind(ids)}; wanted an int64 tensor [{rows}]")
    same_device("ids", ids, like)
    if ids.shape != (rows,):
        raise ValueError(f"`ids` has shape {list(ids.shape)}; wanted [{rows}], one per sample of `x`")
    return ids if ids.is_contiguous() else ids.contiguous()


def decisions(out: Decisions, classes: int, like: Tensor) -> Decisions:
    """The tensors that answers are written into."""
    try:
        prediction, confidence, exit, log_probs = out
    except (TypeError, ValueError):
        raise TypeError(f"`out` is a {type(out).__name__}; wanted Decisions: see Decisions.empty") from None
    shape = _room("prediction", prediction, _INT64, None, like)
    _room("confidence", confidence, _FLOAT32, shape, like)
    _room("exit", exit, _INT64, shape, like)
    if log_probs is not None:
        _room("log_probs", log_probs, _FLOAT32, (shape[0], classes), like)
    return Decisions(prediction, confidence, exit, log_probs)


def _room(
    name: str, tensor: Tensor, dtype: torch.dtype, wanted: tuple[int, ...] | None, like: Tensor
) -> tuple[int, ...]:
    if strided(f"out.{name}", tensor, f"{dtype}: see Decisions.empty") is not tensor or tensor.dtype is not dtype:
        raise TypeError(f"`out.{name}` is a {_kind(tensor)}; wanted {dtype}: see Decisions.empty")
    shape = tensor.shape
    if shape != wanted and (wanted is not None or len(shape) != 1):
        what = "[samples]" if wanted is None else list(wanted)
        raise ValueError(f"`out.{name}` has shape {list(shape)}; wanted {what}: see Decisions.empty")
    if not tensor.is_contiguous():
        raise ValueError(f"`out.{name}` is not contiguous; answers are written in place: see Decisions.empty")
    same_device(f"out.{name}", tensor, like)
    return shape


def keep_mask(keep: Tensor, rows: int, like: Tensor, name: str = "keep") -> Tensor:
    keep = strided(name, keep, f"a bool tensor [{rows}]")
    if keep.dtype is not torch.bool:
        raise TypeError(f"`{name}` is a {_kind(keep)}; wanted a bool tensor [{rows}]")
    same_device(name, keep, like)
    if keep.shape != (rows,):
        raise ValueError(f"`{name}` has shape {list(keep.shape)}; wanted [{rows}], one per sample of `x`")
    return keep.contiguous()


def same_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if not (tensor.is_cpu and like.is_cpu) and tensor.device != like.device:
        raise ValueError(f"`{name}` is on {tensor.device}, `x` on {like.device}; wanted both on one device")


def _kind(value: object) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
