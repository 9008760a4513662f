"""A network's architecture: stages, sizes, costs and receptive fields.

The network is traced without memory or arithmetic (``torch.fx`` on the ``meta`` device), so the
result describes the operations that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from models.networks.segmentation import SegmentationNetwork

SIDE = 512
"""Pixels of the square image that sizes and costs are for."""
IMAGE = "image"
"""Input of the first stage."""
PERIOD = 32
"""Pixels after which the cells' receptive fields repeat."""


@dataclass(frozen=True)
class Layer:
    """One operation, called after its module or its function; ``settings`` as PyTorch prints them.

    ``channels``, ``height``, ``width``: of its output.
    """

    name: str
    kind: str
    settings: str
    channels: int
    height: int
    width: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Stage:
    """Operations from the outputs of other stages, ``inputs``, to one output.

    A stage of the backbone is one of `Backbone.stages`; a stage of the head is a module that has
    parameters, with the operations that prepare its input. ``stride``: pixels per cell.
    ``receptive_field``: side of the square of pixels that a cell may depend on, from the sizes of
    all kernels; None for the whole image.
    """

    name: str
    inputs: tuple[str, ...]
    channels: int
    height: int
    width: int
    stride: int
    receptive_field: int | None
    parameters: int
    multiply_adds: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Structure:
    """A network; sizes and costs are for one image of `SIDE` by `SIDE` pixels."""

    stride: int
    receptive_field: int | None
    parameters: int
    multiply_adds: int
    stages: tuple[Stage, ...]


def structure_of(network: SegmentationNetwork) -> Structure:
    """Return the structure of a network whose parameters are on the ``meta`` device.

    The network is left in eval mode.
    """
    graph = fx.Tracer().trace(network.eval(), concrete_args={"features": None})
    with torch.inference_mode():
        image = torch.zeros(1, 3, SIDE, SIDE, device="meta")
        ShapeProp(fx.GraphModule(network, graph)).propagate(image, None)
    # The others are the absent features, and the return.
    nodes = [node for node in graph.nodes if "tensor_meta" in node.meta and node.op != "output"]
    owners = _owners(nodes, network)
    # In the order in which the stages end.
    names = [name for name in reversed(dict.fromkeys(owners.values())) if name != IMAGE]
    stages = []
    for name in names:
        own = [node for node in nodes if owners[node] == name]
        read = {owners[source] for node in own for source in node.all_input_nodes} - {name}
        layers = tuple(map(_layer, own))
        last = layers[-1]
        stage = Stage(
            name=name,
            inputs=tuple(other for other in (IMAGE, *names) if other in read),
            channels=last.channels,
            height=last.height,
            width=last.width,
            stride=SIDE // last.height,
            receptive_field=_receptive_field(nodes, own[-1]),
            parameters=sum(layer.parameters for layer in layers),
            multiply_adds=sum(layer.multiply_adds for layer in layers),
            layers=layers,
        )
        stages.append(stage)
    return Structure(
        stride=stages[-1].stride,
        receptive_field=stages[-1].receptive_field,
        parameters=sum(stage.parameters for stage in stages),
        multiply_adds=sum(stage.multiply_adds for stage in stages),
        stages=tuple(stages),
    )


def _owners(nodes: Sequence[fx.Node], network: SegmentationNetwork) -> dict[fx.Node, str]:
    """Return the stage that each operation belongs to, from the last operation to the first."""
    paths = {module: path for path, module in network.named_modules()}
    stages = {"normalize": IMAGE}
    for modules in network.backbone.stages():
        first, last = paths[modules[0]], paths[modules[-1]]
        name = first if first == last else f"{first}..{last.rpartition('.')[2]}"
        stages.update((paths[module], name) for module in modules)
    for module, path in paths.items():
        if path.startswith("classifier.") and any(True for _ in module.parameters()):
            stages[path] = path
    owners: dict[fx.Node, str] = {}
    for node in reversed(nodes):
        around = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        own = next((stages[path] for path in around if path in stages), None)
        # An operation without parameters belongs to the stage that uses it, or to the whole head.
        users = (owners[user] for user in node.users if user in owners)
        owners[node] = own or next(users, "classifier")
    return owners


def _layer(node: fx.Node) -> Layer:
    module = _module(node)
    if module is None:
        kind = getattr(node.target, "__name__", str(node.target))
        return Layer(node.name, kind, "", *_shape(node), 0, 0)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    multiply_adds = 0
    # Convolutions alone: the other operations cost little.
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        transposed = isinstance(module, nn.ConvTranspose2d)
        _, height, width = _shape(node.all_input_nodes[0] if transposed else node)
        multiply_adds = module.weight.numel() * height * width
    return Layer(
        str(node.target),
        type(module).__name__,
        module.extra_repr(),
        *_shape(node),
        parameters,
        multiply_adds,
    )


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    if owner is None or node.op != "call_module":
        return None
    return owner.get_submodule(str(node.target))


def _shape(node: fx.Node) -> tuple[int, int, int]:
    """Channels, height and width of a node's output."""
    _, channels, height, width = node.meta["tensor_meta"].shape
    return channels, height, width


def _receptive_field(nodes: Sequence[fx.Node], output: fx.Node) -> int | None:
    """See `Stage`: the largest one of neighbouring cells in the middle of the image.

    Goes from a cell of the output to the image and keeps the first and last row read of each node.
    """
    _, size, _ = _shape(output)
    fields = []
    for row in range(size // 2, size // 2 + max(1, PERIOD * size // SIDE)):
        spans = {output: (row, row)}
        for node in reversed(nodes):
            for source in node.all_input_nodes if node in spans else ():
                span = _rows_read(node, source, *spans[node])
                if span is None:
                    return None
                first, last = spans.get(source, span)
                spans[source] = min(first, span[0]), max(last, span[1])
        first, last = spans[nodes[0]]
        fields.append(last - first + 1)
    return max(fields)


def _rows_read(node: fx.Node, source: fx.Node, first: int, last: int) -> tuple[int, int] | None:
    """The rows of ``source`` that rows ``first`` to ``last`` of ``node`` read; None for all."""
    written, read = _shape(node)[1], _shape(source)[1]
    module = _module(node)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.MaxPool2d | nn.AvgPool2d):
        names = ("kernel_size", "stride", "padding", "dilation")
        values = [getattr(module, name, 1) for name in names]
        kernel, stride, padding, dilation = (v[0] if isinstance(v, tuple) else v for v in values)
        reach = (kernel - 1) * dilation - padding
        if isinstance(module, nn.ConvTranspose2d):
            return -((reach - first) // stride), (last + padding) // stride
        return first * stride - padding, last * stride + reach
    if node.target is F.interpolate:
        # Bilinear, half-pixel centres: row i is at (i + 0.5) * read / written - 0.5.
        below = [((2 * row + 1) * read - written) // (2 * written) for row in (first, last)]
        return below[0], below[1] + 1
    if node.target == "mean":
        return None
    if read == 1:
        return 0, 0
    if read != written:
        raise NotImplementedError(f"{node.name}: unknown which rows it reads")
    return first, last
