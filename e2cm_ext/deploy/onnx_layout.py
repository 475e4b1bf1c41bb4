"""Keeps the convolutions of an ONNX graph together where a residual connection would part them on ONNX Runtime.

ONNX Runtime runs convolutions on CPUs in blocks of 8 or 16 channels. Tensors stay in blocks from one convolution to the
next, and the sum at the end of a residual block is done within the convolution before it, as long as both its terms are
in blocks. If one is not, because it comes into the graph from outside, or from an operator that knows no blocks, such
as Pad, then the sum is not in blocks either, nor that at the end of the next residual block, and so on: each costs two
conversions, a sum and an activation. An average over windows of 1 x 1 changes nothing, and its result is in blocks.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["keep_nchwc"]

_BLOCK = 16  # channels; of 8 where a CPU has no AVX-512, and none at all on some, where this does no good, and no harm
_MAKE = {"Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
_KEEP = {"Relu", "Sigmoid", "Tanh", "BatchNormalization"}


def keep_nchwc(graph: GraphProto) -> None:
    """Puts averages over windows of 1 x 1 where they keep sums in blocks."""
    from onnx import helper

    channels = _channels(graph)
    blocked: set[str] = set()
    put: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        inputs = node.input
        if node.op_type in ("Add", "Sum") and any(name in blocked for name in inputs):
            for i, name in enumerate(inputs):
                if name not in blocked and channels.get(name) == channels.get(node.output[0], 0):
                    if name not in put:
                        put[name] = f"{name}_in_blocks"
                        nodes.append(helper.make_node("AveragePool", [name], [put[name]], kernel_shape=[1, 1]))
                        blocked.add(put[name])
                    inputs[i] = put[name]
        if _is_blocked(node, blocked, channels):
            blocked.add(node.output[0])
        nodes.append(node)
    kept = copy.deepcopy(nodes)  # the graph's own go with its list
    del graph.node[:]
    graph.node.extend(kept)


def _is_blocked(node: NodeProto, blocked: set[str], channels: dict[str, int]) -> bool:
    if node.op_type in _MAKE:
        return channels.get(node.output[0], 1) % _BLOCK == 0
    if node.op_type in _KEEP:
        return node.input[0] in blocked
    return node.op_type in ("Add", "Sum", "Mul") and all(name in blocked for name in node.input)


def _channels(graph: GraphProto) -> dict[str, int]:
    """Of feature maps in float32."""
    from onnx import TensorProto

    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        sizes = tensor.shape.dim
        if tensor.elem_type == TensorProto.FLOAT and len(sizes) == 4 and sizes[1].dim_value:
            found[value.name] = int(sizes[1].dim_value)
    return found
