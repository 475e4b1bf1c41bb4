"""Cuts a network into consecutive stages, with an exit between every two of them.

A network can be cut where exactly one tensor is live: everything behind the cut depends on that tensor, on parameters,
and on nothing else, so that a smaller batch of it can go on. A size taken from the batch must not be live either, since
the batch has shrunk by then. torch.fx tells what is live; see tracing.py.

The stages share the weights of the model: they hold the same modules and parameters. The model itself is not changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from ..utils.warn import warn
from .cut_points import CutPoint, CutPoints, choose, find_cut_points
from .flops import counting, on_meta_device, one_sample
from .stage_module import TracedStage
from .tracing import CUT_BY_HAND, PREFIX, CutError, Network, run_one_sample, trace

__all__ = ["CutError", "Stages", "at_exits", "cut", "feature_shapes", "stage_flops"]

Exits = str | int | Sequence[str] | Sequence[float]


class Stages(nn.Module):
    """The base network in M+1 consecutive stages. Exit j stands behind stage j; the last stage returns the logits.

    `cut` makes one from a network that can be traced. Make it by hand for a network that cannot.

    A stage that begins with an in-place operation, such as ReLU(inplace=True), overwrites the features that it is
    given, as it does in the model. So an exit must read its features before the next stage runs, and code that keeps
    features must copy them.

    Args:
        parts: Two modules or more. Each takes the tensor [batch, ...] that the one before it returns, for any batch
            size; treats samples independently of each other (batch normalisation in eval mode does); and holds no state
            that changes.
        names: Of the M exits; None: "stage0", "stage1", ...

    Attributes:
        names: Names of the M exits; those of `cut` are qualified names of modules, such as "layer1.0".

    Example:
        >>> Stages([nn.Sequential(net.stem, net.layer1), net.layer2, nn.Sequential(net.pool, net.classifier)])
    """

    names: tuple[str, ...]

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
        """Run all stages: the logits of the base network, bit for bit."""
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
    """Count the FLOPs of every stage for one sample of the shape of those in `example_input`."""

    def run(stages: Stages, sample: Tensor) -> tuple[int, ...]:
        totals = [0]
        with counting() as flops_so_far:
            for stage in stages:
                sample = stage(sample)
                totals.append(flops_so_far())
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
    """Cut a model into stages, with exits between them.

    The stages share their weights with the model, and the model is not changed: neither its mode nor its hooks nor
    anything else. Attributes that its forward() sets on modules are not set by the stages. Modules with hooks are
    called as a whole, so that their hooks still run, but there are no exits in them.

    `exits` can be:

    - "blocks": behind the stem and behind every block (residual, inverted residual, inception, dense, transformer);
      in a network without blocks the same as "all".
    - "all": wherever exactly one tensor is live; but only once between one convolution or matrix product and the next
      (at the end of a block, else where the features are smallest), not before the first of them, and not behind the
      last but one, unless a block ends there: only the classifier is left.
    - a number: so many of "all", spread evenly over the FLOPs.
    - fractions of the FLOPs, floats between 0 and 1: the cut points in "all" nearest to them, each taken once.
    - names of modules: behind them. "layer1.0" is the output of that module; in "layer*.*" a star stands for anything
      but a dot. A module that is called again is "relu@2" the second time. The output of a function is named after it,
      "layer1.0.add".

    Args:
        model: A network in eval mode. Stages come back as they are; then "blocks" and "all" mean every exit, a number
            or fractions choose among them as above, and names or numbers of exits choose those.
        example_input: A batch as the model takes it. One sample of it is run, to compare the stages with the model.
            Images of another size can follow if the model takes them.
        exits: Where to cut: see above.

    Returns:
        The stages.

    Raises:
        CutError: The model cannot be traced, or has no place for an exit. It is a ValueError.
        RuntimeError: The model is in train mode.

    Example:
        >>> stages = cut(torchvision.models.resnet50(weights="DEFAULT").eval(), torch.zeros(1, 3, 224, 224))
        >>> stages.names
        ('maxpool', 'layer1.0', 'layer1.1', ...)
    """
    _refuse_train_mode(model)
    if isinstance(model, Stages):
        return _subset(model, example_input, exits)
    network = trace(model, example_input)
    points = find_cut_points(network)
    if not points.worthwhile and (not points.possible or isinstance(exits, str | int)):
        raise CutError(_no_exit_message(network, points))
    chosen = choose(points, exits)
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
    """The first module in train mode for which the mode makes a difference."""
    either = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    modules = model.named_modules()
    return next((name for name, module in modules if module.training and type(module) not in either), None)


def _no_exit_message(network: Network, points: CutPoints) -> str:
    names = [point.names[0] for point in points.possible]
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
        if call.path in network.opaque and 2 * network.cost(call) > network.cumulative_flops[-1]:
            warn(
                f"{call.path!r} ({type(call.module).__name__}) holds most of the FLOPs, and there is no exit in it, "
                f"because it cannot be traced: {network.opaque[call.path]}. {CUT_BY_HAND}",
            )


def _compare(model: nn.Module, stages: Stages, x: Tensor) -> None:
    """Refuse stages whose output differs from the model's: tracing may have missed something in forward()."""
    wanted = run_one_sample(model, x)
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


def _assemble(network: Network, chosen: list[tuple[CutPoint, str]]) -> Stages:
    nodes = network.nodes
    bounds = [0, *(point.after + 1 for point, _ in chosen), len(nodes) - 1]
    (answer,) = nodes[-1].all_input_nodes
    values = [nodes[0], *(nodes[point.crossing_node] for point, _ in chosen), answer]
    parts = [
        _slice(network, nodes[first:last], x, y)
        for (first, last), (x, y) in zip(pairwise(bounds), pairwise(values), strict=True)
    ]
    return Stages(parts, [name for _, name in chosen])


def _slice(network: Network, nodes: list[fx.Node], x: fx.Node, y: fx.Node) -> TracedStage:
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
    return TracedStage(graph, {str(copy.target): owner for copy, owner in owners.items()})


# ---- a choice among stages ------------------------------------------------------------------------------------------


def _subset(stages: Stages, example_input: Tensor, exits: Exits) -> Stages:
    if exits == "blocks" or exits == "all":
        return stages
    numbers = _numbers_of(stages, exits)
    if numbers is None:
        cumulative = list(itertools.accumulate(stage_flops(stages, example_input)))
        there_are = f"there is no such exit; there are {', '.join(stages.names)}"
        possible = [CutPoint(j, j, j, cumulative[j], (), (name,)) for j, name in enumerate(stages.names)]
        points = CutPoints(possible, possible, possible, cumulative[-1], lambda _: there_are)
        numbers = [point.after for point, _ in choose(points, exits)]
    return at_exits(stages, numbers)


def at_exits(stages: Stages, numbers: Sequence[int]) -> Stages:
    """Return the same network with these exits only, given in order: the stages between them are joined."""
    bounds = [0, *(number + 1 for number in numbers), len(stages)]
    parts = [_join([stages[j] for j in range(first, end)]) for first, end in pairwise(bounds)]
    return Stages(parts, [stages.names[number] for number in numbers])


def _numbers_of(stages: Stages, exits: Exits) -> list[int] | None:
    """Exit numbers, if the exits are given by number."""
    if isinstance(exits, str | int) or not all(isinstance(j, int) and not isinstance(j, bool) for j in exits):
        return None
    numbers = sorted({int(j) for j in exits})
    if not numbers or not (numbers[0] >= 0 and numbers[-1] < len(stages.names)):
        raise ValueError(f"`exits` is {exits!r}; wanted numbers of exits, 0 to {len(stages.names) - 1}")
    return numbers


def _join(parts: list[nn.Module]) -> nn.Module:
    if len(parts) == 1:
        return parts[0]
    graph = fx.Graph()
    x = graph.placeholder("x")
    owners: dict[str, nn.Module] = {}
    for part in parts:
        if not isinstance(part, TracedStage):
            return nn.Sequential(*parts).eval()
        x = part.replay(graph, x)
        owners.update(part.owners())
    graph.output(x)
    return TracedStage(graph, owners)
