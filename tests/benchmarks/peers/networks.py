"""Networks in PyTorch with random weights, for measuring speed only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.networks import build_network
from models.networks.resnet import CHANNELS, EXPANSION, Bottleneck
from models.networks.segmentation import Normalize
from service.artefact.voc import NUM_CLASSES
from tests.benchmarks.peers.pipeline import Network


class TorchvisionFcn(nn.Module):
    """torchvision's ``fcn_resnet50``: stride 8 by dilating the last two stages, `FCNHead` on top.

    ``replace_stride_with_dilation=[False, True, True]``, without the auxiliary head that only
    training uses. ``image (N, 3, H, W)`` float in [0, 255] -> ``(N, 21, H/8, W/8)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            _stage(64, 64, 3, stride=1, dilations=(1, 1)),
            _stage(256, 128, 4, stride=2, dilations=(1, 1)),
            _stage(512, 256, 6, stride=1, dilations=(1, 2)),
            _stage(1024, 512, 3, stride=1, dilations=(2, 4)),
        )
        width = CHANNELS[-1] // 4
        self.classifier = nn.Sequential(
            nn.Conv2d(CHANNELS[-1], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Conv2d(width, NUM_CLASSES, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.classifier(self.backbone(self.normalize(image)))
        return out


def _stage(
    in_channels: int, width: int, blocks: int, *, stride: int, dilations: tuple[int, int]
) -> nn.Module:
    first, rest = dilations
    return nn.Sequential(
        Bottleneck(in_channels, width, stride=stride, dilation=first, project=True),
        *(
            Bottleneck(width * EXPANSION, width, stride=1, dilation=rest, project=False)
            for _ in range(blocks - 1)
        ),
    )


def build(engine: str) -> Network:
    """``torchvision-fp32``, or ``context-bf16``: our architecture in bfloat16 autocast."""
    torch.manual_seed(0)
    bf16 = engine == "context-bf16"
    module = build_network("context_fcn_resnet50_8s") if bf16 else TorchvisionFcn()
    module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(batch: npt.NDArray[np.uint8]) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            # NHWC bytes viewed as NCHW already have the channels_last layout.
            logits: Tensor = module(torch.from_numpy(batch).permute(0, 3, 1, 2).float())
            return logits

    return run
