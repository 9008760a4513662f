"""Paired transforms of an image and its mask, for training, and the fit to a network input.

Masks are resampled by nearest neighbour only, and padded with void: labels are never blended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from models.networks.resnet import Normalize
from service.voc import IGNORE_INDEX

PADDING_COLOR = tuple(round(255 * channel) for channel in Normalize.MEAN)
"""RGB; normalises to about zero, which is what the convolutions pad with too."""


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop, horizontal flip and photometric jitter, the same for image and mask.

    Args:
        crop_size: side of the square crop, in pixels.
        working_size: what the longest side is brought to at scale 1, in pixels.
        scale_range: smallest and largest scale, drawn log-uniformly.
        jitter: largest relative change of brightness, contrast and saturation; 0 for none.
    """

    crop_size: int
    working_size: int
    scale_range: tuple[float, float]
    jitter: float

    def __call__(
        self, image: Image.Image, mask: Image.Image, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return ``(crop, crop, 3) uint8 RGB`` and ``(crop, crop) uint8`` class ids or 255."""
        low, high = np.log(self.scale_range)
        scale = float(np.exp(rng.uniform(low, high))) * self.working_size / max(image.size)
        # What is resampled is the crop alone: a crop of the resized photo costs up to ten times
        # as much at large scales.
        spans = []
        for length in image.size:
            scaled = max(1, round(length * scale))
            covered = min(scaled, self.crop_size)
            offset = int(rng.integers(0, scaled - covered + 1))
            spans.append((covered, offset * length / scaled, (offset + covered) * length / scaled))
        (width, left, right), (height, top, bottom) = spans
        box = (left, top, right, bottom)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        mask = mask.resize((width, height), Image.Resampling.NEAREST, box=box)
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))

        pixels = np.empty((self.crop_size, self.crop_size, 3), dtype=np.uint8)
        pixels[:] = PADDING_COLOR
        labels = np.full((self.crop_size, self.crop_size), IGNORE_INDEX, dtype=np.uint8)
        y = int(rng.integers(0, self.crop_size - height + 1))
        x = int(rng.integers(0, self.crop_size - width + 1))
        pixels[y : y + height, x : x + width] = np.asarray(image)
        labels[y : y + height, x : x + width] = np.asarray(mask)
        if rng.random() < 0.5:
            pixels, labels = pixels[:, ::-1].copy(), labels[:, ::-1].copy()
        return pixels, labels


@dataclass(frozen=True)
class Geometry:
    """How a photo was brought to a network input; what undoes it.

    ``photo`` and ``resized`` are (height, width) in pixels.
    """

    photo: tuple[int, int]
    resized: tuple[int, int]


def fit(
    image: Image.Image, working_size: int, shapes: tuple[tuple[int, int], ...]
) -> tuple[NDArray[np.uint8], Geometry]:
    """Bring the longest side to ``working_size`` and pad to a listed shape, as the service does.

    The smallest of ``shapes`` (height, width) that holds the resized image is taken, or else the
    next multiples of 32.

    Returns:
        ``(h, w, 3) uint8 RGB``, padded at the bottom and right, and the geometry.
    """
    width, height = image.size
    scale = working_size / max(width, height)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    fitting = [s for s in shapes if s[0] >= size[0] and s[1] >= size[1]]
    shape = min(
        fitting,
        key=lambda s: s[0] * s[1],
        default=(-(-size[0] // 32) * 32, -(-size[1] // 32) * 32),
    )
    padded = np.empty((*shape, 3), dtype=np.uint8)
    padded[:] = PADDING_COLOR
    padded[: size[0], : size[1]] = resized
    return padded, Geometry(photo=(height, width), resized=size)


def upsample(logits: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """Bilinear interpolation of one image's logits straight to its photo's size.

    Half-pixel centres: row y of the photo reads row ``(y + 0.5) * resized / (photo * stride)
    - 0.5`` of the logits, clamped to their border (``align_corners=False``).

    Args:
        logits: ``(C, h, w)`` float, of the padded network input.

    Returns:
        ``(C, H, W)`` float32.
    """
    axes = []
    for photo, resized, cells in zip(
        geometry.photo, geometry.resized, logits.shape[1:], strict=True
    ):
        centres = torch.arange(photo, device=logits.device, dtype=torch.float32) + 0.5
        # grid_sample's own half-pixel convention puts the borders of the map at -1 and 1.
        axes.append(centres * (resized / photo / stride / cells) * 2 - 1)
    rows, columns = torch.meshgrid(axes[0], axes[1], indexing="ij")
    grid = torch.stack((columns, rows), dim=-1)[None]
    out = F.grid_sample(
        logits[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return out[0]
