"""PASCAL VOC's 21 segmentation classes and their colours: the default label set.

Source: the VOC2012 development kit (``VOCdevkit/VOCcode/VOCinit.m`` for the names and their
order, ``VOCcode/VOClabelcolormap.m`` for the colours).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from service.artefact.labels import LabelSet, color_map

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

LABELS: Final = LabelSet(
    names=CLASSES,
    colors=[tuple(color) for color in color_map(NUM_CLASSES).tolist()],
    ignore_index=IGNORE_INDEX,
)
"""VOC's classes as a label set, the default of every contract."""

FULL_PALETTE: Final[npt.NDArray[np.uint8]] = LABELS.palette
"""(256, 3) uint8 RGB, read-only: the palette of an indexed PNG, void included."""

PALETTE: Final[npt.NDArray[np.uint8]] = FULL_PALETTE[:NUM_CLASSES]
"""(21, 3) uint8 RGB, read-only: the colour of each class id."""
