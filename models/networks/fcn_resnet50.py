"""Fully convolutional ResNet-50 with a 1x1 classifier and one bilinear upsampling.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation" (2015); the
stride-16 form is Keras-FCN's ``AtrousFCN_Resnet50_16s``.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.resnet import OUT_CHANNELS, Normalize, ResNet50
from service.voc import CLASSES


class FcnResNet50(nn.Module):
    """``image (N, 3, H, W)`` float RGB in [0, 255] -> ``logits (N, 21, H/stride, W/stride)``.

    H and W are multiples of 32. The logits are upsampled bilinearly by whoever needs pixels: the
    loss while training, the service when serving; labels are never resized.
    """

    def __init__(self, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.normalize = Normalize()
        self.backbone = ResNet50(dilate_last_stage=stride == 16)
        self.classifier = nn.Conv2d(OUT_CHANNELS, len(CLASSES), 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.classifier(self.backbone(self.normalize(image)))
        return out


def fcn_resnet50_32s() -> FcnResNet50:
    """Stride 32: 23,551,061 parameters, 21.36 G multiply-adds at 512x512."""
    return FcnResNet50(stride=32)


def atrous_fcn_resnet50_16s() -> FcnResNet50:
    """Stride 16 by dilation: 23,551,061 parameters, 32.47 G multiply-adds at 512x512."""
    return FcnResNet50(stride=16)
