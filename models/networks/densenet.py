"""DenseNets for segmentation: every layer reads the outputs of all layers before it in its block.

Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks" (2017). The two
forms are Keras-FCN's ``DenseNet_FCN``, which is FC-DenseNet103 (Jegou et al., "The One Hundred
Layers Tiramisu", 2017), and ``Atrous_DenseNet``, both based on keras-contrib's ``densenet.py``.

Parameters and multiply-adds are those for 21 classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.networks.segmentation import (
    Backbone,
    Features,
    LinearHead,
    SegmentationNetwork,
    classify,
)

DROPOUT = 0.2


class DenseBlock(nn.Module):
    """Layers that each add ``growth`` channels to the outputs of all previous layers.

    A layer is BatchNorm, ReLU, 3x3 convolution. With ``bottleneck``, BatchNorm, ReLU and a 1x1
    convolution to ``4 * growth`` channels precede it.

    Args:
        in_channels: of the input.
        layers: their number.
        growth: channels added by each layer.
        bottleneck: see above.
        dilation: of the 3x3 convolutions.
        keep_input: whether the output includes the input.
    """

    def __init__(
        self,
        in_channels: int,
        layers: int,
        growth: int,
        *,
        bottleneck: bool = False,
        dilation: int = 1,
        keep_input: bool = True,
    ) -> None:
        super().__init__()
        self.keep_input = keep_input
        self.out_channels = layers * growth + keep_input * in_channels
        for index in range(layers):
            layer = _dense_layer(in_channels + index * growth, growth, bottleneck, dilation)
            self.add_module(f"denselayer{index + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        outputs = [x]
        for layer in self.children():
            outputs.append(layer(torch.cat(outputs, dim=1)))
        return torch.cat(outputs if self.keep_input else outputs[1:], dim=1)


def _dense_layer(in_channels: int, growth: int, bottleneck: bool, dilation: int) -> nn.Sequential:
    if not bottleneck:
        layers = _norm_relu_conv("1", in_channels, growth, 3, dilation)
    else:
        width = 4 * growth
        layers = _norm_relu_conv("1", in_channels, width, 1)
        layers |= _norm_relu_conv("2", width, growth, 3, dilation)
    return nn.Sequential(layers | {"dropout": nn.Dropout(DROPOUT)})


def _transition(in_channels: int, out_channels: int, *, pool: bool) -> nn.Sequential:
    layers = _norm_relu_conv("", in_channels, out_channels, 1)
    layers["dropout"] = nn.Dropout(DROPOUT)
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


def _norm_relu_conv(
    number: str, in_channels: int, out_channels: int, kernel: int, dilation: int = 1
) -> OrderedDict[str, nn.Module]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False
    )
    return OrderedDict(
        {
            f"norm{number}": nn.BatchNorm2d(in_channels),
            f"relu{number}": nn.ReLU(inplace=True),
            f"conv{number}": conv,
        }
    )


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


class DenseNet121(Backbone):
    """DenseNet-121 without pooling between its blocks, with torchvision's layer and key names.

    As in keras-contrib's ``transition_pooling=None, transition_dilation_rate=2``: each block has
    twice the dilation of the previous one instead of half its size. The first two halvings, before
    the blocks, remain, so that ImageNet weights fit.

    There are five stages: the stem, and four blocks of 128, 256, 512 and 1024 channels, all of
    stride 4.
    """

    GROWTH = 32
    LAYERS = (6, 12, 24, 16)
    OUT_CHANNELS = 1024

    def __init__(self) -> None:
        super().__init__()
        channels = 2 * self.GROWTH
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(channels),
            relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
        for index, count in enumerate(self.LAYERS):
            if index > 0:
                layers[f"transition{index}"] = _transition(channels, channels // 2, pool=False)
                channels //= 2
            block = DenseBlock(channels, count, self.GROWTH, bottleneck=True, dilation=2**index)
            layers[f"denseblock{index + 1}"] = block
            channels = block.out_channels
        layers |= {"norm5": nn.BatchNorm2d(channels), "relu5": nn.ReLU(inplace=True)}
        self.features = nn.Sequential(layers)
        _initialize(self)

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """See the class."""
        layers = list(self.features)
        return [layers[:4], layers[4:6], layers[6:8], layers[8:10], layers[10:]]


class FCDenseNet(Backbone):
    """The downward half of FC-DenseNet103.

    There are six stages of strides 1 to 32: a convolution with a block, then five times a
    transition, which halves the size, with a block. The last block's output leaves out its input.
    """

    GROWTH = 16
    LAYERS = (4, 5, 7, 10, 12, 15)

    def __init__(self) -> None:
        super().__init__()
        channels = 3 * self.GROWTH
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, channels, 3, padding=1, bias=False)
        )
        self.out_channels: list[int] = []
        for index, count in enumerate(self.LAYERS):
            if index > 0:
                layers[f"transition{index}"] = _transition(channels, channels, pool=True)
            last = index == len(self.LAYERS) - 1
            block = DenseBlock(channels, count, self.GROWTH, keep_input=not last)
            layers[f"denseblock{index + 1}"] = block
            channels = block.out_channels
            self.out_channels.append(channels)
        self.features = nn.Sequential(layers)
        _initialize(self)

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """See the class."""
        layers = list(self.features)
        return [layers[start : start + 2] for start in range(0, len(layers), 2)]


class UpwardBlock(nn.Module):
    """A block at twice the size of its input that also reads the encoder's features."""

    def __init__(self, in_channels: int, skip_channels: int, layers: int, keep_input: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(
            in_channels, in_channels, 3, stride=2, padding=1, output_padding=1
        )
        self.relu = nn.ReLU(inplace=True)
        self.block = DenseBlock(
            in_channels + skip_channels, layers, FCDenseNet.GROWTH, keep_input=keep_input
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``(N, C, h, w)`` and ``(N, S, 2h, 2w)`` -> ``(N, D, 2h, 2w)``."""
        out: Tensor = self.block(torch.cat((self.relu(self.up(x)), skip), dim=1))
        return out


class UpwardHead(nn.Module):
    """The upward half of FC-DenseNet103: ``Features`` of strides 1 to 32 -> ``(N, C, H, W)``.

    A block's output leaves out its input, except in the last block.
    """

    def __init__(self, skip_channels: Sequence[int], in_channels: int, classes: int) -> None:
        super().__init__()
        blocks = []
        for index in reversed(range(len(skip_channels))):
            block = UpwardBlock(
                in_channels, skip_channels[index], FCDenseNet.LAYERS[index], keep_input=index == 0
            )
            blocks.append(block)
            in_channels = block.block.out_channels
        self.blocks = nn.ModuleList(blocks)
        _initialize(self)
        self.predict = classify(in_channels, classes)

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        _, *skips, x = features
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = block(x, skip)
        out: Tensor = self.predict(x)
        return out


def densenet_fcn(classes: int) -> SegmentationNetwork:
    """Stride 1 by five skips: 9,321,429 parameters, 105.54 G multiply-adds at 512x512."""
    backbone = FCDenseNet()
    *skip_channels, in_channels = backbone.out_channels
    return SegmentationNetwork(
        stride=1, backbone=backbone, classifier=UpwardHead(skip_channels, in_channels, classes)
    )


def atrous_densenet(classes: int) -> SegmentationNetwork:
    """Stride 4 by dilation: 6,975,381 parameters, 113.38 G multiply-adds at 512x512."""
    return SegmentationNetwork(
        stride=4, backbone=DenseNet121(), classifier=LinearHead(DenseNet121.OUT_CHANNELS, classes)
    )
