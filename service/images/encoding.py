"""Masks as image files: palette PNG, overlay, cut-out, greyscale.

PNG files are written here, chunk by chunk, because the kind of pixels is known: one filter for all
rows and a deflate that suits them take a tenth of a general encoder's time. Source: PNG
specification, third edition, https://www.w3.org/TR/png-3/.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol

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
"""From 0 to 6; 3 takes twice as long and saves 2 % of the bytes. 0 and 1 fail at 50 megapixels:
libwebp's first partition, of half a megabyte, overflows."""

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_GREY: Final = 0
_PNG_RGB: Final = 2
_PNG_INDEXED: Final = 3
_PNG_RGBA: Final = 6
_PNG_UNFILTERED: Final = 0
_PNG_UP: Final = 2  # the difference from the row above


class Rows(Protocol):
    """An image whose rows are read part by part: a NumPy array, or one that is computed.

    ``shape``: ``(H, W)`` or ``(H, W, channels)``.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The size and the number of channels."""

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.uint8]:
        """Some of the rows, ``uint8``, contiguous."""


def look_up(mask: npt.NDArray[np.uint8], levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Replace each class id of a ``(H, W) uint8`` mask by its level.

    ``levels``: ``(256,) uint8``, indexed by class id. Returns ``(H, W) uint8``, not to be written
    to. NumPy's own look-up would take eight bytes per pixel for the indices.
    """
    found = mask.tobytes().translate(levels.tobytes())
    return np.frombuffer(found, dtype=np.uint8).reshape(mask.shape)


def limit_classes(mask: npt.NDArray[np.uint8], class_ids: Collection[int]) -> npt.NDArray[np.uint8]:
    """Set every class of a ``(H, W) uint8`` mask that is not in ``class_ids`` to background, 0.

    Returns ``(H, W) uint8``, not to be written to.
    """
    kept = np.zeros(256, dtype=np.uint8)
    for index in class_ids:
        kept[index] = index
    return look_up(mask, kept)


@dataclass(frozen=True, slots=True)
class Overlay:
    """A photo with the classes' colours blended over it; class 0, background, stays as it is.

    ``image``: ``(H, W, 3) uint8`` RGB; ``mask``: ``(H, W) uint8`` class ids; ``palette``:
    ``(256, 3) uint8`` RGB, indexed by class id; ``alpha``: weight of the colours in [0, 1]. Its
    rows are ``(n, W, 3) uint8`` RGB, blended when they are read.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    palette: npt.NDArray[np.uint8]
    alpha: float

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, 3)``."""
        return self.image.shape

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.uint8]:
        """See `Rows`."""
        weight = round(self.alpha * 256)
        # By class id: the colour's share with the rounding; one element of six bytes, because
        # NumPy moves these faster than triples.
        tint = (self.palette.astype(np.uint16) * np.uint16(weight) + np.uint16(128)).view("V6")
        blended = self.image[rows].copy()
        pixels, ids = blended.reshape(-1, 3), self.mask[rows].reshape(-1)
        for stripe in stripes(len(ids), 6):
            part, part_ids = pixels[stripe], ids[stripe]
            if part_ids.any():
                mixed = part * np.uint16(256 - weight)
                mixed += tint.take(part_ids).view(np.uint16).reshape(-1, 3)
                mixed >>= np.uint16(8)
                colored = mixed.astype(np.uint8).view("V3")
                np.copyto(part.view("V3"), colored, where=(part_ids != 0)[:, None])
        return blended


@dataclass(frozen=True, slots=True)
class Cutout:
    """The pixels of some classes of a photo.

    ``image``: ``(H, W, 3) uint8`` RGB; ``mask``: ``(H, W) uint8`` class ids. Its rows are ``(n, W,
    4) uint8`` RGBA, computed when they are read: the pixels of ``class_ids``, opaque, and zeros
    elsewhere. Transparent pixels keep no colour.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    class_ids: Collection[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, 4)``."""
        return *self.mask.shape, 4

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.uint8]:
        """See `Rows`."""
        image, mask = self.image[rows], self.mask[rows]
        kept = np.zeros(256, dtype=np.uint32)
        kept[list(self.class_ids)] = 0xFFFFFFFF
        cut = np.empty((*mask.shape, 4), dtype=np.uint8)
        for stripe in stripes(len(mask), 8 * mask.shape[1]):
            part = cut[stripe]
            # Channel by channel: NumPy is slow where the last of two axes has only three values.
            for channel in range(3):
                part[..., channel] = image[stripe, :, channel]
            part[..., 3] = 255
            part.view(np.uint32)[..., 0] &= kept.take(mask[stripe])
        return cut


def encode_mask(mask: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> bytes:
    """``(H, W) uint8`` class ids as an 8-bit indexed PNG: each pixel's value is its class id.

    ``palette``: ``(256, 3) uint8`` RGB, indexed by class id.
    """
    return _png(mask.shape, _PNG_INDEXED, _deflate_runs(mask), palette.tobytes())


def encode_binary_mask(chosen: npt.NDArray[np.bool_]) -> bytes:
    """``(H, W) bool`` as an 8-bit greyscale PNG: 255 for true, 0 for false."""
    grey = chosen.astype(np.uint8) * np.uint8(255)
    return _png(grey.shape, _PNG_GREY, _deflate_runs(grey))


def encode_grey(levels: npt.NDArray[np.uint8]) -> bytes:
    """``(H, W) uint8`` as an 8-bit greyscale PNG."""
    return _png(levels.shape, _PNG_GREY, _deflate_photo(levels))


def encode_image(image: Rows, image_format: ImageFormat) -> bytes:
    """``(H, W, 3)`` RGB or ``(H, W, 4) uint8`` RGBA as a file.

    A JPEG cannot be transparent. No side may exceed the format's limit in `MAX_SIDES`. Except for
    a JPEG, rows are read in stripes, so that a computed image never exists as a whole.
    """
    if image_format == "JPEG":
        jpeg: bytes = simplejpeg.encode_jpeg(
            image[:], quality=JPEG_QUALITY, colorsubsampling=JPEG_SUBSAMPLING
        )
        return jpeg
    if image_format == "WEBP":
        return _webp(image)
    color_type = _PNG_RGBA if image.shape[2] == 4 else _PNG_RGB
    return _png(image.shape, color_type, _deflate_photo(image))


def _webp(image: Rows) -> bytes:
    height, width, channels = image.shape
    picture = Image.new("RGBA" if channels == 4 else "RGB", (width, height))
    for rows in stripes(height, width * channels):
        picture.paste(Image.fromarray(image[rows]), (0, rows.start))
    file = io.BytesIO()
    try:
        picture.save(file, "WEBP", quality=WEBP_QUALITY, method=WEBP_EFFORT)
    except ValueError as exc:
        # By Pillow's text: libwebp's codes 1 and 2 mean that memory ran out.
        if str(exc) in ("encoding error 1", "encoding error 2"):
            raise MemoryError(str(exc)) from exc
        raise
    return file.getvalue()


def _deflate_runs(mask: npt.NDArray[np.uint8]) -> Iterator[bytes]:
    # Masks are runs: run-length matching alone, without a filter, is the fastest and smallest.
    deflate = zlib_ng.compressobj(level=1, strategy=zlib_ng.Z_RLE)
    for part in _filter_rows(mask, _PNG_UNFILTERED):
        yield deflate.compress(part)
    yield deflate.flush()


def _deflate_photo(image: Rows) -> Iterator[bytes]:
    # Photos gain little from a search for longer matches, and ISA-L's quick search is the fastest.
    deflate = isal_zlib.compressobj(level=1)
    for part in _filter_rows(image, _PNG_UP):
        yield deflate.compress(part)
    yield deflate.flush()


def _filter_rows(image: Rows, row_filter: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Filter an image's rows for PNG; each starts with its filter's number.

    Yields stripes ``(n, 1 + bytes) uint8``.
    """
    height, row_bytes = image.shape[0], math.prod(image.shape[1:])
    # The row above the first one counts as zeros.
    above: npt.NDArray[np.uint8] | np.uint8 = np.uint8(0)
    for stripe in stripes(height, 1 + row_bytes):
        part = image[stripe].reshape(-1, row_bytes)
        filtered = np.empty((len(part), 1 + row_bytes), dtype=np.uint8)
        filtered[:, 0] = row_filter
        if row_filter == _PNG_UP:
            np.subtract(part[0], above, out=filtered[0, 1:])
            np.subtract(part[1:], part[:-1], out=filtered[1:, 1:])
            above = part[-1]
        else:
            filtered[:, 1:] = part
        yield filtered


def _png(
    size: tuple[int, ...], color_type: int, pixels: Iterable[bytes], palette: bytes | None = None
) -> bytes:
    """A PNG file of 8-bit samples.

    ``size``: ``(height, width, ...)``; ``pixels``: the parts of the deflated rows; ``palette``: the
    PLTE chunk's body.
    """
    height, width = size[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    colors = b"" if palette is None else _chunk(b"PLTE", palette)
    head = b"".join((_PNG_SIGNATURE, _chunk(b"IHDR", header), colors))
    # One buffer that grows: joined lists of parts would hold a large photo's file three times. The
    # length of IDAT is known at its end.
    file = io.BytesIO()
    file.write(head + bytes(4) + b"IDAT")
    checksum = zlib_ng.crc32(b"IDAT")
    for part in pixels:
        file.write(part)
        checksum = zlib_ng.crc32(part, checksum)
    pixels_bytes = file.tell() - len(head) - 8
    file.write(struct.pack(">I", checksum) + _chunk(b"IEND", b""))
    file.seek(len(head))
    file.write(struct.pack(">I", pixels_bytes))
    return file.getvalue()


def _chunk(name: bytes, body: bytes) -> bytes:
    checksum = zlib_ng.crc32(body, zlib_ng.crc32(name))
    return b"".join((struct.pack(">I", len(body)), name, body, struct.pack(">I", checksum)))
