"""ResNet-50 backbone with torchvision's layer and key names: any torchvision-layout file loads.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), in the v1.5 layout
(the 3x3 convolution of a bottleneck carries the stride).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.networks.segmentation import Backbone

EXPANSION = 4
CHANNELS = (3, 64, 64 * EXPANSION, 128 * EXPANSION, 256 * EXPANSION, 512 * EXPANSION)
"""Of the image and of each stage's output."""


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand, added to the input (projected where the shape changes)."""

    def __init__(
        self, in_channels: int, width: int, *, stride: int, dilation: int, project: bool
    ) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        out: Tensor = self.relu(x + identity)
        return out


def _stage(in_channels: int, width: int, blocks: int, *, stride: int, dilation: int) -> nn.Module:
    # torchvision's replace_stride_with_dilation: the first block keeps the previous stage's
    # dilation, so that its 3x3 kernel reads the same samples as in its training.
    first = Bottleneck(in_channels, width, stride=stride, dilation=1, project=True)
    rest = [
        Bottleneck(width * EXPANSION, width, stride=1, dilation=dilation, project=False)
        for _ in range(blocks - 1)
    ]
    return nn.Sequential(first, *rest)


class ResNet50(Backbone):
    """ResNet-50 without its classification layer.

    Args:
        dilate_last_stage: replace the stride of ``layer4`` by dilation 2, which gives stride 16
            instead of 32 with the same weights ("a trous", Chen et al. 2015).

    There are five stages: the stem and ``layer1`` to ``layer4``.
    """

    def __init__(self, *, dilate_last_stage: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, 3, stride=1, dilation=1)
        self.layer2 = _stage(256, 128, 4, stride=2, dilation=1)
        self.layer3 = _stage(512, 256, 6, stride=2, dilation=1)
        last = {"stride": 1, "dilation": 2} if dilate_last_stage else {"stride": 2, "dilation": 1}
        self.layer4 = _stage(1024, 512, 3, **last)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """See `Backbone`."""
        stem = (self.conv1, self.bn1, self.relu, self.maxpool)
        return (stem, (self.layer1,), (self.layer2,), (self.layer3,), (self.layer4,))
