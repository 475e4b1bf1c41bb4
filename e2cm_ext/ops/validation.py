"""What the ops demand of their arguments. Every error names the argument, what came, and what is wanted."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .types import Decisions, Statistics

FEATURE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"confidence": 0, "entropy": 1}
# Looked up once: an attribute of a module costs as much as one of these validation.
_STRIDED, _FLOAT32, _INT64 = torch.strided, torch.float32, torch.int64


_is_compiling = torch.compiler.is_compiling
_active_modes = torch._C._len_torch_dispatch_stack
_jit_tracing = torch._C._get_tracing_state


def is_tracing() -> bool:
    """Is torch looking on: a compiler, a dispatch mode, torch.jit.trace? They see operators alone."""
    return bool(_is_compiling() or _active_modes() or _jit_tracing())


class Batch(NamedTuple):
    """A batch as the kernels see it: rows of `dim` numbers, dense inside, `stride` numbers apart."""

    tensor: Tensor
    dtype: int  # a code of FEATURE_DTYPES, -1 for any other
    rows: int
    dim: int
    stride: int
    channels_last: bool


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


def strided(name: str, value: Tensor, wanted: str) -> Tensor:
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


def channels_last_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


class HeadInput(NamedTuple):
    """What a head looks at: features themselves, or their statistics."""

    batch: Batch  # x
    features: Batch  # x again, in the order in which it is read
    numbers: tuple[int, ...] | None  # map and grids, as the compiled module takes them
    shape: tuple[int, ...]  # of one sample of it
    dim: int

    @property
    def what(self) -> str:
        return "`x`" if self.numbers is None else "the statistics"


def resolve_input(name: str, x: Tensor, statistics: Statistics | None) -> HeadInput:
    """x, and what of it is looked at: `statistics`, which is the argument `name` of whom the user has called."""
    f = features("x", x)
    if statistics is None:
        return HeadInput(f, f, None, tuple(f.tensor.shape[1:]), f.dim)
    if not isinstance(statistics, Statistics):
        raise TypeError(f"`{name}` is a {_kind(statistics)}; wanted e2cm_ext.Statistics")
    shape = f.tensor.shape[1:]
    size = statistics.size(shape)
    last = statistics.channels == -1
    read = features("x", f.tensor.contiguous()) if last and f.channels_last else f  # their channels lie elsewhere
    channels_last = int(last or f.channels_last)
    return HeadInput(f, read, (*statistics.map_of(shape), channels_last, *statistics.numbers[:7]), (size,), size)


def in_order_of(x: HeadInput, rows: Tensor) -> Tensor:
    """rows [N, ...] in the memory order of what is looked at: free if they are stored that way, a copy if not."""
    if x.numbers is not None or not x.features.channels_last:
        return rows if rows.is_contiguous() else rows.contiguous()
    return rows.reshape(-1, *x.shape).contiguous(memory_format=channels_last_format(x.features.tensor))


def class_vectors(name: str, x: HeadInput, rows: Tensor) -> tuple[Tensor, int, int]:
    """A vector per class in the memory order of what is looked at, their dtype's code, their number."""
    rows = strided(name, rows, "a tensor [classes, ...]")
    code = FEATURE_DTYPES.get(rows.dtype, -1)
    if code < 0:
        raise TypeError(f"`{name}` is {rows.dtype}; wanted float32, bfloat16 or float16: call .float()")
    same_device(name, rows, x.features.tensor)
    shape = rows.shape
    if len(shape) < 2 or shape[0] < 1 or (shape[1:] != x.shape and shape[1:] != (x.dim,)):
        raise ValueError(
            f"`{name}` has shape {list(shape)}; wanted [classes, ...] with classes >= 1 and, behind it, the shape of "
            f"one sample of {x.what}, {list(x.shape)}, or its {x.dim} features in a row"
        )
    return in_order_of(x, rows), code, shape[0]


def center(x: HeadInput, center: Tensor | None) -> Tensor | None:
    """The center as float32 in the memory order of what is looked at."""
    if center is None:
        return None
    center = strided("center", center, "a float32 tensor [features] or None")
    if not center.is_floating_point():
        raise TypeError(f"`center` is a {_kind(center)}; wanted a float32 tensor [features] or None")
    same_device("center", center, x.features.tensor)
    shape = center.shape
    if shape != (x.dim,) and shape != x.shape:
        raise ValueError(
            f"`center` has shape {list(shape)}; wanted that of one sample of {x.what}, {list(x.shape)}, or [{x.dim}]"
        )
    return in_order_of(x, center.float()[None])


def per_class(name: str, scale: Tensor, classes: int, like: Tensor) -> Tensor:
    scale = strided(name, scale, f"a float32 tensor [{classes}]")
    if not scale.is_floating_point():
        raise TypeError(f"`{name}` is a {_kind(scale)}; wanted a float32 tensor [{classes}]")
    same_device(name, scale, like)
    if scale.shape != (classes,):
        raise ValueError(f"`{name}` has shape {list(scale.shape)}; wanted [{classes}], one number per class")
    return scale if scale.dtype is _FLOAT32 and scale.is_contiguous() else scale.float().contiguous()


def is_number(value: object) -> bool:
    """Also numpy's and torch's; True is none."""
    return hasattr(value, "__float__") and not isinstance(value, bool)


def threshold_value(threshold: object) -> float:
    if type(threshold) is float and threshold == threshold:  # the usual case
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


def rule_code(rule: str) -> int:
    code = RULES.get(rule)
    if code is None:
        raise ValueError(f"`rule` is {rule!r}; wanted one of {', '.join(map(repr, RULES))}")
    return code


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


def decisions(out: Decisions, classes: int, like: Tensor) -> int:
    """Checks the tensors that answers are written into; returns the number of their rows."""
    try:
        prediction, confidence, exit, log_probs = out
    except (TypeError, ValueError):
        raise TypeError(f"`out` is a {type(out).__name__}; wanted Decisions: see Decisions.empty") from None
    shape = _room("prediction", prediction, _INT64, None, like)
    _room("confidence", confidence, _FLOAT32, shape, like)
    _room("exit", exit, _INT64, shape, like)
    if log_probs is not None:
        _room("log_probs", log_probs, _FLOAT32, (shape[0], classes), like)
    return shape[0]


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
