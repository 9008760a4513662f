"""The least arithmetic and memory traffic of a network, computed from its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from onnx import NodeProto, TensorProto

from service.artefact.contract import INPUT_NAME, OUTPUT_NAME, Shape

_READ_AND_WRITTEN: Final = {"Conv", "MaxPool", "ReduceMean", "Concat"}
"""Operators that cannot be fused with the preceding one."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a network.

    ``multiply_adds``: all convolutions' multiply-adds for one image. ``elements``: values read and
    written per image. ``weights``: values read per run. All possible fusions are assumed: a
    convolution reads its input and weights once and writes its output once, including bias, ReLU
    and residual sum. ``fixed_bytes``: the uint8 image and its float32 logits, in every precision.
    """

    multiply_adds: int
    elements: int
    weights: int
    fixed_bytes: int

    def bytes_of(self, batch: int, element_bytes: int) -> int:
        """The least memory traffic of one run, in bytes."""
        return batch * (self.elements * element_bytes + self.fixed_bytes) + (
            self.weights * element_bytes
        )


def network_cost(network: Path, shape: Shape) -> Cost:
    """The cost of one image of ``shape``; ``network``: an artefact's fp32 file."""
    model = onnx.load(network, load_external_data=False)
    sides = model.graph.input[0].type.tensor_type.shape.dim
    for dimension, size in zip(sides, (1, *shape, 3), strict=True):
        dimension.Clear()
        dimension.dim_value = size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    sizes = {
        value.name: tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    sizes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    multiply_adds = elements = weights = 0
    for node in graph.node:
        if node.op_type == "Conv":
            multiply_adds += _multiply_adds(node, sizes)
            weights += math.prod(sizes[node.input[1]])
        if node.op_type in _READ_AND_WRITTEN:
            # fixed_bytes counts the image, read as uint8, and the logits, written as float32.
            inputs = node.input if node.op_type == "Concat" else node.input[:1]
            elements += sum(math.prod(sizes[name]) for name in (*inputs, *node.output))
        if node.op_type == "Add":
            # One of the two operands comes directly from a convolution.
            elements += max(math.prod(sizes[name]) for name in node.input)
    image, logits = math.prod(sizes[INPUT_NAME]), math.prod(sizes[OUTPUT_NAME])
    return Cost(multiply_adds, elements - image - logits, weights, image + 4 * logits)


def _multiply_adds(node: NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-adds of one convolution; its weights are (out, in / groups, height, width)."""
    return math.prod(sizes[node.output[0]]) * math.prod(sizes[node.input[1]][1:])


def matrix_product(size: int, element: int = TensorProto.FLOAT16) -> bytes:
    """A graph that multiplies two ``(size, size)`` matrices ``a`` and ``b`` into ``c``."""
    names = ("a", "b", "c")
    a, b, c = (onnx.helper.make_tensor_value_info(name, element, [size, size]) for name in names)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a, b], [c]
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    serialised: bytes = model.SerializeToString()
    return serialised
