"""Fully convolutional VGG16: its fully connected layers are convolutions.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015),
configuration D, made fully convolutional by Long, Shelhamer, Darrell (2015). The two forms are
Keras-FCN's ``FCN_Vgg16_32s`` and ``AtrousFCN_Vgg16_16s``.

Parameters and multiply-adds are those for 21 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from models.networks.segmentation import Backbone, LinearHead, SegmentationNetwork

BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
"""Convolutions of each block, and their channels."""
OUT_CHANNELS = 4096


class VGG16(Backbone):
    """VGG16 without its last layer, with torchvision's layer and key names.

    The layers ``classifier.0`` and ``classifier.3`` (``fc6`` and ``fc7`` in the paper) are
    convolutions of the same weights: torchvision's ``(4096, 25088)`` is ``(4096, 512, 7, 7)``.

    Args:
        dilate: omit the last pooling and dilate ``fc6`` by 2 instead, which gives stride 16
            instead of 32 with the same weights ("a trous", Chen et al. 2015).

    There are six stages, of 64, 128, 256, 512, 512 and 4096 channels: five blocks, each with its
    pooling, and the fully connected layers.
    """

    def __init__(self, *, dilate: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        self._ends = [0]
        for convolutions, channels in BLOCKS:
            for _ in range(convolutions):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
            self._ends.append(len(layers))
        if dilate:
            layers.pop()
        self.features = nn.Sequential(*layers)
        dilation = 2 if dilate else 1
        self.classifier = nn.Sequential(
            nn.Conv2d(in_channels, OUT_CHANNELS, 7, padding=3 * dilation, dilation=dilation),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Conv2d(OUT_CHANNELS, OUT_CHANNELS, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Without BatchNorm, only the initial weights keep the activations' variance.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """See the class."""
        layers = list(self.features)
        return [*(layers[start:end] for start, end in pairwise(self._ends)), [*self.classifier]]


def fcn_vgg16_32s(classes: int) -> SegmentationNetwork:
    """Stride 32: 134,346,581 parameters, 110.80 G multiply-adds at 512x512."""
    return SegmentationNetwork(
        stride=32, backbone=VGG16(dilate=False), classifier=LinearHead(OUT_CHANNELS, classes)
    )


def atrous_fcn_vgg16_16s(classes: int) -> SegmentationNetwork:
    """Stride 16 by dilation: 134,346,581 parameters, 202.67 G multiply-adds at 512x512."""
    return SegmentationNetwork(
        stride=16, backbone=VGG16(dilate=True), classifier=LinearHead(OUT_CHANNELS, classes)
    )
