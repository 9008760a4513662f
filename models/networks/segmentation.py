"""The parts of every network: normalisation, a backbone in stages, and a classifying head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Features = tuple[Tensor, ...]
"""The normalised image and the outputs of leading stages."""


class Normalize(nn.Module):
    """RGB in [0, 255] to the zero mean and unit variance of ImageNet.

    The statistics are buffers, so that normalisation travels with the exported graph.
    """

    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        scale = 255.0
        self.register_buffer("mean", torch.tensor(self.MEAN).view(1, 3, 1, 1) * scale)
        self.register_buffer("std", torch.tensor(self.STD).view(1, 3, 1, 1) * scale)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        return (image - self.mean) / self.std


class Backbone(nn.Module):
    """Stages in sequence. The next stage and the head read each stage's output."""

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """Return each stage's modules in the order of application."""
        raise NotImplementedError

    def forward(self, features: Features, stop: int | None = None) -> Features:
        """Append the outputs of the next stages to the features, up to ``stop`` stages in all.

        Args:
            features: the normalised image, ``(N, 3, H, W)`` float, and the outputs of the leading
                stages already computed.
            stop: the largest number of stages in the result; None for all.

        Returns:
            The image and the stages' outputs: ``features[i]`` is stage i's.
        """
        for modules in self.stages()[len(features) - 1 : stop]:
            x = features[-1]
            for module in modules:
                x = module(x)
            features = (*features, x)
        return features


class SegmentationNetwork(nn.Module):
    """``image (N, 3, H, W)`` float RGB in [0, 255] -> ``logits (N, C, H/stride, W/stride)``.

    C is the number of classes. H and W are multiples of 32. The loss and the service upsample the
    logits bilinearly; labels are never resized.

    Args:
        stride: of the logits.
        backbone: ``Features -> Features``, see `Backbone.forward`.
        classifier: the head, ``Features -> logits``.
    """

    def __init__(self, *, stride: int, backbone: Backbone, classifier: nn.Module) -> None:
        super().__init__()
        self.stride = stride
        self.normalize = Normalize()
        self.backbone = backbone
        self.classifier = classifier

    def leading(self, image: Tensor, stages: int) -> Features:
        """Return the normalised image and the outputs of the first ``stages`` stages."""
        out: Features = self.backbone((self.normalize(image),), stages)
        return out

    def forward(self, image: Tensor, features: Features | None = None) -> Tensor:
        """See the class. ``features``: the result of `leading`, where already computed."""
        start = (self.normalize(image),) if features is None else features
        out: Tensor = self.classifier(self.backbone(start))
        return out


class LinearHead(nn.Module):
    """A 1x1 classifier of the last stage: ``(..., (N, D, h, w))`` -> ``(N, C, h, w)``."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.predict = classify(in_channels, classes)

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        out: Tensor = self.predict(features[-1])
        return out


def classify(in_channels: int, classes: int) -> nn.Conv2d:
    """Return a 1x1 convolution to the classes whose initial logits are close to zero."""
    convolution = nn.Conv2d(in_channels, classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.get_parameter("bias"))
    return convolution
