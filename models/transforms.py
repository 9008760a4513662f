"""Paired transforms of an image and its mask for training, and the fit to a network input.

Masks are resampled by nearest neighbour and padded with void: labels are never blended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.networks.segmentation import Normalize
from service.artefact.preprocessing import Geometry, preprocess
from service.artefact.voc import IGNORE_INDEX

_RED, _GREEN, _BLUE = (round(255 * channel) for channel in Normalize.MEAN)
PADDING_COLOR = (_RED, _GREEN, _BLUE)
"""RGB; normalises to about zero, the padding of the convolutions."""


LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in luminance (ITU-R BT.601)."""


class Example(NamedTuple):
    """One photo, or a batch of crops with a leading dimension N, on the training device."""

    image: Tensor
    """``(3, H, W) uint8`` RGB; ``float32`` in [0, 255] for crops."""
    target: Tensor
    """``(H, W) uint8`` class ids, or 255 for void."""


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop, horizontal flip and photometric jitter, the same for image and mask.

    Args:
        crop_size: side of the square crop, in pixels.
        working_size: pixels of the longest side at scale 1.
        scale_range: smallest and largest scale, drawn log-uniformly.
        jitter: largest relative change of brightness, contrast and saturation; 0 for none.
    """

    crop_size: int
    working_size: int
    scale_range: tuple[float, float]
    jitter: float

    def __call__(self, photo: Example, rng: np.random.Generator) -> Example:
        """Return a random crop of a photo, on the photo's device."""
        vertical, horizontal = self._place(photo.target.shape, rng)
        image = _resize(photo.image, vertical, horizontal, "bilinear").clamp(0, 255)
        if self.jitter:
            factors = rng.uniform(1 - self.jitter, 1 + self.jitter, 3)
            image = adjust_colors(image, *factors.tolist())
        inside = (..., vertical.crop, horizontal.crop)
        size = (self.crop_size, self.crop_size)
        color = torch.tensor(PADDING_COLOR, dtype=torch.float32, device=image.device)
        pixels = color[:, None, None].repeat(1, *size)
        pixels[inside] = image
        target = torch.full(size, IGNORE_INDEX, dtype=torch.uint8, device=image.device)
        target[inside] = _resize(photo.target[None], vertical, horizontal, "nearest-exact")[0]
        if rng.random() < 0.5:
            pixels, target = pixels.flip(-1), target.flip(-1)
        return Example(pixels, target)

    def _place(self, shape: Sequence[int], rng: np.random.Generator) -> tuple[Span, Span]:
        low, high = np.log(self.scale_range)
        scale = float(np.exp(rng.uniform(low, high))) * self.working_size / max(shape)
        spans = []
        for length in shape:
            scaled = max(1, round(length * scale))
            covered = min(scaled, self.crop_size)
            offset = int(rng.integers(0, scaled - covered + 1))
            start = min(round(offset * length / scaled), length - 1)
            stop = max(start + 1, round((offset + covered) * length / scaled))
            at = int(rng.integers(0, self.crop_size - covered + 1))
            spans.append(Span(slice(start, stop), slice(at, at + covered)))
        return spans[0], spans[1]


@dataclass(frozen=True)
class Span:
    """Pixels of a photo along one axis, and the pixels of the crop that they fill."""

    photo: slice
    crop: slice

    @property
    def covered(self) -> int:
        """Pixels of the crop."""
        return int(self.crop.stop - self.crop.start)


def adjust_colors(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Scale an image's brightness, then its contrast around the mean grey, then its saturation.

    Args:
        image: ``(3, H, W)`` float RGB in [0, 255].
        brightness: factor; 1 changes nothing, as with the other two.
        contrast: factor.
        saturation: factor.

    Returns:
        The same shape and range.
    """
    luma = torch.tensor(LUMA, device=image.device)[:, None, None]
    image = (image * brightness).clamp(0, 255)
    grey = (image * luma).sum(dim=0).mean()
    image = (grey + (image - grey) * contrast).clamp(0, 255)
    grey = (image * luma).sum(dim=0, keepdim=True)
    return (grey + (image - grey) * saturation).clamp(0, 255)


def _resize(planes: Tensor, vertical: Span, horizontal: Span, mode: str) -> Tensor:
    # Only the crop is resampled: resizing the whole photo first costs up to ten times as much at
    # large scales.
    part = planes[None, :, vertical.photo, horizontal.photo]
    size = (vertical.covered, horizontal.covered)
    if mode == "bilinear":
        return F.interpolate(part.float(), size=size, mode=mode, antialias=True)[0]
    return F.interpolate(part, size=size, mode=mode)[0]


def fit(
    image: Image.Image, working_size: int, shapes: tuple[tuple[int, int], ...]
) -> tuple[NDArray[np.uint8], Geometry]:
    """Fit a photo to a network's input by the service's own preprocessing.

    Args:
        image: RGB.
        working_size: pixels of the longest side after resizing.
        shapes: the listed inputs, (height, width), ascending by area; larger photos are padded to
            the next multiples of 32.

    Returns:
        ``(h, w, 3) uint8 RGB``, padded at the bottom and right, and the geometry.
    """
    geometry = Geometry.plan((image.height, image.width), working_size, shapes)
    # A copy, because PyTorch wants arrays that may be written to.
    return np.array(preprocess(np.asarray(image), geometry, PADDING_COLOR)), geometry


def upsample(logits: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """Interpolate one image's logits bilinearly to its photo's size.

    Half-pixel centres: row y of the photo reads row ``(y + 0.5) * resized / (photo * stride)
    - 0.5`` of the logits, clamped to their border (``align_corners=False``).

    Args:
        logits: ``(C, h, w)`` float, for the padded network input.

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
