"""Stages through torch.compile: each has one or two graphs for all batch sizes, and one for a single sample.

The network cannot be compiled as a whole, since which stage runs next is known only after an exit. So every stage is
compiled on its own, behind a function of its own: torch keeps a limited number of compiled variants per function code,
which the stages of a network would otherwise share. Empty batches run uncompiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .partition import Stages
from .stage_module import TracedStage

__all__ = ["Compiled", "folded"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Compiled:
    """Compiled stages, to be run one after the other.

    Args:
        stages: They stay as they are.
        fold: Work on a copy in which batch normalisation is folded into convolutions.
        channels_last: Work on a copy in that memory format.
        options: Of torch.compile.
    """

    def __init__(self, stages: Stages, *, fold: bool, channels_last: bool, options: dict[str, Any]) -> None:
        own: Stages | None = folded(stages) if fold else copy.deepcopy(stages) if channels_last else None
        if own is not None and channels_last:
            own = own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.own = own  # copies of the stages, if there are any: to be moved with the network
        self.channels_last = channels_last
        self._runs = [_Stage(part, j, options) for j, part in enumerate(own or stages)]
        if channels_last:
            self._runs[0].memory_format = torch.channels_last

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return iter(self._runs)

    def __call__(self, x: Tensor) -> Tensor:
        for run in self._runs:
            x = run(x)
        return x


class _Stage:
    def __init__(self, part: nn.Module, number: int, options: dict[str, Any]) -> None:
        self.part = part
        self.memory_format: torch.memory_format | None = None
        self.run = torch.compile(_function_of_its_own(part, number), **options)

    def __call__(self, x: Tensor) -> Tensor:
        if self.memory_format is not None and x.dim() == 4:
            x = x.contiguous(memory_format=self.memory_format)
        rows = x.shape[0]
        if rows == 0:
            alone: Tensor = self.part(x)
            return alone
        if rows > 1:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.run(x)


def _function_of_its_own(part: nn.Module, number: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return part(x)  # type: ignore[no-any-return]

    code: CodeType = run.__code__.replace(co_name=f"stage{number}", co_firstlineno=number + 1)
    return FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)


# ---- batch normalisation folded into convolutions -------------------------------------------------------------------


def folded(stages: Stages) -> Stages:
    """A copy in which every convolution does the work of the batch normalisation right behind it.

    Answers are the same up to rounding. What cannot be traced is copied as it is.
    """
    return Stages([_folded(copy.deepcopy(part)) for part in stages], stages.names).eval()


def _folded(part: nn.Module) -> nn.Module:
    try:
        network = _graph_of(part)
    except Exception:  # whatever a forward() says to being traced
        return part
    calls = [node for node in network.graph.nodes if node.op == "call_module"]
    modules = [network.get_submodule(str(node.target)) for node in calls]
    module_of = dict(zip(calls, modules, strict=True))
    for node, norm in module_of.items():
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or not isinstance(norm, _NORMS) or norm.running_mean is None:
            continue
        conv = module_of.get(before)
        if isinstance(conv, _CONVOLUTIONS) and len(before.users) == 1 and modules.count(conv) == 1:
            network.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network.eval()


def _graph_of(part: nn.Module) -> fx.GraphModule:
    if not isinstance(part, TracedStage):
        return fx.symbolic_trace(part)
    graph = fx.Graph()
    graph.output(part.replay(graph, graph.placeholder("x")))
    return fx.GraphModule(part, graph)
