"""The training loss, computed on a regular grid of the photo's pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from service.artefact.voc import IGNORE_INDEX

STEP = 4
"""Distance of the grid's pixels along either axis. Neighbouring pixels carry nearly the same
signal; on a CPU, all pixels would cost a third of the whole step."""


def interpolate(logits: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate logits bilinearly at some of the pixels.

    The values equal the full upsampling's with half-pixel centres (``align_corners=False``).

    Args:
        logits: ``(N, C, h, w)`` float.
        rows: ``(R,)`` float, the pixels' y in [0, size[0]), whole or fractional.
        columns: ``(S,)`` float, their x in [0, size[1]).
        size: (H, W), the full size in pixels.

    Returns:
        ``(N, C, R, S)`` float32.
    """
    height, width = logits.shape[2:]
    vertical = _weights(rows, height, size[0])
    horizontal = _weights(columns, width, size[1])
    return vertical @ logits.float() @ horizontal.T


def _weights(positions: Tensor, cells: int, length: int) -> Tensor:
    """Each cell's weight at each position, ``(len(positions), cells)``; rows add up to 1."""
    centres = ((positions + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    distance = centres[:, None] - torch.arange(cells, device=positions.device)
    return (1 - distance.abs()).clamp(min=0)


def cross_entropy(logits: Tensor, target: Tensor, phase: int) -> Tensor:
    """Return the mean cross-entropy of the upsampled logits on every fourth pixel and row.

    Args:
        logits: ``(N, C, h, w)`` float of any precision; the loss is computed in float32.
        target: ``(N, H, W)`` uint8 class ids, or 255 for void, which is ignored.
        phase: selects one of the 16 grids; 16 consecutive phases cover each pixel once.

    Returns:
        A scalar; 0 where every pixel is void.
    """
    y, x = divmod(phase % STEP**2, STEP)
    labels = target[:, y::STEP, x::STEP].long()
    height, width = target.shape[1:]
    rows = torch.arange(y, height, STEP, device=logits.device, dtype=torch.float32)
    columns = torch.arange(x, width, STEP, device=logits.device, dtype=torch.float32)
    sampled = interpolate(logits, rows, columns, (height, width))
    total = F.cross_entropy(sampled, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)
