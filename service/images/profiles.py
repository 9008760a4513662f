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
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

MAX_PROFILE_BYTES: Final = 4 << 20
"""Largest profile that is applied. Those of cameras and screens have a few KiB, the tables of
printing presses up to 3 MiB."""

_MAX_TAGS: Final = 100  # as in Little CMS
_HEADER_BYTES: Final = 128
_ENTRY: Final = struct.Struct(">4sII")
_CLASSES: Final = frozenset({b"scnr", b"mntr", b"prtr", b"spac"})
# Pillow's mode -> the colour space that the profile must describe, and its channels.
_SPACES: Final = {
    "L": (b"GRAY", 1),
    "I;16": (b"GRAY", 1),
    "RGB": (b"RGB ", 3),
    "CMYK": (b"CMYK", 4),
}
_COLUMNS: Final = (b"rXYZ", b"gXYZ", b"bXYZ")
_CURVES: Final = (b"rTRC", b"gTRC", b"bTRC", b"kTRC")
_TABLE: Final = b"A2B0"  # the perceptual intent's; Little CMS falls back to the matrix

_CACHED: Final = 16
_CACHED_BYTES: Final = 1 << 16
_SAMPLES_PER_AXIS: Final = 9
_INVISIBLE: Final = 1
"""Levels of 255 by which a profile of sRGB may differ from Little CMS's own: rounding of curves."""


def srgb_conversion(icc_profile: object, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of ``mode`` to 8-bit sRGB, Pillow's mode ``RGB``.

    ``icc_profile``: a photo's profile, None if it has none; ``mode``: ``L``, ``I;16``, ``RGB`` or
    ``CMYK``. Returns None if the pixels are in sRGB already, by the profile's curves and not by its
    name, or if the profile is broken, too large, or for another colour space: viewers ignore it.
    """
    if not isinstance(icc_profile, bytes) or len(icc_profile) > MAX_PROFILE_BYTES:
        return None
    small = len(icc_profile) <= _CACHED_BYTES
    return (_remembered_conversion if small else _conversion)(icc_profile, mode)


@lru_cache(maxsize=1)
def lab_conversion() -> ImageCms.ImageCmsTransform:
    """Return the conversion of Pillow's mode ``LAB`` to 8-bit sRGB."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


def _conversion(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(simple_profile(icc_profile, mode)))
        srgb = ImageCms.createProfile("sRGB")
        conversion = ImageCms.buildTransform(profile, srgb, mode, "RGB")
        return None if _changes_nothing(conversion, mode) else conversion
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, struct.error):
        return None


# A photo of half a megapixel is decoded in less time than a conversion is built, and cameras and
# editors write the same profile into every photo.
_remembered_conversion = lru_cache(maxsize=_CACHED)(_conversion)


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
    return name == _TABLE and _is_whole_table(kind, tag, channels)


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


def _changes_nothing(conversion: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a conversion leaves samples of all colours as they are."""
    if mode not in ("L", "RGB"):
        return False
    samples = _samples(mode)
    converted = np.asarray(conversion.apply(Image.fromarray(samples))).astype(np.int16)
    change = converted - (samples[..., None] if mode == "L" else samples)
    return bool(np.abs(change).max() <= _INVISIBLE)


def _samples(mode: str) -> npt.NDArray[np.uint8]:
    """Colours all over the cube, ``(81, 9, 3) uint8``, or all levels of grey, ``(1, 256)``."""
    if mode == "L":
        return np.arange(256, dtype=np.uint8)[None]
    levels = np.linspace(0, 255, _SAMPLES_PER_AXIS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return cube.reshape(-1, _SAMPLES_PER_AXIS, 3)
