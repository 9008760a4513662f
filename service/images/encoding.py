"""Masks as what clients take: palette PNG, overlay, cut-out, COCO run lengths, statistics.

PNG files are written here, chunk by chunk, because what the pixels are is known: one filter for all
rows and a deflate that suits them take a tenth of a general encoder's time. Source: PNG
specification, third edition, https://www.w3.org/TR/png-3/.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
import simplejpeg  # type: ignore[import-untyped]
from isal import isal_zlib
from PIL import Image
from zlib_ng import zlib_ng

from service.artefact import voc

ImageFormat = Literal["PNG", "JPEG", "WEBP"]

MAX_SIDES: Final[dict[ImageFormat, int]] = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}
"""The longest side that each format, or its encoder, can hold, in pixels."""

JPEG_QUALITY: Final = 90
JPEG_SUBSAMPLING: Final = "420"
WEBP_QUALITY: Final = 90
WEBP_EFFORT: Final = 2
"""Of 0 to 6: 3 takes twice as long to save 2 % of the bytes."""

STRIPE_BYTES: Final = 1 << 18
"""Bytes worked on at once, about: what stays in a core's cache is worked on several times faster
than a whole large photo, and takes no memory worth speaking of."""

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_GREY: Final = 0
_PNG_RGB: Final = 2
_PNG_INDEXED: Final = 3
_PNG_RGBA: Final = 6
_PNG_UNFILTERED: Final = 0
_PNG_UP: Final = 2  # the difference from the row above


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
        """Find the runs of a ``(H, W) uint8`` mask without transposing it."""
        height, width = mask.shape
        # Cuts inside columns, where a pixel differs from the one above it, and between columns.
        y, x = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), width)
        tops = np.flatnonzero(mask[0, 1:] != mask[-1, :-1]) + 1
        starts = np.concatenate(([0], x * height + y + 1, tops * height)).astype(np.int64)
        starts.sort()
        ends = np.append(starts[1:], mask.size)
        x, y = np.divmod(starts, height)
        return cls(starts, ends, mask[y, x], (height, width))

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
    palette = (b"PLTE", voc.FULL_PALETTE.tobytes())
    return _png(mask.shape, _PNG_INDEXED, palette, (b"IDAT", _deflate_runs(mask)))


def encode_binary_mask(chosen: npt.NDArray[np.bool_]) -> bytes:
    """``(H, W) bool`` as an 8-bit greyscale PNG: 255 where it is true, else 0."""
    grey = chosen.astype(np.uint8) * np.uint8(255)
    return _png(grey.shape, _PNG_GREY, (b"IDAT", _deflate_runs(grey)))


def _deflate_runs(mask: npt.NDArray[np.uint8]) -> bytes:
    # Masks are runs: looking for nothing else is both the fastest and the smallest, unfiltered.
    deflate = zlib_ng.compressobj(level=1, strategy=zlib_ng.Z_RLE)
    parts = [deflate.compress(rows) for rows in _filter_rows(mask, _PNG_UNFILTERED)]
    return b"".join([*parts, deflate.flush()])


def overlay(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], alpha: float
) -> npt.NDArray[np.uint8]:
    """Blend VOC's colours over a photo; background stays as it is.

    ``image``: ``(H, W, 3) uint8`` RGB; ``mask``: ``(H, W) uint8`` class ids; ``alpha``: weight of
    the colours in [0, 1]. Returns ``(H, W, 3) uint8`` RGB. Runs in stripes, so that the wider
    intermediate numbers never exist for a whole large photo.
    """
    weight = round(alpha * 256)
    # By class id: the photo's weight in 256ths, and the colour's part with the rounding.
    keep = np.full((256, 3), 256 - weight, dtype=np.uint16)
    tint = voc.FULL_PALETTE.astype(np.uint16) * np.uint16(weight) + np.uint16(128)
    keep[0], tint[0] = 256, 0
    blended = image.copy()
    pixels, ids = blended.reshape(-1, 3), mask.reshape(-1)
    step = max(1, STRIPE_BYTES // 6)
    for start in range(0, len(ids), step):
        part, part_ids = pixels[start : start + step], ids[start : start + step]
        if part_ids.any():
            mixed = part.astype(np.uint16)
            mixed *= keep.take(part_ids, axis=0)
            mixed += tint.take(part_ids, axis=0)
            mixed >>= np.uint16(8)
            part[:] = mixed
    return blended


def cutout(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], class_ids: Collection[int]
) -> npt.NDArray[np.uint8]:
    """The photo where it shows one of the classes, and nothing elsewhere.

    ``image``: ``(H, W, 3) uint8`` RGB; ``mask``: ``(H, W) uint8`` class ids. Returns ``(H, W, 4)
    uint8`` RGBA: opaque pixels of the photo, or zeros, so that no colour hides behind the
    transparency.
    """
    height, width = mask.shape
    cut = np.empty((height, width, 4), dtype=np.uint8)
    opaque = np.zeros(256, dtype=np.uint8)
    opaque[list(class_ids)] = 255
    step = max(1, STRIPE_BYTES // (4 * width))
    for top in range(0, height, step):
        rows = slice(top, top + step)
        alpha = opaque[mask[rows]]
        np.bitwise_and(image[rows], alpha[..., None], out=cut[rows, :, :3])
        cut[rows, :, 3] = alpha
    return cut


def encode_grey(levels: npt.NDArray[np.uint8]) -> bytes:
    """``(H, W) uint8`` as an 8-bit greyscale PNG."""
    return _deflated(levels, levels.shape, _PNG_GREY)


def encode_image(image: npt.NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """``(H, W, 3)`` RGB or ``(H, W, 4) uint8`` RGBA, contiguous, as a file.

    A JPEG cannot be transparent. No side may be longer than the format's of `MAX_SIDES`.
    """
    if image_format == "JPEG":
        jpeg: bytes = simplejpeg.encode_jpeg(
            image, quality=JPEG_QUALITY, colorsubsampling=JPEG_SUBSAMPLING
        )
        return jpeg
    if image_format == "WEBP":
        file = io.BytesIO()
        Image.fromarray(image).save(file, "WEBP", quality=WEBP_QUALITY, method=WEBP_EFFORT)
        return file.getvalue()
    height, width, channels = image.shape
    color_type = _PNG_RGBA if channels == 4 else _PNG_RGB
    return _deflated(image.reshape(height, -1), (height, width), color_type)


def _deflated(rows: npt.NDArray[np.uint8], size: tuple[int, ...], color_type: int) -> bytes:
    """Photo-like rows, ``(H, bytes) uint8``, as a PNG."""
    # Photos hardly gain from a search for longer matches, and ISA-L's quick one is the fastest.
    deflate = isal_zlib.compressobj(level=1)
    parts = [deflate.compress(part) for part in _filter_rows(rows, _PNG_UP)]
    return _png(size, color_type, (b"IDAT", b"".join([*parts, deflate.flush()])))


def _filter_rows(rows: npt.NDArray[np.uint8], row_filter: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Rows of ``(H, bytes) uint8`` as PNG deflates them: filtered, each after its filter's number.

    Yields stripes ``(n, 1 + bytes) uint8`` of one buffer: use each before asking for the next.
    """
    height, row_bytes = rows.shape
    step = max(1, STRIPE_BYTES // (1 + row_bytes))
    buffer = np.empty((min(step, height), 1 + row_bytes), dtype=np.uint8)
    buffer[:, 0] = row_filter
    for top in range(0, height, step):
        part = rows[top : top + step]
        stripe = buffer[: len(part)]
        stripe[:, 1:] = part
        if row_filter == _PNG_UP:
            # Above the first row there is nothing: it stays as it is.
            first = 1 if top == 0 else 0
            stripe[first:, 1:] -= rows[top + first - 1 : top + len(part) - 1]
        yield stripe


def _png(size: tuple[int, ...], color_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of 8-bit samples; ``size``: ``(height, width)``; ``chunks``: names and bodies."""
    height, width = size
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    parts = [_PNG_SIGNATURE]
    for name, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        checksum = zlib_ng.crc32(body, zlib_ng.crc32(name))
        parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", checksum)]
    return b"".join(parts)
