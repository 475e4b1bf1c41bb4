"""Tests of the CPU on a GPU: their calls of ops take the arguments there, same layout, and bring the results back.

With E2CM_EMULATED (see tests/conftest.py) "the GPU" is the CPU.
"""

from __future__ import annotations

import functools
import os

import torch

from e2cm_ext import Decisions

EMULATED = bool(os.environ.get("E2CM_EMULATED"))
DEVICE = "cpu" if EMULATED else "cuda"
HAS_GPU = EMULATED or torch.cuda.is_available()
OPS = (
    "statistics",
    "class_distances",
    "class_scores",
    "linear_scores",
    "exit_step",
    "linear_step",
    "decide",
    "decide_masked",
    "compact",
)


def there(value):
    """The same tensor on the GPU: same strides, same offset from a multiple of 16 bytes."""
    if isinstance(value, Decisions):
        return Decisions(*map(there, value))
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    value = value.detach()
    if value.layout is not torch.strided or value.is_neg() or value.is_conj() or type(value) is not torch.Tensor:
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return storage.to(DEVICE, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())


def back(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, tuple):
        parts = map(back, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def on_gpu(op):
    @functools.wraps(op)
    def call(*arguments, **named):
        moved = [there(a) for a in arguments]
        moved_named = {key: there(a) for key, a in named.items()}
        try:
            result = op(*moved, **moved_named)
        finally:
            for cpu, gone in [*zip(arguments, moved, strict=True), *((named[k], moved_named[k]) for k in named)]:
                if isinstance(cpu, Decisions):
                    for column, answered in zip(cpu, gone, strict=True):
                        if column is not None:
                            column.copy_(answered)
        if op.__name__ == "decide_masked":
            both = ((arguments, named), (moved, moved_named))
            pending, gone = (a[2] if len(a) > 2 else n["pending"] for a, n in both)
            pending.copy_(gone)
        if not isinstance(result, tuple):
            return back(result)
        pairs = list(zip([*arguments, *named.values()], [*moved, *moved_named.values()], strict=True))
        parts = [next((cpu for cpu, gone in pairs if gone is part), None) for part in result]
        parts = [back(part) if cpu is None else cpu for part, cpu in zip(result, parts, strict=True)]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)

    return call
