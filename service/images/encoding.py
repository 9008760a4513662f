"""Masks as image files: palette PNG, overlay, cut-out, greyscale.

PNG files are written here, chunk by chunk, because the kind of pixels is known: one filter for all
rows and a deflate that suits them take a tenth of a general encoder's time. Source: PNG
specification, third edition, https://www.w3.org/TR/png-3/.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Collection, Iterator
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg  # type: ignore[import-untyped]
from isal import isal_zlib
from PIL import Image
from zlib_ng import zlib_ng

from service.images.stripes import stripes

ImageFormat = Literal["PNG", "JPEG", "WEBP"]

MAX_SIDES: Final[dict[ImageFormat, int]] = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}
"""The longest side that each format, or its encoder, can hold, in pixels."""

JPEG_QUALITY: Final = 90
JPEG_SUBSAMPLING: Final = "420"
WEBP_QUALITY: Final = 90
WEBP_EFFORT: Final = 2
"""From 0 to 6; 3 takes twice as long and saves 2 % of the bytes."""

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_GREY: Final = 0
_PNG_RGB: Final = 2
_PNG_INDEXED: Final = 3
_PNG_RGBA: Final = 6
_PNG_UNFILTERED: Final = 0
_PNG_UP: Final = 2  # the difference from the row above


def limit_classes(mask: npt.NDArray[np.uint8], class_ids: Collection[int]) -> npt.NDArray[np.uint8]:
    """Set every class of a ``(H, W) uint8`` mask that is not in ``class_ids`` to background, 0."""
    kept = np.zeros(256, dtype=np.uint8)
    for index in class_ids:
        kept[index] = index
    return kept[mask]


def encode_mask(mask: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> bytes:
    """``(H, W) uint8`` class ids as an 8-bit indexed PNG: each pixel's value is its class id.

    ``palette``: ``(256, 3) uint8`` RGB, indexed by class id.
    """
    colors = (b"PLTE", palette.tobytes())
    return _png(mask.shape, _PNG_INDEXED, colors, (b"IDAT", _deflate_runs(mask)))


def encode_binary_mask(chosen: npt.NDArray[np.bool_]) -> bytes:
    """``(H, W) bool`` as an 8-bit greyscale PNG: 255 for true, 0 for false."""
    grey = chosen.astype(np.uint8) * np.uint8(255)
    return _png(grey.shape, _PNG_GREY, (b"IDAT", _deflate_runs(grey)))


def _deflate_runs(mask: npt.NDArray[np.uint8]) -> bytes:
    # Masks are runs: run-length matching alone, without a filter, is the fastest and smallest.
    deflate = zlib_ng.compressobj(level=1, strategy=zlib_ng.Z_RLE)
    parts = [deflate.compress(rows) for rows in _filter_rows(mask, _PNG_UNFILTERED)]
    return b"".join([*parts, deflate.flush()])


def overlay(
    image: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.uint8],
    palette: npt.NDArray[np.uint8],
    alpha: float,
) -> npt.NDArray[np.uint8]:
    """Blend the classes' colours over a photo; class 0, background, stays as it is.

    ``image``: ``(H, W, 3) uint8`` RGB; ``mask``: ``(H, W) uint8`` class ids; ``palette``:
    ``(256, 3) uint8`` RGB, indexed by class id; ``alpha``: weight of the colours in [0, 1].
    Returns ``(H, W, 3) uint8`` RGB. Runs in stripes, so that the wider intermediate numbers never
    exist for a whole large photo.
    """
    weight = round(alpha * 256)
    # By class id: the photo's weight in 256ths, and the colour's share with the rounding.
    keep = np.full((256, 3), 256 - weight, dtype=np.uint16)
    tint = palette.astype(np.uint16) * np.uint16(weight) + np.uint16(128)
    keep[0], tint[0] = 256, 0
    blended = image.copy()
    pixels, ids = blended.reshape(-1, 3), mask.reshape(-1)
    for stripe in stripes(len(ids), 6):
        part, part_ids = pixels[stripe], ids[stripe]
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
    """Cut the pixels of some classes out of a photo.

    ``image``: ``(H, W, 3) uint8`` RGB; ``mask``: ``(H, W) uint8`` class ids. Returns ``(H, W, 4)
    uint8`` RGBA: the classes' pixels, opaque, and zeros elsewhere: transparent pixels keep no
    colour.
    """
    height, width = mask.shape
    cut = np.empty((height, width, 4), dtype=np.uint8)
    opaque = np.zeros(256, dtype=np.uint8)
    opaque[list(class_ids)] = 255
    for rows in stripes(height, 4 * width):
        alpha = opaque[mask[rows]]
        np.bitwise_and(image[rows], alpha[..., None], out=cut[rows, :, :3])
        cut[rows, :, 3] = alpha
    return cut


def encode_grey(levels: npt.NDArray[np.uint8]) -> bytes:
    """``(H, W) uint8`` as an 8-bit greyscale PNG."""
    return _deflated(levels, levels.shape, _PNG_GREY)


def encode_image(image: npt.NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """``(H, W, 3)`` RGB or ``(H, W, 4) uint8`` RGBA, contiguous, as a file.

    A JPEG cannot be transparent. No side may exceed the format's limit in `MAX_SIDES`.
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
    # Photos gain little from a search for longer matches, and ISA-L's quick search is the fastest.
    deflate = isal_zlib.compressobj(level=1)
    parts = [deflate.compress(part) for part in _filter_rows(rows, _PNG_UP)]
    return _png(size, color_type, (b"IDAT", b"".join([*parts, deflate.flush()])))


def _filter_rows(rows: npt.NDArray[np.uint8], row_filter: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Filter rows of ``(H, bytes) uint8`` for PNG; each starts with its filter's number.

    Yields stripes ``(n, 1 + bytes) uint8``.
    """
    height, row_bytes = rows.shape
    for stripe in stripes(height, 1 + row_bytes):
        part = rows[stripe]
        filtered = np.empty((len(part), 1 + row_bytes), dtype=np.uint8)
        filtered[:, 0] = row_filter
        filtered[:, 1:] = part
        if row_filter == _PNG_UP:
            # The row above the first one counts as zeros, so the first one stays as it is.
            first = max(stripe.start, 1)
            filtered[first - stripe.start :, 1:] -= rows[first - 1 : stripe.stop - 1]
        yield filtered


def _png(size: tuple[int, ...], color_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of 8-bit samples; ``size``: ``(height, width)``; ``chunks``: names and bodies."""
    height, width = size
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    parts = [_PNG_SIGNATURE]
    for name, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        checksum = zlib_ng.crc32(body, zlib_ng.crc32(name))
        parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", checksum)]
    return b"".join(parts)
