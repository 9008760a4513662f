"""What a network is made of, read off its own operations: stages, sizes, costs, receptive fields.

The network is traced without memory or arithmetic (``torch.fx`` on the ``meta`` device), so what is
found here is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from models.networks.segmentation import Features, SegmentationNetwork

SIDE = 512
"""Pixels of the square image that sizes and costs are for."""
IMAGE = "image"
"""What the first stage reads."""
PERIOD = 32
"""Pixels after which the cells' receptive fields repeat."""


@dataclass(frozen=True)
class Layer:
    """One operation.

    ``name``: its module's, or the function's with a number; ``settings``: as PyTorch prints them.
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
    """The operations from some stages' outputs to its own.

    In the backbone as `Backbone` has them; in the head, a module with parameters and what is done
    for it. ``inputs``: the stages that it reads. ``stride``: pixels per cell.
    ``receptive_field``: side of the square of pixels that a cell may depend on, by the sizes of all
    kernels on the way; None for the whole image.
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
    """A network; sizes and costs are those for one image of `SIDE` by `SIDE` pixels."""

    stride: int
    receptive_field: int | None
    parameters: int
    multiply_adds: int
    stages: tuple[Stage, ...]


class _Staged(nn.Module):
    """A network that returns the backbone's stages beside the logits."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.normalize = network.normalize
        self.backbone = network.backbone
        self.classifier = network.classifier

    def forward(self, image: Tensor) -> Features:
        features: Features = self.backbone((self.normalize(image),))
        return (*features, self.classifier(features))


def structure_of(network: SegmentationNetwork) -> Structure:
    """Return the structure of a network whose parameters are on the ``meta`` device.

    The network is left in eval mode.
    """
    stages = _Trace(network).stages()
    return Structure(
        stride=stages[-1].stride,
        receptive_field=stages[-1].receptive_field,
        parameters=sum(stage.parameters for stage in stages),
        multiply_adds=sum(stage.multiply_adds for stage in stages),
        stages=stages,
    )


class _Trace:
    """A network's operations in order, each with the size of its output."""

    def __init__(self, network: SegmentationNetwork) -> None:
        staged = _Staged(network).eval()
        traced = fx.GraphModule(staged, fx.Tracer().trace(staged))
        with torch.inference_mode():
            ShapeProp(traced).propagate(torch.zeros(1, 3, SIDE, SIDE, device="meta"))
        self._nodes = list(traced.graph.nodes)
        self._modules = dict(staged.named_modules())
        self._backbone = network.backbone
        self._counted: set[nn.Module] = set()

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in order."""
        groups = self._group()
        owners = {node: name for name, nodes in groups.items() for node in nodes}
        return tuple(self._stage(name, groups, owners) for name in groups)

    def _group(self) -> dict[str, list[fx.Node]]:
        """Each stage's operations."""
        *features, _ = self._nodes[-1].args[0]
        ends = [self._nodes.index(feature) + 1 for feature in features]
        groups = {
            name: self._nodes[start:end]
            for name, (start, end) in zip(self._stage_names(), pairwise(ends), strict=True)
        }
        head = self._nodes[ends[-1] : -1]
        owners: dict[fx.Node, str] = {}
        for node in reversed(head):
            # What has no parameters belongs to what it is done for, or to the head as a whole.
            users = (owners[user] for user in node.users if user in owners)
            owners[node] = self._head_module(node) or next(users, "classifier")
        # In the order in which the stages end.
        for name in reversed(dict.fromkeys(owners.values())):
            groups[name] = [node for node in head if owners[node] == name]
        return groups

    def _stage_names(self) -> list[str]:
        """Each stage of the backbone is called after its module, or its first and its last."""
        paths = {module: path for path, module in self._modules.items()}
        names = []
        for modules in self._backbone.stages():
            first, last = paths[modules[0]], paths[modules[-1]]
            names.append(first if first == last else f"{first}..{last.rpartition('.')[2]}")
        return names

    def _head_module(self, node: fx.Node) -> str | None:
        """The outermost module within the head that a node is part of, if it has parameters."""
        for path, _ in node.meta["nn_module_stack"].values():
            if path.startswith("classifier.") and [*self._modules[path].parameters()]:
                return str(path)
        return None

    def _stage(
        self, name: str, groups: dict[str, list[fx.Node]], owners: dict[fx.Node, str]
    ) -> Stage:
        nodes = groups[name]
        read = {owners.get(source, IMAGE) for node in nodes for source in node.all_input_nodes}
        layers = tuple(self._layer(node) for node in nodes)
        last = layers[-1]
        return Stage(
            name=name,
            inputs=tuple(other for other in (IMAGE, *groups) if other in read - {name}),
            channels=last.channels,
            height=last.height,
            width=last.width,
            stride=SIDE // last.height,
            receptive_field=self._receptive_field(nodes[-1]),
            parameters=sum(layer.parameters for layer in layers),
            multiply_adds=sum(layer.multiply_adds for layer in layers),
            layers=layers,
        )

    def _layer(self, node: fx.Node) -> Layer:
        channels, height, width = _shape(node)
        module = self._module(node)
        if module is None:
            kind = getattr(node.target, "__name__", str(node.target))
            return Layer(node.name, kind, "", channels, height, width, 0, 0)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        if module in self._counted:
            parameters = 0
        self._counted.add(module)
        return Layer(
            str(node.target),
            type(module).__name__,
            module.extra_repr(),
            channels,
            height,
            width,
            parameters,
            _multiply_adds(module, node),
        )

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _receptive_field(self, output: fx.Node) -> int | None:
        """See `Stage`: the largest of those of neighbouring cells in the middle."""
        _, size, _ = _shape(output)
        cells = range(size // 2, size // 2 + max(1, PERIOD * size // SIDE))
        fields = [self._pixels(output, cell) for cell in cells]
        known = [field for field in fields if field is not None]
        return max(known) if len(known) == len(fields) else None

    def _pixels(self, output: fx.Node, cell: int) -> int | None:
        """How many rows of pixels a row of cells depends on; None for all.

        From the output backwards, what is read of a node's inputs is a span ``(first, last)`` of
        their rows.
        """
        spans = {output: (cell, cell)}
        for node in reversed(self._nodes):
            if node not in spans:
                continue
            for source in node.all_input_nodes:
                span = self._reads(node, source, *spans[node])
                if span is None:
                    return None
                first, last = spans.get(source, span)
                spans[source] = min(first, span[0]), max(last, span[1])
        first, last = spans[self._nodes[0]]
        return last - first + 1

    def _reads(
        self, node: fx.Node, source: fx.Node, first: int, last: int
    ) -> tuple[int, int] | None:
        """Which rows of a source a node reads for a span of its own rows; None for all."""
        written, read = _shape(node)[1], _shape(source)[1]
        match self._module(node):
            case nn.Conv2d() | nn.MaxPool2d() | nn.AvgPool2d() as window:
                kernel, stride, padding, dilation = _window(window)
                return first * stride - padding, last * stride - padding + (kernel - 1) * dilation
            case nn.ConvTranspose2d() as window:
                kernel, stride, padding, dilation = _window(window)
                reach = (kernel - 1) * dilation - padding
                return -((reach - first) // stride), (last + padding) // stride
        if node.target is F.interpolate:
            # Bilinear, half-pixel centres: row i lies at (i + 0.5) * read / written - 0.5.
            below = [((2 * row + 1) * read - written) // (2 * written) for row in (first, last)]
            return below[0], below[1] + 1
        if node.target == "mean":
            return None
        if read == 1:
            return 0, 0
        if read != written:
            raise NotImplementedError(f"{node.name}: not known which rows it reads")
        return first, last


def _shape(node: fx.Node) -> tuple[int, int, int]:
    """Channels, height and width of a node's output."""
    _, channels, height, width = node.meta["tensor_meta"].shape
    return channels, height, width


def _multiply_adds(module: nn.Module, node: fx.Node) -> int:
    """Those of a convolution; the rest is small beside them and not counted."""
    if isinstance(module, nn.Conv2d):
        _, height, width = _shape(node)
    elif isinstance(module, nn.ConvTranspose2d):
        _, height, width = _shape(node.all_input_nodes[0])
    else:
        return 0
    return module.weight.numel() * height * width


def _window(module: nn.Module) -> list[int]:
    """Kernel, stride, padding and dilation along one axis."""
    names = ("kernel_size", "stride", "padding", "dilation")
    values = [getattr(module, name, 1) for name in names]
    return [value[0] if isinstance(value, tuple) else value for value in values]
