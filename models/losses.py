"""Training losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from service.voc import IGNORE_INDEX


def upsampled_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the bilinearly upsampled logits over the pixels that are not void.

    Args:
        logits: ``(N, C, h, w)`` float of any precision; the loss is computed in float32.
        target: ``(N, H, W)`` uint8 class ids, or 255 for void.

    Returns:
        A scalar; 0 where every pixel is void.
    """
    full = F.interpolate(
        logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False
    )
    labels = target.long()
    total = F.cross_entropy(full, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)
