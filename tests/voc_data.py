"""A made-up data set in VOCdevkit's layout: bright rectangles whose colour is their class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from service.artefact.labels import VOC_LABELS, LabelSet
from service.artefact.voc import FULL_PALETTE

CLASS_IDS = (8, 12, 15)


def write_mask(path: Path, labels: np.ndarray) -> None:
    """Write (H, W) uint8 labels as VOC does: palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(labels, mode="P")
    mask.putpalette(FULL_PALETTE.tobytes())
    mask.save(path)


def make_voc(
    folder: Path,
    *,
    images: int = 12,
    size: tuple[int, int] = (96, 128),
    splits: Sequence[str] = ("train", "val"),
    labels: LabelSet = VOC_LABELS,
    class_ids: Sequence[int] = CLASS_IDS,
) -> Path:
    """Write a ``VOCdevkit`` of (height, width) images of some classes and return it.

    Every third mask is only in ``SegmentationClassAug``; the others have a void border.
    """
    rng = np.random.default_rng(0)
    root = folder / "VOCdevkit" / "VOC2012"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    height, width = size
    names = []
    for number in range(images):
        mask = np.zeros(size, dtype=np.uint8)
        class_id = class_ids[number % len(class_ids)]
        top, left = int(rng.integers(8, height // 3)), int(rng.integers(8, width // 3))
        inside = np.s_[top : top + height // 2, left : left + width // 2]
        around = np.s_[top - 2 : top + height // 2 + 2, left - 2 : left + width // 2 + 2]
        from_sbd = number % 3 == 2
        if not from_sbd:
            mask[around] = labels.ignore_index
        mask[inside] = class_id
        pixels = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
        pixels[inside] = labels.colors[class_id]
        name = f"2007_{number:06}"
        names.append(name)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        masks = "SegmentationClassAug" if from_sbd else "SegmentationClass"
        write_mask(root / masks / f"{name}.png", mask)
    for split in splits:
        listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        listing.write_text("\n".join(names) + "\n", encoding="utf-8")
    return root.parent
