"""Keeps an ONNX graph in ONNX Runtime's blocked memory layout (NCHWc) across residual connections.

On CPUs, ONNX Runtime runs convolutions on blocks of 8 or 16 channels. Tensors keep this layout from one convolution to
the next, and the sum at the end of a residual block is fused into the convolution before it, as long as both terms have
the layout. If one does not, because it is a graph input or the output of an operator without it, such as Pad, then the
sum does not have it either, nor does the next residual block: each costs two conversions, a sum and an activation. An
average over 1 x 1 windows changes no value, and its output has the layout.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["keep_nchwc"]

_BLOCK = 16  # channels; 8 without AVX-512. Some CPUs have no blocked layout: there this changes nothing
_BLOCKED_OPS = {"Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
_LAYOUT_PRESERVING_OPS = {"Relu", "Sigmoid", "Tanh", "BatchNormalization"}


def keep_nchwc(graph: GraphProto) -> None:
    """Insert 1 x 1 averages before sums that would leave the blocked layout."""
    from onnx import helper

    channels = _channels(graph)
    blocked: set[str] = set()
    inserted: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        inputs = node.input
        if node.op_type in ("Add", "Sum") and any(name in blocked for name in inputs):
            for i, name in enumerate(inputs):
                if name not in blocked and channels.get(name) == channels.get(node.output[0], 0):
                    if name not in inserted:
                        inserted[name] = f"{name}_in_blocks"
                        nodes.append(helper.make_node("AveragePool", [name], [inserted[name]], kernel_shape=[1, 1]))
                        blocked.add(inserted[name])
                    inputs[i] = inserted[name]
        if _is_blocked(node, blocked, channels):
            blocked.add(node.output[0])
        nodes.append(node)
    kept = copy.deepcopy(nodes)  # deleting the graph's list invalidates its nodes
    del graph.node[:]
    graph.node.extend(kept)


def _is_blocked(node: NodeProto, blocked: set[str], channels: dict[str, int]) -> bool:
    if node.op_type in _BLOCKED_OPS:
        return channels.get(node.output[0], 1) % _BLOCK == 0
    if node.op_type in _LAYOUT_PRESERVING_OPS:
        return node.input[0] in blocked
    return node.op_type in ("Add", "Sum", "Mul") and all(name in blocked for name in node.input)


def _channels(graph: GraphProto) -> dict[str, int]:
    """Number of channels of every float32 feature map."""
    from onnx import TensorProto

    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        sizes = tensor.shape.dim
        if tensor.elem_type == TensorProto.FLOAT and len(sizes) == 4 and sizes[1].dim_value:
            found[value.name] = int(sizes[1].dim_value)
    return found
