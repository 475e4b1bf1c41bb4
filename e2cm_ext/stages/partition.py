"""Cut a network into stages, one behind the other, with an exit between every two of them.

A network can be cut wherever exactly one tensor is alive: everything behind the cut depends on that tensor (and on
parameters) and on nothing else, so that a smaller batch of it can go on. A size that was taken from the batch must
not be alive either: the batch has shrunk by then. torch.fx tells what is alive; see tracing.py.

The stages share the weights of the model: they hold the same modules and the same parameters, so what moves, converts
or trains one of the two does so to the other. The model itself is never changed by cutting it.
"""

from __future__ import annotations

import itertools
import linecache
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from ..utils.warn import warn
from .cut_points import Place, Places, choose, places_of
from .flops import counting, on_meta_device, one_sample
from .tracing import PREFIX, WAY_OUT, CutError, Network, Root, answer_of, trace

__all__ = ["CutError", "Stages", "at_exits", "cut", "feature_shapes", "stage_flops"]

Exits = str | int | Sequence[str] | Sequence[float]


class Stages(nn.Module):
    """The base network in M+1 consecutive stages: exit j stands behind stage j; the last stage ends in the logits.

    `cut` makes one of a network that can be traced. By hand, for one that cannot, or where you know better:

        Stages([nn.Sequential(net.stem, net.layer1), net.layer2, nn.Sequential(net.layer3, net.pool, net.classifier)])

    Every part takes the tensor [batch, ...] that the one before it returns, of any batch size, treats the samples
    independently of each other (batch normalisation in eval mode does) and holds no state that changes.

    A stage that begins with an operation in place, such as ReLU(inplace=True), overwrites the features that it is
    given, as it does in the model. So an exit must have read its features before the next stage runs, and whoever
    keeps them must keep a copy.
    """

    names: tuple[str, ...]  # of the M exits: the qualified name of the module whose output is cut, e.g. "layer1.0"

    def __init__(self, parts: Sequence[nn.Module], names: Sequence[str] | None = None) -> None:
        super().__init__()
        parts = list(parts)
        for j, part in enumerate(parts):
            if not isinstance(part, nn.Module):
                raise TypeError(f"`parts[{j}]` is a {type(part).__name__}; wanted a torch.nn.Module")
        if len(parts) < 2:
            raise ValueError(f"`parts` has length {len(parts)}; wanted at least 2: an exit stands between two stages")
        if isinstance(names, str):
            raise TypeError(f"`names` is the string {names!r}; wanted a sequence of {len(parts) - 1} names")
        self.names = tuple(names) if names is not None else tuple(f"stage{j}" for j in range(len(parts) - 1))
        if len(self.names) != len(parts) - 1:
            raise ValueError(
                f"`names` has length {len(self.names)}; wanted {len(parts) - 1}, one per part but the last"
            )
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"`names` holds {twice!r} more than once; wanted every exit to have a name of its own")
        self.parts = nn.ModuleList(parts)
        self.training = self.parts.training = any(_in_train_mode(part) is not None for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """All stages: what the base network answers, bit for bit."""
        for part in self.parts:
            x = part(x)
        return x

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.parts)

    def __getitem__(self, stage: int) -> nn.Module:
        return self.parts[stage]

    def extra_repr(self) -> str:
        return f"{len(self)} stages, exits behind: {', '.join(self.names)}"


def stage_flops(stages: Stages, example_input: Tensor) -> tuple[int, ...]:
    """FLOPs of every stage for one sample of the shape of those in `example_input`."""

    def run(stages: Stages, sample: Tensor) -> tuple[int, ...]:
        totals = [0]
        with counting() as spent:
            for stage in stages:
                sample = stage(sample)
                totals.append(spent())
        return tuple(after - before for before, after in pairwise(totals))

    return on_meta_device(run, stages, one_sample(example_input))


@torch.no_grad()
def feature_shapes(stages: Stages, x: Tensor) -> tuple[list[tuple[int, ...]], int]:
    """Shapes of the features at every exit, and the number of logits."""
    shapes = []
    for stage in stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    if x.dim() != 2:
        raise ValueError(f"the model answers with shape {list(x.shape)}; wanted logits [batch, classes]")
    return shapes[:-1], x.shape[1]


def cut(model: nn.Module | Stages, example_input: Tensor, exits: Exits = "blocks") -> Stages:
    """Cut `model` into stages, with exits between them.

    `example_input` is a batch as the model takes it; one sample of it is run, to see that the stages answer what the
    model answers. Images of another size can follow if the model takes them. `exits`:

    - "blocks": behind the stem and behind every block (residual, inverted residual, inception, dense, transformer);
      in a network without blocks the same as "all".
    - "all": wherever exactly one tensor is alive; but only once between one convolution or matrix product and the
      next (at the end of a block, else where the features are smallest), not before the first of them, and not behind
      the last but one, unless a block ends there: what is left is the classifier.
    - a number: so many of "all", spread evenly over the FLOPs.
    - fractions of the FLOPs, floats between 0 and 1: the places in "all" nearest to them, each taken once.
    - names of modules: behind them. "layer1.0" is the output of that module; in "layer*.*" a star stands for anything
      but a dot. A module that is called again is "relu@2" the second time. What a function made is named after it,
      "layer1.0.add", as the names of other exits show.

    The stages share their weights with the model, and the model is not changed: neither its mode nor its hooks nor
    anything else. Attributes that its forward() sets on modules are not set by the stages. Modules with hooks are
    called as a whole, so that their hooks still run, but there are no exits in them.

    Stages in place of a model come back as they are; "blocks" and "all" mean every exit, a number or fractions choose
    among them as above, and names or numbers of exits choose those.

    CutError (a ValueError): the model cannot be traced, or has no place for an exit. RuntimeError: it is in train mode.
    """
    _refuse_train_mode(model)
    if isinstance(model, Stages):
        return _subset(model, example_input, exits)
    network = trace(model, example_input)
    places = places_of(network)
    if not places.worthwhile and (not places.possible or isinstance(exits, str | int)):
        raise CutError(_nowhere(network, places))
    chosen = choose(places, exits)
    _warn_of_opaque(network)
    stages = _assemble(network, chosen)
    _compare(model, stages, one_sample(example_input))
    return stages


def _refuse_train_mode(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; wanted a torch.nn.Module")
    name = _in_train_mode(model)
    if name is not None:
        where = f"{name!r} in the model" if name else "the model"
        raise RuntimeError(f"{where} is in train mode; stages answer as in eval mode: call model.eval() first")


def _in_train_mode(model: nn.Module) -> str | None:
    """The first module for which it makes a difference."""
    either = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    modules = model.named_modules()
    return next((name for name, module in modules if module.training and type(module) not in either), None)


def _nowhere(network: Network, places: Places) -> str:
    names = [place.names[0] for place in places.possible]
    if names:
        message = (
            "there is no place for an exit that is worth it, since between the first layer and the last there is no "
            f"other; if you want one all the same, name it, exits={names[-1:]}: there are {', '.join(names)}"
        )
    else:
        message = (
            "there is no place for an exit: nowhere between two layers is one tensor [batch, ...] all that is needed"
        )
    for path, reason in network.opaque.items():
        message += f"; {path!r} ({type(network.model.get_submodule(path)).__name__}) cannot be traced: {reason}"
    return message


def _warn_of_opaque(network: Network) -> None:
    for call in network.calls:
        if call.path in network.opaque and 2 * network.cost(call) > network.spent[-1]:
            warn(
                f"{call.path!r} ({type(call.module).__name__}) holds most of the FLOPs, and there is no exit in it, "
                f"because it cannot be traced: {network.opaque[call.path]}. {WAY_OUT}",
            )


def _compare(model: nn.Module, stages: Stages, x: Tensor) -> None:
    """What tracing has missed (a forward() that asks whether its input is a tensor, say) shows in the answer."""
    wanted = answer_of(model, x)
    with torch.no_grad():
        found = stages(x.clone())
    if wanted.is_meta or torch.equal(wanted, found):
        return
    # Kernels may be chosen anew at every call, so not always the same bits.
    size = wanted.nan_to_num(0, 0, 0).abs().max() * (1e-3 if wanted.dtype.itemsize >= 4 else 3e-2)
    if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=0, atol=float(size), equal_nan=True):
        raise CutError(
            "the stages do not answer what the model answers: its forward() does something that tracing does not see, "
            "or is random"
        )


# ---- stages of a traced network -------------------------------------------------------------------------------------


def _assemble(network: Network, chosen: list[tuple[Place, str]]) -> Stages:
    nodes = network.nodes
    bounds = [0, *(place.after + 1 for place, _ in chosen), len(nodes) - 1]
    (answer,) = nodes[-1].all_input_nodes
    values = [nodes[0], *(nodes[place.alive] for place, _ in chosen), answer]
    parts = [
        _slice(network, nodes[first:last], x, y)
        for (first, last), (x, y) in zip(pairwise(bounds), pairwise(values), strict=True)
    ]
    return Stages(parts, [name for _, name in chosen])


def _slice(network: Network, nodes: list[fx.Node], x: fx.Node, y: fx.Node) -> Part:
    graph = fx.Graph()
    copies = {x: graph.placeholder("x")}
    owners = {}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter may have been looked up in an earlier stage
            copies[node] = copy = graph.node_copy(node, copy_of)
            if node.op in ("call_module", "get_attr"):
                owners[copy] = network.owner(str(node.target))
                copy.target = str(node.target).removeprefix(PREFIX + ".")
        return copies[node]

    for node in nodes:
        if node.op != "get_attr":  # looked up where they are needed
            copy_of(node)
    graph.output(copy_of(y))
    return Part(graph, {str(copy.target): owner for copy, owner in owners.items()})


@dataclass(frozen=True)
class _Value:
    """In place of a node, among what is pickled."""

    name: str


class _Step(NamedTuple):
    """A node as plain data. fx.Graph would not survive pickling as it is."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any


class Part(nn.Module):
    """A stage of a traced network: modules and parameters under their own qualified names, and what to do with them.

    `cut` makes them. They can be copied and pickled; the code that runs is made anew then.
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
        """Which module holds what the steps use."""
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
        self._run: Callable[[Part, Tensor], Tensor] = scope["forward"]
        self._run_bound = self._bound(name)

    def _bound(self, name: str) -> Callable[[Part, Tensor], Tensor]:
        """The same code, with modules looked up where they are held: a path of attributes, "layer1.0.conv1", takes as
        long as some of the modules that it leads to. Looked up at every call, since they may be exchanged."""
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
        run: Callable[[Part, Tensor], Tensor] = scope["forward"]
        return run

    def replay(self, graph: fx.Graph, x: fx.Node, renamed: Mapping[str, str] | None = None) -> fx.Node:
        """Appends the steps to a graph; returns the value they end in. renamed: targets that get other names."""
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
        for made_anew in ("_run", "_run_bound", "_compiled_call_impl"):
            state.pop(made_anew, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()


def _plain(arguments: Any) -> Any:
    as_value: Any = lambda node: _Value(node.name)  # noqa: E731
    return map_arg(arguments, as_value)


def _share(owner: nn.Module, target: str, part: nn.Module) -> None:
    """Puts what `owner` has under the last name of `target` into `part`, the same object under the whole of it."""
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


# ---- a choice among stages ------------------------------------------------------------------------------------------


def _subset(stages: Stages, example_input: Tensor, exits: Exits) -> Stages:
    if exits == "blocks" or exits == "all":
        return stages
    numbers = _numbers_of(stages, exits)
    if numbers is None:
        spent = list(itertools.accumulate(stage_flops(stages, example_input)))
        there_are = f"there is no such exit; there are {', '.join(stages.names)}"
        possible = [Place(j, j, j, spent[j], (), (name,)) for j, name in enumerate(stages.names)]
        places = Places(possible, possible, possible, spent[-1], lambda _: there_are)
        numbers = [place.after for place, _ in choose(places, exits)]
    return at_exits(stages, numbers)


def at_exits(stages: Stages, numbers: Sequence[int]) -> Stages:
    """The same network with these exits only, given in their order: the stages between them are joined."""
    bounds = [0, *(number + 1 for number in numbers), len(stages)]
    parts = [_joined([stages[j] for j in range(first, end)]) for first, end in pairwise(bounds)]
    return Stages(parts, [stages.names[number] for number in numbers])


def _numbers_of(stages: Stages, exits: Exits) -> list[int] | None:
    """The exits, if they are given by their numbers."""
    if isinstance(exits, str | int) or not all(isinstance(j, int) and not isinstance(j, bool) for j in exits):
        return None
    numbers = sorted({int(j) for j in exits})
    if not numbers or not (numbers[0] >= 0 and numbers[-1] < len(stages.names)):
        raise ValueError(f"`exits` is {exits!r}; wanted numbers of exits, 0 to {len(stages.names) - 1}")
    return numbers


def _joined(parts: list[nn.Module]) -> nn.Module:
    if len(parts) == 1:
        return parts[0]
    graph = fx.Graph()
    x = graph.placeholder("x")
    owners: dict[str, nn.Module] = {}
    for part in parts:
        if not isinstance(part, Part):
            return nn.Sequential(*parts).eval()
        x = part.replay(graph, x)
        owners.update(part.owners())
    graph.output(x)
    return Part(graph, owners)
