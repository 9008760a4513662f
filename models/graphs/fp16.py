"""Rewrite an exported network as fp16, and an fp16 graph so that a CPU rounds like a GPU."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, TensorProto, helper

from models.graphs.builder import GraphBuilder, attributes_of
from models.graphs.network_file import FloatNetwork, GraphError
from service.artefact.contract import OUTPUT_NAME

OPSETS = (helper.make_opsetid("", 18),)

HALF_OPERATORS = {"Conv", "Relu", "MaxPool", "Add", "Concat", "Resize"}
FLOAT_OPERATORS = {
    *("Transpose", "Cast", "Sub", "Div"),  # normalise the image
    "Mul",  # scales the weights
    "ReduceMean",  # the sum of 128x128 cells of mean 4 exceeds 65504, the largest fp16 number
}


def halve(network: Path) -> ModelProto:
    """Return the fp16 graph of an exported network, with its contract.

    The last convolution computes in fp32, so that the logits are not rounded. It is small and needs
    a cast anyway.

    Raises:
        GraphError: the network has an operator that is not supported in fp16.
    """
    source = FloatNetwork(network)
    graph = GraphBuilder()
    halves: set[str] = set()

    def as_half(name: str) -> str:
        return name if name in halves else graph.once("Cast", [name], to=TensorProto.FLOAT16)

    def as_float(name: str) -> str:
        return graph.once("Cast", [name], to=TensorProto.FLOAT) if name in halves else name

    factors = {node.input[2] for node in source.graph.node if node.op_type == "Resize"}
    for tensor in source.graph.initializer:
        # ONNX's shape inference reads integers and a Resize's factors, but not from another file.
        is_float = tensor.data_type in {TensorProto.FLOAT, TensorProto.FLOAT16}
        inside = tensor.name in factors or not is_float
        graph.initializers[tensor.name] = tensor if inside else source.refer(tensor)
    for node in source.graph.node:
        (output,) = node.output
        if node.op_type not in HALF_OPERATORS | FLOAT_OPERATORS:
            raise GraphError(f"{output}: cannot compute {node.op_type} in fp16")
        if node.op_type in FLOAT_OPERATORS or output == OUTPUT_NAME:
            graph.copy(node, [as_float(name) for name in node.input], output)
        else:
            # A Resize's factors are always fp32.
            data = node.input[:1] if node.op_type == "Resize" else node.input
            rest = node.input[len(data) :]
            graph.copy(node, [*(as_half(name) for name in data), *rest], output)
            halves.add(output)
    return source.derive(graph.make("fp16", source.graph), "fp16", OPSETS)


def with_rounding(model: ModelProto) -> ModelProto:
    """Return an fp16 network that rounds its activations on ONNX Runtime's CPU as on a GPU.

    The CPU has few fp16 kernels. ONNX Runtime computes the others in fp32 between casts that it
    inserts, and removes adjacent casts, so that no activation is rounded. It keeps casts that are
    part of the graph. Here each fp16 operator becomes an fp32 operator whose result is cast to
    fp16. Tensor cores round in the same way, because they accumulate in fp32; a GPU kernel that
    fuses several operators rounds less often.
    """
    graph = GraphBuilder("rounding.")
    halves = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    for node in model.graph.node:
        (output,) = node.output
        if node.op_type == "Cast":
            graph.nodes.append(node)
            to_half = attributes_of(node)["to"] == TensorProto.FLOAT16
        elif to_half := not halves.isdisjoint(node.input):
            inputs = [
                graph.once("Cast", [name], to=TensorProto.FLOAT) if name in halves else name
                for name in node.input
            ]
            graph.emit("Cast", [graph.copy(node, inputs)], output, to=TensorProto.FLOAT16)
        else:
            graph.nodes.append(node)
        if to_half:
            halves.add(output)
    rounding = ModelProto()
    rounding.CopyFrom(model)
    del rounding.graph.node[:]
    rounding.graph.node.extend(graph.nodes)
    return rounding
