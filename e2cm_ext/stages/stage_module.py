"""One stage of a traced network as an nn.Module."""

from __future__ import annotations

import linecache
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from .tracing import Root

__all__ = ["TracedStage"]


@dataclass(frozen=True)
class _Value:
    """Stands for a node in what is pickled."""

    name: str


class _Step(NamedTuple):
    """A node as plain data: an fx.Graph cannot be pickled as it is."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any


class TracedStage(nn.Module):
    """A stage of a traced network: modules and parameters under their own qualified names, and the steps that use them.

    `cut` makes them. A stage can be copied and pickled; its code is generated anew then.
    """

    def __init__(self, graph: fx.Graph, owners: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.training = False
        self._steps = tuple(
            _Step(node.op, node.name, node.target, _plain(node.args), _plain(node.kwargs)) for node in graph.nodes
        )
        # Modules first, the outer ones before the inner: what they hold is in place then.
        for target in sorted(owners, key=lambda t: (t.rpartition(".")[2] not in owners[t]._modules, t.count("."))):
            _share(owners[target], target, self)
        self._compile()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run(self, x)  # a compiler wants to see whose modules these are
        return self._run_bound(self, x)

    def owners(self) -> dict[str, nn.Module]:
        """The module that holds each module or tensor that the steps use."""
        targets = {step.target for step in self._steps if step.op in ("call_module", "get_attr")}
        return {target: self.get_submodule(target.rpartition(".")[0]) for target in targets}

    def _compile(self) -> None:
        graph = fx.Graph()
        graph.output(self.replay(graph, graph.placeholder("x")))
        code = graph.python_code("self")
        name = f"<e2cm_ext stage {zlib.crc32(code.src.encode()):08x}>"
        linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)  # for tracebacks
        scope = dict(code.globals)
        exec(compile(code.src, name, "exec"), scope)
        self._run: Callable[[TracedStage, Tensor], Tensor] = scope["forward"]
        self._run_bound = self._bound(name)

    def _bound(self, name: str) -> Callable[[TracedStage, Tensor], Tensor]:
        """The same code with short look-ups: a chain of attributes, "layer1.0.conv1", takes as long as some modules.

        Modules are looked up at every call, since a user may replace them.
        """
        numbers = {step.target: j for j, step in enumerate(self._steps) if step.op == "call_module"}
        graph = fx.Graph()
        graph.output(self.replay(graph, graph.placeholder("x"), {target: f"held{j}" for target, j in numbers.items()}))
        code = graph.python_code("self")
        scope = dict(code.globals)
        lines = code.src
        for target, j in numbers.items():
            path, _, last = target.rpartition(".")
            scope[f"held{j}"] = self.get_submodule(path)._modules
            lines = lines.replace(f"self.held{j}(", f"held{j}[{last!r}](")
        exec(compile(lines, name, "exec"), scope)
        run: Callable[[TracedStage, Tensor], Tensor] = scope["forward"]
        return run

    def replay(self, graph: fx.Graph, x: fx.Node, renamed: Mapping[str, str] | None = None) -> fx.Node:
        """Append the steps to a graph, and return the value they end in. renamed: targets that get other names."""
        values = {self._steps[0].name: x}

        def value(a: Any) -> Any:
            return values[a.name] if isinstance(a, _Value) else a

        *steps, output = self._steps[1:]
        for step in steps:
            args, kwargs = map_aggregate((step.args, step.kwargs), value)
            target = renamed.get(step.target, step.target) if renamed else step.target
            values[step.name] = graph.create_node(step.op, target, args, kwargs, step.name)
        end: fx.Node = value(output.args[0])
        return end

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for generated in ("_run", "_run_bound", "_compiled_call_impl"):
            state.pop(generated, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()


def _plain(arguments: Any) -> Any:
    as_value: Any = lambda node: _Value(node.name)  # noqa: E731
    return map_arg(arguments, as_value)


def _share(owner: nn.Module, target: str, part: nn.Module) -> None:
    """Register in `part`, under the whole name `target`, the object that `owner` has under its last name."""
    *path, name = target.split(".")
    for step in path:
        if step not in part._modules:
            part.add_module(step, nn.Module().eval())
        part = part.get_submodule(step)
    if hasattr(part, name):
        return
    if name in owner._modules:
        part.add_module(name, owner._modules[name])
    elif name in owner._parameters:
        part.register_parameter(name, owner._parameters[name])
    elif name in owner._buffers:
        part.register_buffer(name, owner._buffers[name], name not in owner._non_persistent_buffers_set)
    elif isinstance(owner, Root):  # made by forward(), where the model is: a constant that must move with it
        part.register_buffer(name, getattr(owner, name), persistent=False)
    else:
        setattr(part, name, getattr(owner, name))
