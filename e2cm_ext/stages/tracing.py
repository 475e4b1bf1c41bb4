"""The inside of a network: its operations in order, the modules they belong to, and what each of them costs.

torch.fx records them. A module that it cannot see through (control flow that depends on the data, say) is kept whole
and called as it is, and so are modules with hooks, which must go on being called, modules without modules inside, and
the layers of torch.nn. While torch.fx traces, no other thread may run a network: it replaces how modules are called.
"""

from __future__ import annotations

import itertools
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .flops import counting, on_meta_device, one_sample

__all__ = ["Call", "CutError", "Network", "run_one_sample", "trace"]

CUT_BY_HAND = (
    "Way out: make the slices yourself, each a module that takes the tensor that the one before it returns, and pass "
    "e2cm_ext.stages.Stages([first, second, ..., last]) in place of the model"
)
PREFIX = "model"


class CutError(ValueError):
    """This network cannot be cut, or not there."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}. {CUT_BY_HAND}")


@dataclass(eq=False)
class Call:
    """One call of one module: nodes[first : last + 1] of the network."""

    path: str  # its qualified name
    name: str  # the same, with "@2" behind it at the second call
    module: nn.Module
    parent: Call | None
    is_leaf: bool  # a single node: nothing inside is known
    first: int = 0
    last: int = -1
    output: fx.Node | None = None  # if it returns one value

    def ancestors(self) -> Iterator[Call]:
        """This call, the one around it, and so on outwards."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(eq=False)
class Network:
    """A traced network. Node i of `nodes` has cumulative_flops[i] FLOPs up to and including it, per sample."""

    root: Root  # holds the model, and the constants that its forward() made
    nodes: list[fx.Node]
    calls: list[Call]
    caller: dict[fx.Node, Call]  # the innermost call that a node belongs to; none: the model's own forward
    opaque: dict[str, str]  # modules that were to be seen through, and why they could not
    cumulative_flops: list[int] = field(default_factory=list)
    batched: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)  # tensors [batch, ...]: shape of a sample
    data: set[fx.Node] = field(default_factory=set)  # tensors, or tuples of them, that the input has gone into

    @property
    def model(self) -> nn.Module:
        return self.root.model

    def owner(self, target: str) -> nn.Module:
        """The module that holds what a node refers to."""
        return self.root.get_submodule(target.rpartition(".")[0])

    def flops_before(self, i: int) -> int:
        return self.cumulative_flops[i - 1] if i else 0

    def cost(self, call: Call) -> int:
        return self.cumulative_flops[call.last] - self.flops_before(call.first)

    def layers(self, call: Call) -> int:
        """How many operations in it cost something."""
        return sum(self.cumulative_flops[i] > self.flops_before(i) for i in range(call.first, call.last + 1))


def trace(model: nn.Module, x: Tensor) -> Network:
    """Record what `model` does with one input. The model is left as it was."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CutError(f"the model is a {type(model).__name__}: compiled code cannot be traced")
    tracer = _Tracer()
    no_logits = (
        f"the model ({type(model).__name__}) returns no tensor [batch, ...]; wanted logits: if they are a part of what "
        "it returns, wrap it in a module whose forward() returns them alone"
    )
    with _attributes_restored(model), torch.no_grad():
        try:
            graph = tracer.trace(Root(model))
        except NotImplementedError as error:  # by torch.fx, of a kind of object that a graph cannot return
            raise CutError(no_logits) from error
    if "" in tracer.opaque:
        raise CutError(f"the model ({type(model).__name__}) cannot be traced: {tracer.opaque['']}")
    network = tracer.network(graph)
    try:
        _measure(network, x)
    except Exception:
        run_one_sample(model, one_sample(x))
        raise
    answer = graph.output_node().args[0]
    if answer not in network.batched:
        raise CutError(no_logits)
    return network


def run_one_sample(model: nn.Module, x: Tensor) -> Any:
    """To one sample. A ValueError if the model itself fails, and not only what was traced of it."""
    try:
        with torch.no_grad():
            return model(x.clone())
    except Exception as error:
        reason, _, _ = str(error).partition("\n")
        raise ValueError(
            f"the model does not take `example_input`, of which one sample is {x.dtype} {list(x.shape)}: {reason}"
        ) from error


class Root(nn.Module):
    """One input and no options: what the model's forward() takes besides has its default."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Proxy(fx.Proxy):
    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # buffers are looked up at every run, as the model does

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Call, fx.Node, fx.Node]] = []  # with the last node before it and its own last one
        self.caller: dict[fx.Node, Call] = {}
        self.opaque: dict[str, str] = {}
        self._inside: Call | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m._forward_hooks or m._forward_pre_hooks:
            return True
        layer = any(base.__module__.startswith("torch.nn.") and base not in _CONTAINERS for base in type(m).__mro__)
        return (layer or next(m.children(), None) is None) and module_qualified_name != PREFIX

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        around, before = self._inside, self._last()
        self._inside = call = Call(path.removeprefix(PREFIX).lstrip("."), "", m, around, self.is_leaf_module(m, path))
        result: Any = None
        try:
            if call.is_leaf and path == PREFIX:
                self.opaque[""] = "it has forward hooks, which must see it called as a whole: remove them first"
            if not call.is_leaf:
                result = self._trace_inside(call, before, forward, args, kwargs)
            if call.is_leaf:
                result = self.create_proxy("call_module", path, args, kwargs)
        finally:
            self._inside = around
        call.output = result.node if isinstance(result, fx.Proxy) else None
        self.calls.append((call, before, self._last()))
        return result

    def _trace_inside(
        self, call: Call, before: fx.Node, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        calls = len(self.calls)
        try:
            return forward(*args, **kwargs)
        except Exception as error:  # whatever the network's author's code raises when it meets what is not a tensor
            self.opaque[call.path] = _reason(error)
            call.is_leaf = True
            del self.calls[calls:]
            self._forget_after(before)
            return None

    def _forget_after(self, node: fx.Node) -> None:
        # Parameters stay: the tracer remembers that it has looked them up.
        for late in reversed(list(self.graph.nodes)):
            if late is node:
                return
            if late.op != "get_attr":
                self.graph.erase_node(late)
                self.caller.pop(late, None)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self._inside is not None:
            self.caller[node] = self._inside
        return node

    def _last(self) -> fx.Node:
        last: fx.Node = next(iter(reversed(self.graph.nodes)))
        return last

    def network(self, graph: fx.Graph) -> Network:
        nodes = list(graph.nodes)
        index = {node: i for i, node in enumerate(nodes)}
        calls = []
        times: dict[str, int] = {}
        for call, before, last in self.calls:
            call.first, call.last = index[before] + 1, index[last]
            if call.path and call.first <= call.last:
                times[call.path] = times.get(call.path, 0) + 1
                call.name = call.path if times[call.path] == 1 else f"{call.path}@{times[call.path]}"
                calls.append(call)
        leaves = {call.path for call in calls if call.is_leaf}
        opaque = {path: reason for path, reason in self.opaque.items() if path in leaves}
        assert isinstance(self.root, Root)
        return Network(self.root, nodes, calls, self.caller, opaque)


_CONTAINERS = {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict}


def _reason(error: Exception) -> str:
    """What went wrong, and the line of the network's code where."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    torchs = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename != __file__ and not frame.filename.startswith(torchs):
            return f"{reason} ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"
    return reason


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Puts back what forward() sets on its modules, or caches there: while tracing these are no tensors."""
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        before.append((module.__dict__, module.__dict__.copy()))
        before += [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, dict | list | set)]
    try:
        yield
    finally:
        for container, contents in before:
            if len(container) != len(contents) or any(map(operator.is_not, _items(container), _items(contents))):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(contents)


def _items(container: Any) -> Iterable[Any]:
    return itertools.chain(container, container.values()) if isinstance(container, dict) else container


# ---- measuring ------------------------------------------------------------------------------------------------------


class _Profiler(fx.Interpreter):
    def __init__(self, root: Root, graph: fx.Graph, flops_so_far: Callable[[], int]) -> None:
        super().__init__(root, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.data: set[fx.Node] = set()
        self.cumulative_flops: list[int] = []
        self._total = flops_so_far

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        if n.op == "placeholder" or (_holds_tensors(value) and not self.data.isdisjoint(n.all_input_nodes)):
            self.data.add(n)
        self.cumulative_flops.append(self._total())
        return value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensors, value)))


def _measure(network: Network, x: Tensor) -> None:
    """Shapes and FLOPs of all nodes. Two runs tell which dimension is the batch: that which is 2, then 3."""

    graph = network.nodes[0].graph

    def run(root: Root, sample: Tensor) -> tuple[_Profiler, _Profiler]:
        with counting() as flops_so_far:
            two = _Profiler(root, graph, flops_so_far)
            two.run(torch.cat([sample] * 2))
        three = _Profiler(root, graph, lambda: 0)
        three.run(torch.cat([sample] * 3))
        return two, three

    two, three = on_meta_device(run, network.root, one_sample(x))
    network.cumulative_flops = [total // 2 for total in two.cumulative_flops]
    network.data = two.data
    for node, shape in two.shapes.items():
        if shape and shape[0] == 2 and three.shapes.get(node) == (3, *shape[1:]):
            network.batched[node] = shape[1:]
