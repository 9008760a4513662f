"""PASCAL VOC's 21 segmentation classes and their colours: the default label set.

Source: the VOC2012 development kit (``VOCdevkit/VOCcode/VOCinit.m`` for the names and their
order, ``VOCcode/VOClabelcolormap.m`` for the colours).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

CLASSES: Final[tuple[str, ...]] = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""Class names; a class id is the index into this tuple."""

NUM_CLASSES: Final[int] = len(CLASSES)

IGNORE_INDEX: Final[int] = 255
"""Label of void pixels: object borders and difficult objects. Loss and metrics ignore them."""


def color_map(size: int = 256) -> npt.NDArray[np.uint8]:
    """VOC's label colours: the id's bits, lowest first, fill R, G, B from the highest bit down.

    Returns ``(size, 3) uint8`` RGB. Row 255 is (224, 224, 192), the cream of VOC's borders.
    Source: ``VOClabelcolormap.m``. Raises ``ValueError`` if ``size`` is not in [1, 256].
    """
    if not 1 <= size <= 256:
        raise ValueError(f"a palette has 1 to 256 colours, not {size}")
    ids = np.arange(size, dtype=np.uint8)
    colors = np.zeros((size, 3), dtype=np.uint8)
    for level in range(8):
        for channel in range(3):
            colors[:, channel] |= ((ids >> channel) & 1) << (7 - level)
        ids >>= 3
    return colors


FULL_PALETTE: Final[npt.NDArray[np.uint8]] = color_map()
"""(256, 3) uint8 RGB, read-only: the palette of an indexed PNG, void included."""
FULL_PALETTE.setflags(write=False)

PALETTE: Final[npt.NDArray[np.uint8]] = FULL_PALETTE[:NUM_CLASSES]
"""(21, 3) uint8 RGB, read-only: the colour of each class id."""
