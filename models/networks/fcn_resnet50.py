"""Fully convolutional ResNet-50: a backbone and a classifier; the caller upsamples bilinearly.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation" (2015); the
stride-16 form with a 1x1 classifier is Keras-FCN's ``AtrousFCN_Resnet50_16s``.

Parameters and multiply-adds are those for 21 classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.resnet import CHANNELS, ResNet50
from models.networks.segmentation import Features, LinearHead, SegmentationNetwork, classify


class SkipHead(nn.Module):
    """Predictions of several stages, summed: FCN's skips (section 4.2).

    A 1x1 convolution classifies each stage. The predictions are upsampled bilinearly to the size of
    the shallowest and summed. Concatenating features reduced to 128 channels, which the paper does
    not do, gave a lower mean IoU in as many iterations: see the default model's card.

    Args:
        shallowest: the first stage that predicts, 3 (stride 8) or 4 (stride 16).
        classes: their number.
    """

    def __init__(self, shallowest: int, classes: int) -> None:
        super().__init__()
        self.shallowest = shallowest
        self.dropout = nn.Dropout2d(0.1)
        self.predict = nn.ModuleList(
            classify(channels, classes) for channels in CHANNELS[shallowest:]
        )

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        stages = zip(self.predict, features[self.shallowest :], strict=True)
        out, *coarser = (predict(self.dropout(stage)) for predict, stage in stages)
        for i, prediction in enumerate(coarser, 1):
            out = out + _upsample(prediction, 2**i)
        total: Tensor = out
        return total


class ContextHead(nn.Module):
    """Context of each cell, near, far and from the whole image, before its classification.

    A light form of DeepLabv3's ASPP (Chen et al. 2017): the branches read 256 reduced channels
    instead of 2048. With ``edges``, the features of ``layer2`` are joined at stride 8 before the
    classifier, as in DeepLabv3+ (Chen et al. 2018), so that outlines follow the photo.

    ``(..., (N, 512, 2h, 2w), ..., (N, 2048, h, w))`` -> ``(N, C, h, w)``, with ``edges``
    ``(N, C, 2h, 2w)``.
    """

    CHANNELS = 256
    DILATIONS = (4, 8)
    """In cells of 16 pixels: windows of 9 and 17 cells; the longest side has 32."""
    EDGE_STAGE = 3
    EDGE_CHANNELS = 48
    JOINED_CHANNELS = 128

    def __init__(self, classes: int, *, edges: bool) -> None:
        super().__init__()
        width = self.CHANNELS
        self.reduce = _conv_norm_relu(CHANNELS[-1], width, 1)
        self.near = _conv_norm_relu(width, width, 3, self.DILATIONS[0])
        self.far = _conv_norm_relu(width, width, 3, self.DILATIONS[1])
        # No BatchNorm: one value per image and channel is too few for statistics.
        self.whole = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True))
        self.fuse = _conv_norm_relu(3 * width, width, 1)
        if edges:
            self.edge = _conv_norm_relu(CHANNELS[self.EDGE_STAGE], self.EDGE_CHANNELS, 1)
            self.join = _conv_norm_relu(width + self.EDGE_CHANNELS, self.JOINED_CHANNELS, 3)
        self.edges = edges
        self.dropout = nn.Dropout2d(0.1)
        self.predict = classify(self.JOINED_CHANNELS if edges else width, classes)

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        reduced = self.reduce(features[-1])
        fused = self.fuse(torch.cat((reduced, self.near(reduced), self.far(reduced)), dim=1))
        context = fused + self.whole(reduced.mean(dim=(2, 3), keepdim=True))
        if self.edges:
            edge = self.edge(features[self.EDGE_STAGE])
            context = self.join(torch.cat((_upsample(context, 2), edge), dim=1))
        out: Tensor = self.predict(self.dropout(context))
        return out


def _upsample(x: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _conv_norm_relu(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _fcn(stride: int, head: nn.Module, *, dilate: bool) -> SegmentationNetwork:
    return SegmentationNetwork(
        stride=stride, backbone=ResNet50(dilate_last_stage=dilate), classifier=head
    )


def fcn_resnet50_32s(classes: int) -> SegmentationNetwork:
    """Stride 32: 23,551,061 parameters, 21.36 G multiply-adds at 512x512."""
    return _fcn(32, LinearHead(CHANNELS[-1], classes), dilate=False)


def fcn_resnet50_16s(classes: int) -> SegmentationNetwork:
    """Stride 16 by one skip: 23,572,586 parameters, 21.39 G multiply-adds at 512x512."""
    return _fcn(16, SkipHead(4, classes), dilate=False)


def fcn_resnet50_8s(classes: int) -> SegmentationNetwork:
    """Stride 8 by two skips: 23,583,359 parameters, 21.43 G multiply-adds at 512x512."""
    return _fcn(8, SkipHead(3, classes), dilate=False)


def atrous_fcn_resnet50_16s(classes: int) -> SegmentationNetwork:
    """Stride 16 by dilation: 23,551,061 parameters, 32.47 G multiply-adds at 512x512."""
    return _fcn(16, LinearHead(CHANNELS[-1], classes), dilate=True)


def context_fcn_resnet50_16s(classes: int) -> SegmentationNetwork:
    """Stride 16 under `ContextHead`: 25,481,813 parameters, 34.38 G multiply-adds at 512x512."""
    return _fcn(16, ContextHead(classes, edges=False), dilate=True)


def context_fcn_resnet50_8s(classes: int) -> SegmentationNetwork:
    """Stride 8, with edges too: 25,854,261 parameters, 35.92 G multiply-adds at 512x512."""
    return _fcn(8, ContextHead(classes, edges=True), dilate=True)
