"""Masks as what clients take: palette PNG, overlay, COCO run lengths, statistics."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from service import voc

ImageFormat = Literal["PNG", "JPEG"]

# Masks are long runs that deflate well at any level; photos hardly gain from a higher one.
MASK_COMPRESS_LEVEL: Final = 4
PHOTO_COMPRESS_LEVEL: Final = 1
JPEG_QUALITY: Final = 90
STRIPE_PIXELS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """One class of a mask: its pixels and its bounding box ``(x, y, w, h)`` in pixels."""

    class_id: int
    pixels: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Runs:
    """A mask's runs of equal class ids down its columns, left to right: COCO's order.

    ``starts`` and ``ends``: ``(n,) int64`` pixel positions, end exclusive; ``ids``: ``(n,) uint8``;
    ``size``: ``(height, width)``.
    """

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    ids: npt.NDArray[np.uint8]
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> Self:
        """Find the runs of a ``(H, W) uint8`` mask in one pass over it."""
        height, width = mask.shape
        pixels = mask.T.ravel()
        cuts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        starts = np.concatenate(([0], cuts)).astype(np.int64)
        ends = np.concatenate((cuts, [pixels.size])).astype(np.int64)
        return cls(starts, ends, pixels[starts], (height, width))

    def statistics(self) -> list[ClassStatistics]:
        """The classes present, most pixels first (the lower id first among equals)."""
        lengths = self.ends - self.starts
        found = [
            ClassStatistics(int(index), int(lengths[self.ids == index].sum()), self._bbox(index))
            for index in np.unique(self.ids)
        ]
        return sorted(found, key=lambda one: (-one.pixels, one.class_id))

    def counts(self, class_id: int) -> list[int]:
        """Uncompressed COCO counts of one class: lengths of runs outside, inside, outside, ..."""
        chosen = self.ids == class_id
        bounds = np.stack((self.starts[chosen], self.ends[chosen]), axis=1).ravel()
        total = self.size[0] * self.size[1]
        # COCO ends at the last pixel, but writes no empty run there.
        tail = [] if bounds.size and bounds[-1] == total else [total]
        edges = np.concatenate(([0], bounds, tail)).astype(np.int64)
        counts: list[int] = np.diff(edges).tolist()
        return counts

    def rle(self, class_id: int) -> str:
        """One class as COCO's compressed ``counts``, as ``pycocotools.mask.encode`` writes it."""
        return compress_counts(self.counts(class_id))

    def _bbox(self, class_id: int) -> tuple[int, int, int, int]:
        height = self.size[0]
        chosen = self.ids == class_id
        first, last = self.starts[chosen], self.ends[chosen] - 1
        left, right = int(first[0]) // height, int(last[-1]) // height
        if np.any(first // height != last // height):
            # A run that wraps from one column into the next touches both the bottom and the top.
            top, bottom = 0, height - 1
        else:
            top, bottom = int((first % height).min()), int((last % height).max())
        return left, top, right - left + 1, bottom - top + 1


def compress_counts(counts: list[int]) -> str:
    """COCO's compressed run lengths as ASCII.

    From the fourth count on, a count is written as its difference from the one two before. Every
    number goes out in groups of 5 bits, least significant first, bit 6 set while more follow, each
    group plus 48. Source: ``rleToString`` in cocoapi's ``common/maskApi.c``.
    """
    out = bytearray()
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            # Done once the rest is only the sign, and the group's own top bit says that sign.
            more = value != (-1 if group & 0x10 else 0)
            out.append((group | 0x20 if more else group) + 48)
    return out.decode("ascii")


def limit_classes(mask: npt.NDArray[np.uint8], class_ids: Collection[int]) -> npt.NDArray[np.uint8]:
    """The ``(H, W) uint8`` mask with every class that is not in ``class_ids`` made background."""
    kept = np.zeros(256, dtype=np.uint8)
    for index in class_ids:
        kept[index] = index
    return kept[mask]


def encode_mask(mask: npt.NDArray[np.uint8]) -> bytes:
    """``(H, W) uint8`` class ids as VOC writes them: 8-bit indexed PNG with VOC's 256 colours."""
    image = Image.fromarray(mask)
    image.putpalette(voc.FULL_PALETTE.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=MASK_COMPRESS_LEVEL)
    return file.getvalue()


def overlay(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], alpha: float
) -> npt.NDArray[np.uint8]:
    """Blend VOC's colours over a photo; background stays as it is.

    ``image``: ``(H, W, 3) uint8`` RGB; ``mask``: ``(H, W) uint8`` class ids; ``alpha``: weight of
    the colours in [0, 1]. Returns ``(H, W, 3) uint8`` RGB. Runs in stripes, so that the wider
    intermediate numbers never exist for a whole large photo.
    """
    weight = round(alpha * 256)
    tint = voc.FULL_PALETTE.astype(np.uint16) * np.uint16(weight) + np.uint16(128)
    blended = image.copy()
    pixels, ids = blended.reshape(-1, 3), mask.reshape(-1)
    for start in range(0, len(ids), STRIPE_PIXELS):
        part, part_ids = pixels[start : start + STRIPE_PIXELS], ids[start : start + STRIPE_PIXELS]
        mixed = part.astype(np.uint16)
        mixed *= np.uint16(256 - weight)
        mixed += tint[part_ids]
        mixed >>= np.uint16(8)
        np.copyto(part, mixed.astype(np.uint8), where=(part_ids != 0)[:, None])
    return blended


def encode_image(image: npt.NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """``(H, W, 3) uint8`` RGB as a PNG or JPEG file."""
    file = io.BytesIO()
    if image_format == "PNG":
        Image.fromarray(image).save(file, "PNG", compress_level=PHOTO_COMPRESS_LEVEL)
    else:
        Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
