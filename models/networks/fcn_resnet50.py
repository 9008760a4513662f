"""Fully convolutional ResNet-50: a trunk, a classifier, and one bilinear upsampling by the caller.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation" (2015); the
stride-16 form with a 1x1 classifier is Keras-FCN's ``AtrousFCN_Resnet50_16s``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.resnet import OUT_CHANNELS, Normalize, ResNet50
from service.voc import NUM_CLASSES


class FcnResNet50(nn.Module):
    """``image (N, 3, H, W)`` float RGB in [0, 255] -> ``logits (N, 21, H/stride, W/stride)``.

    H and W are multiples of 32. The logits are upsampled bilinearly by whoever needs pixels: the
    loss while training, the service when serving; labels are never resized.
    """

    def __init__(self, *, stride: int, classifier: nn.Module) -> None:
        super().__init__()
        self.stride = stride
        self.normalize = Normalize()
        self.backbone = ResNet50(dilate_last_stage=stride == 16)
        self.classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.classifier(self.backbone(self.normalize(image)))
        return out


class ContextHead(nn.Module):
    """What surrounds each cell, near, far and in the whole image, before it is classified.

    A light form of DeepLabv3's ASPP (Chen et al. 2017): the branches read 256 reduced channels
    instead of 2048. ``(N, 2048, h, w)`` -> ``(N, 21, h, w)``.
    """

    CHANNELS = 256
    DILATIONS = (4, 8)
    """In cells of 16 pixels: windows of 9 and 17 cells, of the 32 that the longest side has."""

    def __init__(self) -> None:
        super().__init__()
        width = self.CHANNELS
        self.reduce = _conv_norm_relu(OUT_CHANNELS, width, 1)
        self.near = _conv_norm_relu(width, width, 3, self.DILATIONS[0])
        self.far = _conv_norm_relu(width, width, 3, self.DILATIONS[1])
        # Without BatchNorm: one value per image and channel is too little to normalise by.
        self.whole = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True))
        self.fuse = _conv_norm_relu(3 * width, width, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.predict = _linear(width)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        reduced = self.reduce(features)
        fused = self.fuse(torch.cat((reduced, self.near(reduced), self.far(reduced)), dim=1))
        whole = self.whole(reduced.mean(dim=(2, 3), keepdim=True))
        out: Tensor = self.predict(self.dropout(fused + whole))
        return out


def _conv_norm_relu(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _linear(in_channels: int) -> nn.Conv2d:
    """A 1x1 classifier that starts close to undecided."""
    classifier = nn.Conv2d(in_channels, NUM_CLASSES, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.constant_(classifier.get_parameter("bias"), 0.0)
    return classifier


def fcn_resnet50_32s() -> FcnResNet50:
    """Stride 32: 23,551,061 parameters, 21.36 G multiply-adds at 512x512."""
    return FcnResNet50(stride=32, classifier=_linear(OUT_CHANNELS))


def atrous_fcn_resnet50_16s() -> FcnResNet50:
    """Stride 16 by dilation: 23,551,061 parameters, 32.47 G multiply-adds at 512x512."""
    return FcnResNet50(stride=16, classifier=_linear(OUT_CHANNELS))


def context_fcn_resnet50_16s() -> FcnResNet50:
    """Stride 16 under `ContextHead`: 25,481,813 parameters, 34.38 G multiply-adds at 512x512."""
    return FcnResNet50(stride=16, classifier=ContextHead())
