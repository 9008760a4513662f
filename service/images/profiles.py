"""Convert pixels to sRGB by the ICC profile of their photo.

Little CMS never sees a photo's profile. It gets a new one with the few tags that a conversion from
matrix and curves, or from one table, reads, each of a bounded size. What else a profile holds may
cost any time: multi-process elements (``D2B0``) are programs, and 480 KB of them run for a minute.
The specification requires a table or matrix beside them, which is used instead. Source: ICC.1:2022,
https://www.color.org/specification/ICC.1-2022-05.pdf.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

T = TypeVar("T")

MAX_PROFILE_BYTES: Final = 4 << 20
"""Largest profile that is applied. Those of cameras and screens have a few KiB, the tables of
printing presses up to 3 MiB."""

_MAX_TAGS: Final = 100  # as in Little CMS
_HEADER_BYTES: Final = 128
_ENTRY: Final = struct.Struct(">4sII")
_CLASSES: Final = frozenset({b"scnr", b"mntr", b"prtr", b"spac"})
# Pillow's mode -> the colour space that the profile must describe, and its channels.
_SPACES: Final = {
    "I;16": (b"GRAY", 1),
    "RGB": (b"RGB ", 3),
    "CMYK": (b"CMYK", 4),
}
_COLUMNS: Final = (b"rXYZ", b"gXYZ", b"bXYZ")
_CURVES: Final = (b"rTRC", b"gTRC", b"bTRC", b"kTRC")
_TABLE: Final = b"A2B0"  # the perceptual intent's; Little CMS falls back to the matrix

_REMEMBERED_BYTES: Final = 1 << 16
_SAMPLES_PER_AXIS: Final = 9
_INVISIBLE: Final = 1
"""Levels of 255 by which a profile of sRGB may differ from Little CMS's own: rounding of curves."""


def srgb_conversion(icc_profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of ``mode``, ``RGB`` or ``CMYK``, to 8-bit sRGB.

    ``icc_profile``: a photo's profile, None if it has none. Returns None if the pixels are in sRGB
    already, by the profile's curves and not by its name, or if the profile is broken, too large, or
    for another colour space: viewers ignore it.
    """
    return _find(_conversion, icc_profile, mode)


def srgb_levels(icc_profile: bytes | None) -> npt.NDArray[np.uint8] | None:
    """Return the 8-bit sRGB level of each 16-bit level of a grey photo, ``(65536,) uint8``.

    None as in `srgb_conversion`.
    """
    return _find(_levels, icc_profile, "I;16")


def _find(find: Callable[[bytes, str], T], icc_profile: bytes | None, mode: str) -> T | None:
    if not icc_profile or len(icc_profile) > MAX_PROFILE_BYTES:
        return None
    try:
        return find(icc_profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, struct.error):
        return None


@lru_cache(maxsize=1)
def lab_conversion() -> ImageCms.ImageCmsTransform:
    """Return the conversion of Pillow's mode ``LAB`` to 8-bit sRGB."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


# A photo of half a megapixel is decoded in less time than a conversion is built, and cameras and
# editors write the same profile into every photo.
@lru_cache(maxsize=16)
def _remembered_conversion(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    conversion = _transform(icc_profile, mode)
    return None if mode == "RGB" and _changes_nothing(conversion) else conversion


def _conversion(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    remembered = len(icc_profile) <= _REMEMBERED_BYTES
    find = _remembered_conversion if remembered else _remembered_conversion.__wrapped__
    return find(icc_profile, mode)


def _levels(icc_profile: bytes, mode: str) -> npt.NDArray[np.uint8] | None:
    levels = np.arange(1 << 16, dtype=np.uint16)
    # Little CMS would draw straight lines between few points of a curve, which is steep at black.
    conversion = _transform(icc_profile, mode, ImageCms.Flags.NOOPTIMIZE)
    converted = np.asarray(conversion.apply(Image.fromarray(levels[None])))[0, :, 0]
    change = converted[::257].astype(np.int16) - np.arange(256)
    return None if np.abs(change).max() <= _INVISIBLE else converted


def _transform(
    icc_profile: bytes, mode: str, flags: ImageCms.Flags = ImageCms.Flags.NONE
) -> ImageCms.ImageCmsTransform:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(simple_profile(icc_profile, mode)))
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(profile, srgb, mode, "RGB", flags=flags)


def simple_profile(icc_profile: bytes, mode: str) -> bytes:
    """Return a profile with only the tags of a matrix with curves or of one table.

    Raises `ValueError` or `struct.error` if the profile is broken or not for ``mode``.
    """
    space, channels = _SPACES[mode]
    header = icc_profile[:_HEADER_BYTES]
    if header[12:16] not in _CLASSES or header[16:20] != space:
        raise ValueError("not a profile of this colour space")
    tags: dict[bytes, bytes] = {}
    (count,) = struct.unpack_from(">I", icc_profile, _HEADER_BYTES)
    for nth in range(min(count, _MAX_TAGS)):
        place = _HEADER_BYTES + 4 + nth * _ENTRY.size
        name, offset, size = _ENTRY.unpack_from(icc_profile, place)
        tag = icc_profile[offset : offset + size]
        if name not in tags and _is_simple(name, tag, channels):
            tags[name] = tag
    body = b""
    entries = struct.pack(">I", len(tags))
    first = _HEADER_BYTES + 4 + _ENTRY.size * len(tags)
    for name, tag in tags.items():
        entries += _ENTRY.pack(name, first + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    total = struct.pack(">I", first + len(body))
    return total + header[4:] + entries + body


def _is_simple(name: bytes, tag: bytes, channels: int) -> bool:
    kind = tag[:4]
    if name in _COLUMNS:
        return kind == b"XYZ "
    if name in _CURVES:
        return kind in (b"curv", b"para")
    # A grey photo has a curve; a table could only give it colours.
    return name == _TABLE and channels > 1 and _is_whole_table(kind, tag, channels)


def _is_whole_table(kind: bytes, tag: bytes, channels: int) -> bool:
    """Return whether a table has the numbers that its header announces, from any colour to PCS."""
    if tag[8:10] != bytes((channels, 3)):
        return False
    needed: int
    if kind == b"mft1":
        needed = 48 + 256 * (channels + 3) + 3 * tag[10] ** channels
    elif kind == b"mft2":
        entries_in, entries_out = struct.unpack_from(">HH", tag, 48)
        needed = 52 + 2 * (entries_in * channels + entries_out * 3 + 3 * tag[10] ** channels)
    elif kind == b"mAB ":
        (table,) = struct.unpack_from(">I", tag, 24)
        points, sample_bytes = tag[table : table + channels], tag[table + 16 : table + 17]
        needed = table and table + 20 + 3 * math.prod(points) * int.from_bytes(sample_bytes)
    else:
        return False
    return len(tag) >= needed


def _changes_nothing(conversion: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a conversion of RGB leaves colours all over the cube as they are."""
    levels = np.linspace(0, 255, _SAMPLES_PER_AXIS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, len(levels), 3)
    change = np.asarray(conversion.apply(Image.fromarray(cube))).astype(np.int16) - cube
    return bool(np.abs(change).max() <= _INVISIBLE)
