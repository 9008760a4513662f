"""Decode untrusted image files to ``(h, w, 3) uint8`` RGB. No other module opens them.

The first bytes determine the type, not a header or a file name. `service.images.headers` reads the
header, refuses what would cost too much, and takes the metadata out. All exceptions of the readers
become one of
the errors of `service.errors.ImageError`.

The pixels of most JPEGs come from libjpeg-turbo directly (simplejpeg), which is faster than Pillow
and can decode at an eighth to a half of the size. If it refuses a file, Pillow decides. Pillow's
pixels are converted in stripes, so that beside them only the answer needs memory.
"""

from __future__ import annotations

import ctypes
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pi_heif  # type: ignore[import-untyped]
import simplejpeg  # type: ignore[import-untyped]
from PIL import AvifImagePlugin, Image, ImageFile, _imaging

from service.errors import (
    ImageError,
    ImageTooLarge,
    TooExpensive,
    UndecodableImage,
    UnsupportedImageType,
)
from service.images.headers import Header, least_side, read_header
from service.images.isobmff import sniff_brand
from service.images.profiles import lab_conversion, srgb_conversion, srgb_levels
from service.images.screening import MeteredFile
from service.images.stripes import stripes
from service.images.tiff import is_raw

IMAGE_MEDIA_TYPES: Final[dict[str, str]] = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
    "HEIF": "image/heic",
}
"""Pillow's name of each allowed format, and its media type."""

_SIGNATURES: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)

# Sizes of all versions of the information header; each starts with its own size.
_BMP_HEADER_BYTES: Final = frozenset({12, 40, 52, 56, 64, 108, 124})

# Channels of a JPEG -> the name of their space in simplejpeg.
_SPACES: Final = {1: "GRAY", 3: "RGB", 4: "CMYK"}

# EXIF orientation -> the steps that turn the stored pixels upright: swap the axes, reverse the
# rows, reverse the columns. Source: EXIF 2.3, tag 0x0112.
_UPRIGHT: Final = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True, slots=True)
class DecodedPhoto:
    """A decoded photo, upright.

    ``pixels``: ``(h, w, 3) uint8`` RGB, contiguous; ``size``: the photo's own ``(H, W)``, equal to
    ``(h, w)`` unless the decoder scaled it down; ``box``: the part of ``pixels`` that the photo
    covers, ``(left, top, right, bottom)`` in pixels. Scaling rounds sizes up, so a scaled photo may
    cover its outermost row and column only partly.
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @classmethod
    def whole(cls, pixels: npt.NDArray[np.uint8]) -> Self:
        """A photo at its own size."""
        height, width, _ = pixels.shape
        return cls(pixels, (height, width), (0, 0, width, height))


def keep_readers_quiet() -> None:
    """Silence the messages of Pillow and its libraries in this process.

    A file can control their text and number. Python would also store each of Pillow's warnings, to
    show it only once.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # A worker has one thread, and needs the picture alone.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    pi_heif.options.DECODE_THREADS = 1
    pi_heif.options.THUMBNAILS = pi_heif.options.DEPTH_IMAGES = pi_heif.options.AUX_IMAGES = False
    # libtiff writes to stderr itself, for example a line for each wrong row of a fax.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def sniff(data: bytes) -> str:
    """Return Pillow's name of the allowed format that starts with these bytes.

    Raises `UnsupportedImageType` for anything else, and for cameras' RAW files.
    """
    for signature, name in _SIGNATURES:
        if data.startswith(signature) and not (name == "TIFF" and is_raw(data)):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    # Two letters are not enough: text may start with them.
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    brand = sniff_brand(data)
    if brand is not None:
        return brand
    raise UnsupportedImageType(f"not an image of an allowed type: {', '.join(IMAGE_MEDIA_TYPES)}")


def decode(data: bytes, max_pixels: int, needed_side: int | None = None) -> DecodedPhoto:
    """Decode a photo as a viewer shows it.

    Upright by its EXIF orientation, in sRGB by its ICC profile (a broken profile is ignored),
    transparency over white, the first frame of an animation, 16-bit scaled to 8. ``needed_side`` is
    the longest side in pixels that the caller resizes the photo to: a much larger JPEG is decoded
    at a fraction of its size. Without it, photos are decoded at their own size.

    Raises `UnsupportedImageType`, `ImageTooLarge` (more than ``max_pixels`` pixels by its header,
    or too long a side), `TooExpensive` or `UndecodableImage`.
    """
    return decode_inspected(inspect(data, max_pixels), needed_side)


def inspect(data: bytes, max_pixels: int) -> Header:
    """Read a photo's header: its size, and the memory that decoding it needs.

    No library opens the file. Raises as `decode` does.
    """
    return read_header(data, sniff(data), max_pixels)


def decode_inspected(header: Header, needed_side: int | None = None) -> DecodedPhoto:
    """Decode a photo whose header has been read; see `decode`.

    Raises `ImageTooLarge`, `TooExpensive` or `UndecodableImage`.
    """
    try:
        if header.lacks_end:
            header = _with_end(header)
        photo = _decode_jpeg(header, needed_side) if header.image_format == "JPEG" else None
        if header.image_format == "HEIF":
            photo = _decode_heif(header)
        return photo or _decode_with_pillow(header, needed_side)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageTooLarge("the image has more pixels than are allowed") from exc
    except MemoryError as exc:
        raise TooExpensive("the image needs more memory than its header explains") from exc
    # Pillow's readers raise many kinds of errors: OSError, SyntaxError, ValueError, struct.error,
    # EOFError, KeyError, OverflowError, zlib.error and more.
    except Exception as exc:
        raise UndecodableImage(
            f"the {header.image_format} data is broken, truncated or of an unsupported variant"
        ) from exc


def _with_end(header: Header) -> Header:
    """Return a JPEG with an end if its scans are complete; readers refuse what has none.

    Zeros are often in the place of the end.
    """
    scans = header.data.removesuffix(b"\xff").rstrip(b"\0")
    # In a scan, a zero follows each FF.
    data = scans + (b"\0\xff\xd9" if scans.endswith(b"\xff") else b"\xff\xd9")
    try:
        # It takes even a warning about the last bits for an error. An eighth of the size is enough.
        space = _SPACES[header.channels]
        simplejpeg.decode_jpeg(data, space, min_height=1, min_width=1, min_factor=8)
    except Exception:  # noqa: BLE001  as in `_decode_jpeg`
        return header
    return replace(header, data=data)


def _decode_jpeg(header: Header, needed_side: int | None) -> DecodedPhoto | None:
    """Decode a JPEG's pixels with simplejpeg, possibly scaled; None if Pillow has to do it."""
    if header.channels not in (1, 3):
        return None
    if header.channels == 1 and srgb_levels(header.icc_profile) is not None:
        return None
    conversion = srgb_conversion(header.icc_profile, "RGB") if header.channels == 3 else None
    height, width = header.size
    least = least_side(needed_side)
    try:
        # The cap was checked on another reader's size; libjpeg must find the same one.
        if simplejpeg.decode_jpeg_header(header.data)[:2] != (height, width):
            return None
        pixels = simplejpeg.decode_jpeg(
            header.data,
            "RGB",
            min_height=least if height >= width else 0,
            min_width=least if width > height else 0,
            # Between half and full size, libjpeg-turbo is slower than at full size.
            min_factor=2 if least else 1,
        )
    # ValueError for broken data, including mere warnings that Pillow ignores; KeyError and more for
    # unusual files. Pillow decides about all of them.
    except Exception:  # noqa: BLE001
        return None
    if conversion is not None:
        for rows in stripes(len(pixels), 4 * pixels.shape[1]):
            stripe = Image.fromarray(pixels[rows])
            conversion.apply_in_place(stripe)
            pixels[rows] = np.asarray(stripe)
    if header.orientation != 1:
        upright = _empty_upright(pixels.shape[:2], header.orientation)
        _as_stored(upright, header.orientation)[:] = pixels.view("V3")[..., 0]
        pixels = upright
    return _photo(pixels, header)


def _decode_with_pillow(header: Header, needed_side: int | None) -> DecodedPhoto:
    with Image.open(MeteredFile(header.data), formats=(header.image_format,)) as image:
        if image.size[::-1] != header.size:
            raise UndecodableImage("the image has several sizes")
        if header.image_format == "JPEG" and needed_side:
            height, width = header.size
            least = least_side(needed_side)
            image.draft(image.mode, (least, 1) if width > height else (1, least))
        size = image.size
        if header.image_format in ("WEBP", "AVIF"):
            stored = _first_frame(image)
        else:
            image.load()
            stored = image
        # Again: a frame may be larger than its file's header says.
        if stored.size != size:
            raise UndecodableImage("the image has several sizes")
        return _upright_srgb(stored, header)


def _first_frame(image: ImageFile.ImageFile) -> Image.Image:
    """Decode an opened WebP's or AVIF's first frame without the two copies that Pillow makes."""
    opened: Any = image
    webp = image.format == "WEBP"
    frame = opened._decoder.get_next()[0] if webp else opened._decoder.get_frame(0)[0]
    opened._decoder = None  # frees its canvases
    mode = opened.rawmode if webp else image.mode
    if len(frame) != math.prod(image.size) * len(mode):
        raise UndecodableImage("the image has several sizes")
    return Image.frombuffer(mode, image.size, frame, "raw", mode, 0, 1)


def _decode_heif(header: Header) -> DecodedPhoto:
    """Decode a HEIF's picture with libheif, which turns and crops it."""
    opened = pi_heif.open_heif(header.data)
    picture = opened[opened.primary_index]
    if picture.size[::-1] != header.size:
        raise UndecodableImage("the image has several sizes")
    stored = Image.frombytes(
        picture.mode, picture.size, picture.data, "raw", picture.mode, picture.stride
    )
    del opened, picture
    return _upright_srgb(stored, header)


def _upright_srgb(image: Image.Image, header: Header) -> DecodedPhoto:
    """Convert a loaded image of any of Pillow's modes, and turn it upright, in stripes."""
    width, height = image.size
    pixels = _empty_upright((height, width), header.orientation)
    stored = _as_stored(pixels, header.orientation)
    to_srgb = _conversion_of(image, header)
    for rows in stripes(height, 4 * width):
        stripe = to_srgb(image.crop((0, rows.start, width, rows.stop)))
        stored[rows] = np.asarray(stripe).view("V3")[..., 0]
    return _photo(pixels, header)


def _empty_upright(stored: tuple[int, ...], orientation: int) -> npt.NDArray[np.uint8]:
    height, width = stored
    swap, _, _ = _UPRIGHT[orientation]
    return np.empty((width, height, 3) if swap else (height, width, 3), dtype=np.uint8)


def _as_stored(upright: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.void]:
    """View upright pixels, ``(h, w, 3)``, as they are stored: ``(h, w)`` or ``(w, h)`` RGB."""
    swap, reverse_rows, reverse_columns = _UPRIGHT[orientation]
    # One element of three bytes per pixel: NumPy moves these twice as fast as triples.
    pixels = upright.view("V3")[..., 0]
    if reverse_columns:
        pixels = pixels[:, ::-1]
    if reverse_rows:
        pixels = pixels[::-1]
    return pixels.T if swap else pixels


def _photo(pixels: npt.NDArray[np.uint8], header: Header) -> DecodedPhoto:
    """Describe upright pixels, which libjpeg may have scaled."""
    swap, reverse_rows, reverse_columns = _UPRIGHT[header.orientation]
    size = header.size[::-1] if swap else header.size
    height, width, _ = pixels.shape
    # libjpeg scales by eighths and rounds both sides up; the longer side gives the scale.
    scale = round(8 * max(height, width) / max(size)) / 8
    left, top, right, bottom = 0.0, 0.0, size[1] * scale, size[0] * scale
    if reverse_rows:
        top, bottom = height - bottom, height - top
    if reverse_columns:
        left, right = width - right, width - left
    return DecodedPhoto(pixels, size, (left, top, right, bottom))


_ToRgb = Callable[[Image.Image], Image.Image]


def _conversion_of(image: Image.Image, header: Header) -> _ToRgb:
    """Return the conversion of an image's stripes to RGB in sRGB, transparency over white."""
    icc_profile = header.icc_profile
    if image.mode.startswith("I;16"):
        return _conversion_of_16_bits(header)
    if image.mode in ("I", "F"):
        return _conversion_of_32_bits(image, header.inverted)
    if image.mode == "LAB":
        return lab_conversion().apply
    grey = image.mode in ("1", "L", "LA")
    opaque = _conversion_of_grey(icc_profile) if grey else _conversion_of_color(image, icc_profile)

    def over_white(stripe: Image.Image) -> Image.Image:
        with_alpha = stripe.convert("LA" if grey else "RGBA")
        white = Image.new("RGB", stripe.size, "white")
        white.paste(opaque(with_alpha), mask=with_alpha.getchannel("A"))
        return white

    return over_white if image.has_transparency_data else opaque


def _conversion_of_color(image: Image.Image, icc_profile: bytes | None) -> _ToRgb:
    space = "CMYK" if image.mode == "CMYK" else "RGB"
    conversion = srgb_conversion(icc_profile, space)
    if conversion is None:
        return lambda stripe: stripe.convert("RGB")
    return lambda stripe: conversion.apply(stripe.convert(space))


def _conversion_of_grey(icc_profile: bytes | None) -> _ToRgb:
    levels = srgb_levels(icc_profile)
    if levels is None:
        return lambda stripe: stripe.convert("L").convert("RGB")
    table = levels[::257].tolist()
    return lambda stripe: stripe.convert("L").point(table).convert("RGB")


def _conversion_of_16_bits(header: Header) -> _ToRgb:
    """Scale from the greatest sample to 255, or by the profile's curve."""
    levels = srgb_levels(header.icc_profile)
    if levels is None:
        levels = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)
    if header.inverted or header.white < len(levels) - 1:
        samples = np.arange(1 << 16).clip(max=header.white) * 65_535 // header.white
        levels = levels[65_535 - samples if header.inverted else samples]
    return lambda stripe: Image.fromarray(levels[np.asarray(stripe)]).convert("RGB")


def _conversion_of_32_bits(image: Image.Image, inverted: bool) -> _ToRgb:
    """Stretch from the smallest to the largest finite value.

    Integers and floats of 32 bits have no agreed range.
    """
    width, height = image.size
    low, high = np.inf, -np.inf
    for rows in stripes(height, 4 * width):
        samples = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        finite = samples[np.isfinite(samples)].astype(np.float64)
        low, high = finite.min(initial=low), finite.max(initial=high)
    span = high - low

    def stretched(stripe: Image.Image) -> Image.Image:
        samples = np.asarray(stripe)
        if not span > 0:
            return Image.new("RGB", stripe.size)
        values = np.where(np.isfinite(samples), samples, 0).astype(np.float64) - low
        scaled = np.rint(values.clip(0, span) * (255 / span))
        if inverted:
            scaled = 255 - scaled
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")

    return stretched
