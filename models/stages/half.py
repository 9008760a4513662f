r"""Write an exported network as fp16 for GPUs: half the memory traffic, and tensor cores.

    python -m models half --artifact models/artifacts/context_fcn_resnet50_8s

Writes ``network.fp16.onnx`` beside ``network.onnx``, in seconds and without photos. It has the
float network's operators, for each of which ONNX Runtime has a CUDA kernel, and no weights: ONNX
Runtime reads the float file's, multiplies them by BatchNorm's factor in fp32 and rounds the
product to fp16, all while it loads the graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from onnx import ModelProto, TensorProto, helper

from models.graphs.builder import GraphBuilder
from models.graphs.network_file import FILES, FloatNetwork, GraphError, save
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--artifact", type=Path, required=True, help="folder of network.onnx")


def main(args: argparse.Namespace) -> int:
    """Write the fp16 network into the artefact folder."""
    save(halve(args.artifact / FILES["fp32"]), args.artifact, "fp16")
    return 0
