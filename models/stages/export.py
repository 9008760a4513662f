r"""Export a checkpoint to ONNX, with the contract in the metadata.

python -m models export --checkpoint runs/cpu/checkpoint.pt --version 1.0.0 \
        --artifact models/artifacts/context_fcn_resnet50_8s
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from models.checkpoint import Trained, load_network
from models.errors import StageError
from models.graphs.network_file import save_network
from models.networks import SegmentationNetwork
from models.networks.segmentation import Normalize
from models.prediction import SHAPES
from service.artefact.contract import INPUT_NAME, OUTPUT_NAME, ModelContract

OPSET = 18


class ExportError(StageError):
    """The exported graph does not keep the contract."""


class ServedNetwork(nn.Module):
    """The exported module: ``image (N, h, w, 3) uint8`` -> ``logits (N, C, h/s, w/s) float32``.

    Layout, cast and normalisation are inside, so that no second version of them exists.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.network(image.permute(0, 3, 1, 2).float())
        return logits


class FoldedConv2d(nn.Module):
    """A convolution with its BatchNorm folded in, its weights stored as fp16.

    The weights are ``fp16 weights x fp32 scale per output channel``, multiplied once when ONNX
    Runtime loads the graph. The file is half the size and gives the checkpoint's logits up to fp32
    rounding, because the checkpoint's own weights are on fp16's grid (see `rounded_weights`).
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor
        half = conv.weight.detach().half()
        if not torch.equal(half.float(), conv.weight):
            raise ExportError("the checkpoint's weights are not on fp16's grid")
        scale = torch.ones(conv.out_channels)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        if norm is not None:
            statistics = norm.state_dict()
            scale = norm.weight / torch.sqrt(statistics["running_var"] + norm.eps)
            bias = norm.bias + (bias - statistics["running_mean"]) * scale
        self.register_buffer("weight", half)
        self.register_buffer("scale", scale.detach().view(-1, 1, 1, 1))
        self.register_buffer("bias", bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        weight = self.weight.float() * self.scale
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def fold(parent: nn.Module) -> None:
    """Replace convolutions by `FoldedConv2d`, each with the BatchNorm registered right after it.

    In place and recursive. In these networks, registration order is the order of computation;
    `export` checks that no BatchNorm was missed. A DenseNet's BatchNorms come before their
    convolutions, with a ReLU between, and are not folded.
    """
    children = [*parent.named_children(), ("", nn.Identity())]
    for (name, child), (next_name, following) in pairwise(children):
        if isinstance(child, nn.Conv2d):
            norm = following if isinstance(following, nn.BatchNorm2d) else None
            setattr(parent, name, FoldedConv2d(child, norm))
            if norm is not None:
                setattr(parent, next_name, nn.Identity())
        else:
            fold(child)


def trace(network: nn.Module) -> onnx.ModelProto:
    """Return the network as ONNX, with batch, height and width dynamic."""
    example = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    batch, height, width = (torch.export.Dim(name) for name in ("N", "h32", "w32"))
    dims = {0: batch, 1: 32 * height, 2: 32 * width}
    program = torch.onnx.export(
        ServedNetwork(network).eval(),
        (example,),
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes={"image": dims},
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    return program.model_proto


def tidy(model: onnx.ModelProto) -> None:
    """Rename the dynamic dimensions and remove the exporter's notes.

    The notes on each node contain stack traces with the exporting machine's paths.
    """
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for value, names in (
        (model.graph.input[0], ("N", "h", "w")),
        (model.graph.output[0], ("N", "h_logits", "w_logits")),
    ):
        dims = [d for d in value.type.tensor_type.shape.dim if not d.HasField("dim_value")]
        for dim, name in zip(dims, names, strict=True):
            dim.dim_param = name


def unfolded(graph: onnx.GraphProto) -> bool:
    """Whether a BatchNorm is the only reader of a convolution's output."""
    readers = Counter(name for node in graph.node for name in node.input)
    convolved = {node.output[0] for node in graph.node if node.op_type == "Conv"}
    return any(
        node.op_type == "BatchNormalization"
        and node.input[0] in convolved
        and readers[node.input[0]] == 1
        for node in graph.node
    )


def export(network: SegmentationNetwork, contract: ModelContract) -> onnx.ModelProto:
    """Return the served graph of a network, with the contract in its metadata.

    Raises:
        ExportError: a BatchNorm was not folded into its convolution.
        ContractError: the graph's dimensions differ from the contract's.
    """
    network.eval()
    fold(network)
    model = trace(network)
    tidy(model)
    if unfolded(model.graph):
        raise ExportError("a BatchNorm was not folded into its convolution")
    helper.set_model_props(model, contract.to_metadata())
    model.producer_name = "fcn-segment"
    onnx.checker.check_model(model, full_check=True)
    contract.check_graph(_tensors(model.graph.input), _tensors(model.graph.output))
    return model


ONNX_RUNTIME_TYPES = {
    int(onnx.TensorProto.UINT8): "tensor(uint8)",
    int(onnx.TensorProto.FLOAT): "tensor(float)",
}


class _Tensor:
    """A graph's input or output as `ModelContract.check_graph` reads it."""

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        tensor = value.type.tensor_type
        self.name = value.name
        self.type = ONNX_RUNTIME_TYPES.get(tensor.elem_type, str(tensor.elem_type))
        self.shape = [
            d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim
        ]


def _tensors(values: list[onnx.ValueInfoProto]) -> Iterator[_Tensor]:
    return (_Tensor(value) for value in values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--artifact", type=Path, required=True, help="folder; its name is the served name"
    )
    parser.add_argument("--version", required=True, help="version of the artefact, such as 1.0.0")


def main(args: argparse.Namespace) -> int:
    """Export the checkpoint into the artefact folder."""
    trained = load_network(args.checkpoint)
    contract = make_contract(args.artifact.resolve().name, args.version, trained)
    model = export(trained.network, contract)
    save_network(model, args.artifact, "fp32")
    return 0


def make_contract(name: str, version: str, trained: Trained) -> ModelContract:
    """Return the contract of the exported network."""
    return ModelContract(
        name=name,
        version=version,
        network=trained.recipe.network,
        stride=trained.network.stride,
        labels=trained.labels,
        mean=Normalize.MEAN,
        std=Normalize.STD,
        working_size=trained.recipe.working_size,
        shapes=SHAPES,
        precision="fp32",
    )
