"""Where a traced network can be cut, which of these points are worth an exit, and which of them were asked for.

Blocks are found by structure, not by name: a block is the innermost module around a place where the network branches
and comes together again (a sum, a concatenation; a product is a gate, such as squeeze-and-excite, and no end of a
block), every module of the same class, and every module with a similar path ("features.*.*") that
holds two layers or more. Of blocks within blocks the outermost counts.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from .tracing import Call, Network

__all__ = ["CutPoint", "CutPoints", "choose", "find_cut_points"]


class CutPoint(NamedTuple):
    """A point where a network can be cut: one tensor crosses it, and nothing else."""

    after: int  # index of the last node (or stage) before the cut
    crossing_node: int  # index of the node whose value crosses the cut
    producer: int  # index of the node that computed this value; nodes in between pass it on
    cumulative_flops: int  # per sample, up to the cut
    shape: tuple[int, ...]  # of one sample's features at the cut
    names: tuple[str, ...]  # of every module whose output this is; the first is shown


@dataclass(frozen=True)
class CutPoints:
    """All cut points of a network, and which of them are worth an exit."""

    possible: list[CutPoint]
    worthwhile: list[CutPoint]  # exits="all"
    blocks: list[CutPoint]  # exits="blocks"
    total: int  # FLOPs per sample of the whole network
    explain_missing: Callable[[str], str]  # why no cut point has this name


def find_cut_points(network: Network) -> CutPoints:
    possible = _possible_points(network)
    blocks = _block_ends(network, possible)
    worthwhile = _worthwhile(network, possible, blocks)
    total = network.cumulative_flops[-1]
    return CutPoints(
        possible, worthwhile, blocks or worthwhile, total, lambda name: _explain_missing(network, possible, name)
    )


# ---- where exactly one tensor is live ------------------------------------------------------------------------------


def _live_values(nodes: Sequence[fx.Node], kinds: Container[fx.Node] | None = None) -> Iterator[set[fx.Node]]:
    """The values (of these kinds) that later nodes still use, after each node. Parameters and buffers do not count."""
    index = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((index[user] for user in node.users), default=-1) for node in nodes}
    live: set[fx.Node] = set()
    for i, node in enumerate(nodes):
        live = {value for value in live if last_use[value] > i}
        if node.op != "get_attr" and last_use[node] > i and (kinds is None or node in kinds):
            live.add(node)
        yield live


def _possible_points(network: Network) -> list[CutPoint]:
    # Where the same value is the only live one several times, the nodes in between pass it on, work on it in place or
    # check it: the cut is behind them.
    alone: dict[fx.Node, tuple[int, fx.Node]] = {}
    for i, live in enumerate(itertools.islice(_live_values(network.nodes), len(network.nodes) - 2)):
        if len(live) == 1:
            (node,) = live
            alone[_source(network, node)] = i, node
    index = {node: i for i, node in enumerate(network.nodes)}
    ends = _returning_calls(network)
    points = [
        CutPoint(
            after=after,
            crossing_node=index[node],
            producer=index[source],
            cumulative_flops=network.cumulative_flops[after],
            shape=network.batched[node],
            names=_names(network, source, [call for call in ends.get(source, []) if call.last <= after]),
        )
        for source, (after, node) in alone.items()
        if source in network.batched and source.op != "placeholder"
    ]
    return sorted(points)


_PASS_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in eval mode


def _source(network: Network, node: fx.Node) -> fx.Node:
    """The node that made this value."""
    while node in network.caller and network.caller[node].is_leaf:
        if type(network.caller[node].module) not in _PASS_THROUGH or len(node.all_input_nodes) != 1:
            break
        node = node.all_input_nodes[0]
    return node


def _returning_calls(network: Network) -> dict[fx.Node, list[Call]]:
    """The calls that return a value, innermost first; not those that were given it and did nothing else."""
    index = {node: i for i, node in enumerate(network.nodes)}
    ends: dict[fx.Node, list[Call]] = {}
    for call in network.calls:
        if call.output is not None and index[call.output] >= call.first:
            ends.setdefault(_source(network, call.output), []).append(call)
    return ends


def _names(network: Network, node: fx.Node, ends: list[Call]) -> tuple[str, ...]:
    if ends:  # a module made of others says more than its last layer
        return tuple(call.name for call in sorted(ends, key=lambda call: call.is_leaf))
    around = network.caller.get(node)
    name = f"{around.path}.{node.name}" if around is not None and around.path else node.name
    modules = {call.name for call in network.calls}
    return (
        next(
            free for free in itertools.chain([name], (f"{name}_{i}" for i in itertools.count())) if free not in modules
        ),
    )


# ---- blocks ---------------------------------------------------------------------------------------------------------

# What brings two branches together without ending a block: gates, and the products inside attention.
_PRODUCTS = {
    operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply",
    operator.matmul, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, "matmul", "bmm",
    F.scaled_dot_product_attention,
}  # fmt: skip


def _block_ends(network: Network, possible: list[CutPoint]) -> list[CutPoint]:
    """The end of the stem, then those of all blocks."""
    possible = [point for point in possible if 0 < point.cumulative_flops < network.cumulative_flops[-1]]
    calls, free = _blocks(network)
    found: dict[int, CutPoint] = {}  # by the number of the node
    starts = []
    for call in calls:
        for point in possible:
            if call.name in point.names and network.cost(call) > 0:
                names = (call.name, *(name for name in point.names if name != call.name))
                found[point.producer] = point._replace(names=names)
                starts.append(call.first)
    for first, last in free:
        same = [
            point
            for point in possible
            if point.producer >= last and point.cumulative_flops == network.cumulative_flops[last]
        ]
        same_shape = [
            point for point in same if point.shape == same[0].shape
        ]  # behind the activation, before a pooling
        if same_shape:
            found.setdefault(same_shape[-1].producer, same_shape[-1])
            starts.append(first)
    stem = [point for point in possible if point.producer < min(starts, default=0)]
    return sorted([*found.values(), *stem[-1:]])


def _blocks(network: Network) -> tuple[list[Call], list[tuple[int, int]]]:
    """Modules that are blocks; and branches outside of them, as the numbers of their first and last node."""
    seeds, branches = set[Call](), _branches(network)
    for first, last in branches:
        call = _innermost_around(network, first, last)
        # A module with most of the cost is the network's body, whose branches are written out in its forward().
        if call is not None and 2 * network.cost(call) <= network.cumulative_flops[-1]:
            seeds.add(call)
    kinds = {type(call.module) for call in seeds} - {nn.Sequential, nn.Module}
    blocks = _outermost([call for call in network.calls if call in seeds or type(call.module) in kinds])

    chosen, patterns = set(blocks), {_pattern(call) for call in blocks}
    around = {outer for call in blocks for outer in call.ancestors()}
    others = [
        call
        for call in network.calls
        if call not in around
        and not any(outer in chosen for outer in call.ancestors())
        and (_is_leaf_block(call) or (_pattern(call) in patterns and network.layers(call) > 1))
    ]
    blocks += _outermost(others)
    free = [(a, b) for a, b in branches if not any(call.first <= a and b <= call.last for call in blocks)]
    return blocks, free


def _branches(network: Network) -> list[tuple[int, int]]:
    """Where the network branches and comes together again: the numbers of the first and the last node in between."""
    found, start = [], 0
    for i, live in enumerate(_live_values(network.nodes, network.data)):
        if len(live) > 1:
            continue
        if i > start and _is_merge(network, network.nodes[i]):
            found.append((start, i))
        start = i + 1
    return found


def _is_merge(network: Network, node: fx.Node) -> bool:
    values = [value for value in node.all_input_nodes if value in network.data]
    return len(values) > 1 and node.target not in _PRODUCTS


def _innermost_around(network: Network, first: int, last: int) -> Call | None:
    """The innermost call with all these nodes in it."""
    call = network.caller.get(network.nodes[last])
    while call is not None and not (call.first <= first and last <= call.last):
        call = call.parent
    return call if call is not None and call.path else None


def _outermost(calls: list[Call]) -> list[Call]:
    chosen = set(calls)
    return [call for call in calls if not any(outer in chosen for outer in call.ancestors() if outer is not call)]


def _is_leaf_block(call: Call) -> bool:
    """Does a call of which nothing inside is known hold several layers?"""
    return call.is_leaf and sum(p.dim() > 1 for p in call.module.parameters()) > 1


def _pattern(call: Call) -> str:
    return re.sub(r"\d+", "*", call.path)


def _worthwhile(network: Network, possible: list[CutPoint], blocks: list[CutPoint]) -> list[CutPoint]:
    """One cut point for every amount of work: the end of a block, or else where the features are smallest.

    Nothing before the first layer; and nothing behind which only the classifier's last layer is left, for that answers
    better than any head in its place, at about the same price. Only a block may end there.
    """
    last_layer = max(
        (i for i in range(len(network.nodes)) if network.cumulative_flops[i] > network.flops_before(i)), default=0
    )
    best: dict[int, CutPoint] = {}
    for point in possible:
        if 0 < point.cumulative_flops < network.flops_before(last_layer):
            other = best.get(point.cumulative_flops)
            if other is None or math.prod(point.shape) <= math.prod(other.shape):
                best[point.cumulative_flops] = point
    best.update({point.cumulative_flops: point for point in blocks})
    return sorted(best.values())


# ---- which of them --------------------------------------------------------------------------------------------------


def choose(points: CutPoints, exits: object) -> list[tuple[CutPoint, str]]:
    """The cut points that `exits` asks for, in order, each with the name to show."""
    if isinstance(exits, str):
        if exits not in ("blocks", "all"):
            raise ValueError(
                f'`exits` is {exits!r}; wanted "blocks", "all", a number of exits, a list of module names or a list of '
                "fractions of the FLOPs"
            )
        found = points.blocks if exits == "blocks" else points.worthwhile
        return [(point, point.names[0]) for point in found]
    if isinstance(exits, int) and not isinstance(exits, bool):
        if not 1 <= exits <= len(points.worthwhile):
            raise ValueError(f"`exits` is {exits}; wanted 1 to {len(points.worthwhile)}, as many as there are places")
        wanted = [(j + 1) / (exits + 1) for j in range(exits)]
        return [(point, point.names[0]) for point in _nearest(points, wanted)]
    if isinstance(exits, Iterable):
        several = list(exits)
        if several and all(isinstance(name, str) for name in several):
            return _by_name(points, several)
        if several and all(isinstance(f, float) for f in several):
            return [(point, point.names[0]) for point in _nearest(points, _fractions(several, points))]
    raise TypeError(
        f'`exits` is {exits!r}; wanted "blocks", "all", a number of exits, a list of module names or a list of '
        "fractions of the FLOPs, each a float between 0 and 1"
    )


def _fractions(wanted: list[float], points: CutPoints) -> list[float]:
    for fraction in wanted:
        if not 0 < fraction < 1:
            raise ValueError(f"`exits` holds {fraction}; wanted fractions of the FLOPs, between 0 and 1")
    if len(wanted) > len(points.worthwhile):
        raise ValueError(f"`exits` holds {len(wanted)} fractions; there are {len(points.worthwhile)} places")
    return sorted(wanted)


def _nearest(points: CutPoints, wanted: list[float]) -> list[CutPoint]:
    """A different cut point for every fraction, in order, with the least sum of distances."""
    where = [point.cumulative_flops / max(points.total, 1) for point in points.worthwhile]
    best = [0.0] * (len(where) + 1)  # best[n]: the fractions so far, with the first n places
    choices = []
    for fraction in wanted:
        row, taken = [math.inf], [False]
        for n, at in enumerate(where):
            cost = best[n] + abs(at - fraction)
            taken.append(cost < row[n])
            row.append(min(cost, row[n]))
        best = row
        choices.append(taken)
    found, n = [], len(where)
    for taken in reversed(choices):
        while not taken[n]:
            n -= 1
        n -= 1
        found.append(points.worthwhile[n])
    return found[::-1]


def _by_name(points: CutPoints, wanted: list[str]) -> list[tuple[CutPoint, str]]:
    found: dict[int, tuple[CutPoint, str]] = {}
    for name in wanted:
        matches = [(p, full) for p in points.possible for full in p.names if full == name]
        if not matches and set("*?[") & set(name):
            matches = [(p, full) for p in points.possible for full in p.names if _matches(full, name)]
        if not matches:
            raise ValueError(f"`exits` holds {name!r}: {points.explain_missing(name)}")
        for point, full in matches:
            found.setdefault(point.after, (point, full))
    return [found[after] for after in sorted(found)]


def _matches(name: str, pattern: str) -> bool:
    """As file names match, dot by dot: "layer*.*" is every block of a ResNet, and nothing in the blocks."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _explain_missing(network: Network, possible: list[CutPoint], name: str) -> str:
    names = [name for point in possible for name in point.names]
    calls = [call for call in network.calls if call.name == name]
    if calls:
        live = list(_live_values(network.nodes))[calls[0].last]
        others = ", ".join(sorted(_describe(network, node) for node in live - {calls[0].output}))
        if others:
            return f"the network cannot be cut behind this module, because there it still needs {others}"
        return (
            "the network cannot be cut behind this module: it returns no tensor [batch, ...] that later ones go on from"
        )
    paths = [path for path, _ in network.model.named_modules()]
    if name in paths:
        leaves = [call.path for call in network.calls if call.is_leaf and name.startswith(call.path + ".")]
        if leaves:
            reason = network.opaque.get(leaves[0], "it has hooks, or is a layer of torch.nn")
            return f"{leaves[0]!r} around it is called as a whole, since {reason}"
        return "this module is not called"
    near = difflib.get_close_matches(name, names, 5, 0.3) or names[:5]
    return f"there is no such module, or none that the network can be cut behind; there are {', '.join(near)}"


def _describe(network: Network, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the input"
    if node in network.data:
        what = "the output"
    else:
        what = "a value (a size, say)"
    return f"{what} of {_names(network, node, _returning_calls(network).get(node, []))[0]}"
