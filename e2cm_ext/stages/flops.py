"""Floating-point operations per sample of stages and of heads.

torch's FlopCounterMode counts, with a multiply-add as two operations, so that published figures can be compared: it
sees convolutions, matrix products and attention, and nothing else. (It misses the CPU kernels of attention; they are
added here.) Elementwise operations, activations, normalisation and pooling count as 0. Counting
them too (one operation per element for a ReLU or a sum, 2 for batch normalisation, 4 for hard-swish ...) adds 0.5% to
ResNet-50, 4.3% to MobileNetV3-Large and 6.4% to EfficientNet-B0, and raises the cost of leaving at an exit, as a
fraction of the whole, by at most .002, .009 and .023. So they are left out, as in published figures.

Nothing is computed while counting: a copy of the network on the meta device, where tensors have a shape but no memory,
takes the sample. Only a network that cannot run there, because it depends on values, runs as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

__all__ = ["Costs", "count_flops"]

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def count_flops(module: nn.Module, x: Tensor) -> int:
    """Count the FLOPs (multiply-adds x 2) of a module for one sample of the shape of those in the batch `x`."""

    def run(module: nn.Module, sample: Tensor) -> int:
        with counting() as flops_so_far:
            module(sample)
            return flops_so_far()

    return on_meta_device(run, module, one_sample(x, "x"))


@dataclass(frozen=True)
class Costs:
    """FLOPs per sample of every stage and every head. Exit j stands behind stage j.

    Attributes:
        stages: M+1 numbers.
        heads: M numbers.
        names: Names of the M exits.

    Example:
        >>> print(ee.costs)  # a table
        >>> ee.costs.fractions  # what leaving at each exit costs, as a fraction of the base network
    """

    stages: tuple[int, ...]
    heads: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        exits = len(self.names)
        if len(self.stages) != exits + 1 or len(self.heads) != exits:
            raise ValueError(
                f"{exits} `names` need {exits + 1} `stages` and {exits} `heads`; "
                f"here are {len(self.stages)} and {len(self.heads)}"
            )
        if self.base <= 0:
            raise ValueError(
                f"`stages` cost {self.base} FLOPs in all; wanted more than 0: fractions of the base network are taken. "
                "Only convolutions, matrix products and attention are counted"
            )

    @property
    def base(self) -> int:
        """FLOPs of the base network, without any head."""
        return sum(self.stages)

    @property
    def fractions(self) -> Tensor:
        """[M+1] float64: cost of a sample that leaves at exit j, as a fraction of the base network's cost.

        All stages up to the exit and all heads up to and including its own count. The last number is the cost of a
        sample that never leaves early: all stages and all heads, more than 1.
        """
        spent = accumulate(stage + head for stage, head in zip(self.stages, (*self.heads, 0), strict=True))
        return torch.tensor([total / self.base for total in spent], dtype=torch.float64)

    def with_active_heads(self, thresholds: Sequence[float]) -> Costs:
        """The same with nothing for heads at exits that are off (threshold +inf): these are not computed."""
        heads = (head if limit < math.inf else 0 for head, limit in zip(self.heads, thresholds, strict=True))
        return replace(self, heads=tuple(heads))

    def numbers(self, exits: Iterable[str | int]) -> list[int]:
        """Return the numbers of exits that are given by name or number: in the order of the network, each once."""
        if isinstance(exits, str):
            raise TypeError(f"`exits` is the string {exits!r}; wanted a sequence of names or numbers of exits")
        found = set()
        for exit in exits:
            if exit in self.names:
                found.add(self.names.index(str(exit)))
            elif isinstance(exit, int) and not isinstance(exit, bool) and 0 <= exit < len(self.names):
                found.add(exit)
            else:
                raise ValueError(
                    f"`exits` holds {exit!r}; wanted names or numbers (0 to {len(self.names) - 1}) of exits: "
                    f"{', '.join(self.names)}"
                )
        return sorted(found)

    def at_exits(self, numbers: Sequence[int]) -> Costs:
        """Return the costs with these exits only: the stages between them are joined."""
        bounds = [0, *(j + 1 for j in numbers), len(self.stages)]
        stages = tuple(sum(self.stages[first:end]) for first, end in pairwise(bounds))
        return Costs(stages, tuple(self.heads[j] for j in numbers), tuple(self.names[j] for j in numbers))

    def __str__(self) -> str:
        rows = [("exit", "stage FLOPs", "head FLOPs", "leaving here")]
        heads = [*map(_readable, self.heads), "-"]
        for name, stage, head, total in zip(
            (*self.names, "(end)"), self.stages, heads, self.fractions.tolist(), strict=True
        ):
            rows.append((name, _readable(stage), head, f"{total:.4f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*lines, f"base network: {_readable(self.base)} FLOPs = 1"])


def _readable(flops: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if flops >= size:
            return f"{flops / size:.4g} {unit}"
    return str(flops)


# ---- counting -------------------------------------------------------------------------------------------------------


def one_sample(x: Tensor, name: str = "example_input") -> Tensor:
    if not isinstance(x, Tensor) or x.dim() < 1 or len(x) < 1:
        what = f"has shape {list(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise ValueError(f"`{name}` {what}; wanted a tensor [batch, ...] with at least one sample")
    return x[:1]


def on_meta_device(run: Callable[[M, Tensor], T], module: M, x: Tensor) -> T:
    """run(module, x) on the meta device, if that will do."""
    # The fast path of attention modules, in eval mode, hides its matrix products from the counter.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            try:
                return run(_without_memory(module), x.to("meta"))
            except Exception:  # of whatever kind: something in there needs numbers. A true error comes back here.
                return run(module, x.clone())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _without_memory(module: M) -> M:
    """A copy on the meta device."""
    copies: dict[int, Tensor] = {}
    for inner in module.modules():
        for tensor in (*inner._parameters.values(), *inner._buffers.values(), *inner.__dict__.values()):
            if isinstance(tensor, nn.Parameter):
                copies[id(tensor)] = nn.Parameter(tensor.to("meta"), requires_grad=False)
            elif isinstance(tensor, Tensor):
                copies[id(tensor)] = tensor.to("meta")
    return copy.deepcopy(module, copies)


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Gives a function that tells the FLOPs since the beginning."""
    with FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
        yield counter.get_total_flops


def _attention(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    *batch, rows, width = query
    return 2 * math.prod(batch) * rows * key[-2] * (width + value[-1])


# Fused attention that torch's counter passes over; on the CPU, all of it.
_MISSING = {
    getattr(torch.ops.aten, name): _attention
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    )
    if hasattr(torch.ops.aten, name) and getattr(torch.ops.aten, name) not in flop_registry
}
