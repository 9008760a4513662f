"""Photos and masks in PASCAL VOC 2012's layout, with the SBD masks beside VOC's own.

The folder is VOCdevkit's ``VOC2012``: ``ImageSets/Segmentation/<split>.txt`` names the images,
``JPEGImages`` contains them, ``SegmentationClass`` VOC's masks and
``SegmentationClassAug`` the masks of SBD (Hariharan et al. 2011) as class ids. Where both exist,
VOC's finer mask is used.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import StageError
from service.artefact.voc import IGNORE_INDEX
from service.errors import ImageError
from service.images.decoding import decode

if TYPE_CHECKING:
    from service.artefact.labels import LabelSet


class DatasetError(StageError):
    """A split, an image or a mask is missing or wrong; the message names the file."""


@dataclass(frozen=True)
class Sample:
    """One image and its mask, as files. The mask has the ids of ``labels``."""

    name: str
    image_path: Path
    mask_path: Path
    labels: LabelSet

    def load(self) -> tuple[Image.Image, Image.Image]:
        """Return ``(RGB image, mask of class ids as mode L)``, checked against each other.

        The image is decoded as the service does it: upright by its EXIF orientation, in sRGB.

        Raises:
            DatasetError: a file cannot be read, the sizes differ, or a label is neither a class
                id nor void.
        """
        try:
            photo = decode(self.image_path.read_bytes(), max_pixels=sys.maxsize)
        except (OSError, ImageError) as exc:
            raise DatasetError(f"{self.image_path}: cannot be read: {exc}") from exc
        image = Image.fromarray(photo.pixels)
        mask = self.load_mask()
        if mask.size != image.size:
            turned = mask.size == image.size[::-1]
            raise DatasetError(
                f"{self.mask_path}: {mask.size[0]}x{mask.size[1]}, but {self.image_path.name} "
                f"is {image.size[0]}x{image.size[1]}"
                + (" upright, by its EXIF orientation; turn the mask too" if turned else "")
            )
        return image, mask

    def load_mask(self) -> Image.Image:
        """Return the mask of class ids as a mode L image.

        Void is 255, whichever value the label set has for it.

        Raises:
            DatasetError: the file cannot be read or has a label that is neither a class id nor
                void.
        """
        try:
            with Image.open(self.mask_path) as file:
                if file.mode not in ("P", "L"):
                    raise DatasetError(f"{self.mask_path}: mode {file.mode}, expected P or L")
                # Not convert("L"), which turns palette indices into grey levels.
                mask = np.asarray(file)
        except OSError as exc:
            raise DatasetError(f"{self.mask_path}: cannot be read: {exc}") from exc
        void = mask == self.labels.ignore_index
        wrong = mask[(mask >= len(self.labels)) & ~void]
        if wrong.size:
            raise DatasetError(
                f"{self.mask_path}: label {int(wrong[0])} is neither a class id "
                f"(0..{len(self.labels) - 1}) nor void ({self.labels.ignore_index})"
            )
        return Image.fromarray(np.where(void, np.uint8(IGNORE_INDEX), mask))


def voc_root(data: Path) -> Path:
    """Return the ``VOC2012`` folder for ``data``, which is that folder or its ``VOCdevkit``.

    Raises:
        DatasetError: neither contains ``ImageSets/Segmentation``.
    """
    for root in (data, data / "VOC2012"):
        if (root / "ImageSets" / "Segmentation").is_dir():
            return root
    raise DatasetError(f"{data}: contains no VOC2012/ImageSets/Segmentation")


def read_split(data: Path, split: str, labels: LabelSet | None = None) -> list[Sample]:
    """Return the samples listed in ``ImageSets/Segmentation/<split>.txt``, in its order.

    Their masks have the ids of ``labels``, by default VOC's.

    Raises:
        DatasetError: the list, an image or a mask is missing; the message names the file.
    """
    if labels is None:
        # Imported here, so that `fetch` starts without pydantic.
        from service.artefact.labels import VOC_LABELS  # noqa: PLC0415

        labels = VOC_LABELS
    root = voc_root(data)
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = read_names(listing)
    samples = []
    for name in names:
        image_path = root / "JPEGImages" / f"{name}.jpg"
        candidates = [
            root / folder / f"{name}.png"
            for folder in ("SegmentationClass", "SegmentationClassAug")
        ]
        mask_path = next((path for path in candidates if path.is_file()), None)
        if not image_path.is_file():
            raise DatasetError(f"{image_path}: missing, but {listing.name} lists it")
        if mask_path is None:
            raise DatasetError(f"{candidates[0]}: missing, and so is {candidates[1]}")
        samples.append(Sample(name, image_path, mask_path, labels))
    return samples


def read_names(listing: Path) -> list[str]:
    """Return the names in a list, one a line, as any editor saves it.

    UTF-8 or, with a byte order mark, UTF-16. Names that are not UTF-8 stay as they are. Spaces
    within names belong to them.

    Raises:
        DatasetError: the list cannot be read or is empty.
    """
    try:
        content = listing.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = content.decode("utf-16")
        else:
            text = content.decode("utf-8-sig", "surrogateescape")
    except (OSError, UnicodeDecodeError) as exc:
        raise DatasetError(f"{listing}: cannot be read: {exc}") from exc
    if "\0" in text:
        raise DatasetError(f"{listing}: has zero bytes; save it as UTF-8")
    names = [line.strip() for line in re.split(r"[\r\n]+", text)]
    names = [name for name in names if name]
    if not names:
        raise DatasetError(f"{listing}: lists no image")
    return names


def require_classes(known: NDArray[np.bool_], labels: LabelSet, what: str) -> None:
    """Check that masks have something to tell apart.

    Args:
        known: ``(C,)``, whether any mask has a pixel of the class.
        labels: the C classes.
        what: the masks, in words.

    Raises:
        DatasetError: they have fewer than two classes.
    """
    if known.sum() < 2:
        found = labels.names[int(known.argmax())] if known.any() else "no class"
        raise DatasetError(
            f"{what} show {found} and void only, but two classes are needed. "
            f"{labels.ignore_index} is void, not a class: where masks have 0 and "
            f"{labels.ignore_index}, replace {labels.ignore_index} by a class id, "
            f"1 to {len(labels) - 1}"
        )


def hold_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out ``count`` samples for choosing between models, so that ``val`` is for reports only.

    Only samples with VOC's own mask qualify, because SBD's masks have no void and coarser edges.
    The ones whose names hash lowest are held out: the same on every machine, in any list order.

    Returns:
        ``(training samples, held-out samples)``, each in the order given.

    Raises:
        DatasetError: fewer than ``count`` samples have VOC's own mask, or no sample would remain.
    """
    candidates = [s for s in samples if s.mask_path.parent.name == "SegmentationClass"]
    if len(candidates) < count or len(samples) <= count:
        raise DatasetError(
            f"cannot hold out {count} of {len(samples)} images, "
            f"{len(candidates)} of them with a mask in SegmentationClass"
        )
    candidates.sort(key=lambda s: hashlib.sha256(s.name.encode()).digest())
    held_names = {s.name for s in candidates[:count]}
    training = [s for s in samples if s.name not in held_names]
    return training, [s for s in samples if s.name in held_names]
