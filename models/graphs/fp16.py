"""An exported float network as an fp16 graph, and that graph for a CPU to compute like a GPU."""

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
    "ReduceMean",  # of 128x128 cells whose mean is 4, the sum passes 65504, fp16's greatest number
}


def halve(network: Path) -> ModelProto:
    """Return the fp16 graph of an exported network, with its contract.

    The last convolution computes in fp32. It is small, and a cast before it takes the place of one
    after it, so that the logits are not rounded.

    Raises:
        GraphError: the network holds something that is not known here.
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
        # ONNX's shape inference reads integers and a Resize's factors, and not from another file.
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
            # A Resize's factors are fp32 whatever it resizes.
            data = node.input[:1] if node.op_type == "Resize" else node.input
            rest = node.input[len(data) :]
            graph.copy(node, [*(as_half(name) for name in data), *rest], output)
            halves.add(output)
    return source.derive(graph.make("fp16", source.graph), "fp16", OPSETS)


def with_rounding(model: ModelProto) -> ModelProto:
    """Return an fp16 network in a form that ONNX Runtime's CPU does not compute more exactly.

    The CPU has few fp16 kernels. ONNX Runtime has it compute in fp32 between casts of its own,
    and then drops these wherever two meet, so that no activation is rounded. Casts that the graph
    itself holds it keeps: here each operator on fp16 becomes one on fp32, its result rounded to
    fp16. That is what tensor cores do, which add up in fp32; where a GPU's kernel holds several
    operators, it rounds less often.
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
