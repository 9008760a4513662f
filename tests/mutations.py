"""Real image files of every kind, and Hypothesis strategies that damage them.

Hypothesis draws the damage, so it can shrink a failing file to the fewest and smallest changes.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from PIL import Image, ImageCms
from skimage import data as photos

Draw = st.DrawFn

IMAGES: Final = Path(__file__).with_name("images")

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
"""The first bytes of every PNG."""

_SIDE: Final = 40
_ADAM7: Final = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_JPEG_PARTS: Final = re.compile(rb"(?=\xff[\xc0-\xcf\xd8-\xfe])")
_NUMBERS: Final = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
_NUMBER_FORMATS: Final = ("B", "<H", ">H", "<I", ">I")
_SIDES: Final = (0, 1, 3, 41, 1000, 9999, 65535, 2**31 - 1, 2**32 - 1)
_PREFIXES: Final = (
    b"BM",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"\xff\xd8\xff",
    PNG_SIGNATURE,
    b"%PDF-1.7\n",
)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def interlaced_png(image: Image.Image) -> bytes:
    """An RGB image in Adam7's seven passes, which Pillow reads and cannot write."""
    pixels = np.asarray(image)
    rows = (row for x, y, dx, dy in _ADAM7 for row in pixels[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@cache
def samples() -> dict[str, bytes]:
    """A small photo in each format and variant that Pillow writes, by name."""
    photo: npt.NDArray[np.uint8] = photos.astronaut()  # type: ignore[no-untyped-call]
    rgb = Image.fromarray(photo).resize((_SIDE + 8, _SIDE))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey, cmyk, palette = rgb.convert("L"), rgb.convert("CMYK"), rgb.quantize(16)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)

    def more() -> dict[str, object]:
        return {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}

    files: list[tuple[str, Image.Image, str, dict[str, object]]] = [
        ("baseline.jpg", rgb, "JPEG", {"restart_marker_rows": 1}),
        ("progressive.jpg", rgb, "JPEG", {"progressive": True}),
        ("cmyk.jpg", cmyk, "JPEG", {}),
        ("grey.jpg", grey, "JPEG", {"progressive": True}),
        ("rotated.jpg", rgb, "JPEG", {"exif": exif, "icc_profile": profile, "comment": "x"}),
        ("several.mpo", rgb, "MPO", more()),
        ("rgb.png", rgb, "PNG", {"exif": exif, "icc_profile": profile}),
        ("alpha.png", alpha, "PNG", {}),
        ("deep.png", deep, "PNG", {}),
        ("palette.png", palette, "PNG", {"transparency": 0}),
        ("bits.png", rgb.convert("1"), "PNG", {}),
        ("animated.png", rgb, "PNG", more()),
        ("lossy.webp", rgb, "WEBP", {"exif": exif}),
        ("lossless.webp", alpha, "WEBP", {"lossless": True}),
        ("animated.webp", rgb, "WEBP", more()),
        ("palette.gif", palette, "GIF", {"comment": b"x", "transparency": 0}),
        ("animated.gif", rgb, "GIF", more()),
        ("rgb.bmp", rgb, "BMP", {}),
        ("palette.bmp", palette, "BMP", {}),
        ("bits.bmp", rgb.convert("1"), "BMP", {}),
        ("alpha.bmp", alpha, "BMP", {}),
        ("rgb.avif", rgb, "AVIF", {"exif": exif, "icc_profile": profile}),
        ("alpha.avif", alpha, "AVIF", {}),
        ("animated.avif", rgb, "AVIF", more()),
        ("several.tiff", rgb, "TIFF", more()),
        ("big.tiff", rgb, "TIFF", {"big_tiff": True, "compression": "tiff_lzw"}),
        ("fax.tiff", rgb.convert("1"), "TIFF", {"compression": "group4"}),
        ("deep.tiff", deep, "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("float.tiff", grey.convert("F"), "TIFF", {}),
        ("cmyk.tiff", cmyk, "TIFF", {"compression": "packbits"}),
        ("lab.tiff", Image.merge("LAB", [grey] * 3), "TIFF", {"compression": "lzma"}),
    ]
    files += [
        (f"{compression}.tiff", rgb, "TIFF", {"compression": compression})
        for compression in ("jpeg", "packbits", "tiff_lzw", "zstd", "lzma", "tiff_deflate")
    ]
    made = {name: save(image, kind, **options) for name, image, kind, options in files}
    written_by_others = {
        path.name: path.read_bytes() for path in sorted(IMAGES.glob("*.[ah][ve]i[fc]"))
    }
    return {
        **made,
        **written_by_others,
        "interlaced.png": interlaced_png(rgb),
        "text": b"BM is how this text begins.",
    }


def save(image: Image.Image, image_format: str, **options: object) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    # A copy: Pillow leaves settings of one format in what it saved.
    image.copy().save(file, image_format, **options)
    return file.getvalue()


@st.composite
def hostile_files(draw: Draw) -> bytes:
    """One of `samples`, damaged in up to four ways, and often made to look whole again."""
    data = draw(st.sampled_from(list(samples().values())))
    for damage in draw(st.lists(st.sampled_from(_DAMAGES), min_size=1, max_size=4)):
        data = damage(draw, data)
    return repaired(data) if draw(st.booleans()) else data


def repaired(data: bytes) -> bytes:
    """Correct wrong checksums and sizes, so that readers get past them."""
    if data.startswith(PNG_SIGNATURE):
        return PNG_SIGNATURE + b"".join(chunk(part[4:8], part[8:-4]) for part in _png_chunks(data))
    if data.startswith(b"RIFF"):
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    return data


def _png_chunks(data: bytes) -> Iterator[bytes]:
    place = len(PNG_SIGNATURE)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        yield data[place:end] if end <= len(data) else data[place:]
        place = end


def parts(data: bytes) -> list[bytes]:
    """Split a file into its segments, chunks, blocks or fields; joined, they give the file."""
    if data.startswith(b"\xff\xd8"):
        return _JPEG_PARTS.split(data)
    if data.startswith(PNG_SIGNATURE):
        return [PNG_SIGNATURE, *_png_chunks(data)]
    if data.startswith(b"RIFF"):
        found = [data[:12]]
        while (place := sum(map(len, found))) + 8 <= len(data):
            size = int.from_bytes(data[place + 4 : place + 8], "little")
            found.append(data[place : place + 8 + size + size % 2])
        return [*found, data[place:]]
    width = 12 if data[:2] in (b"II", b"MM") else 16  # a TIFF's fields, roughly
    return [data[:8], *(data[place : place + width] for place in range(8, len(data), width))]


def _flip_bits(draw: Draw, data: bytes) -> bytes:
    changed = bytearray(data)
    for bit in draw(st.lists(st.integers(0, max(0, len(data) * 8 - 1)), min_size=1, max_size=8)):
        if data:
            changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _write_number(draw: Draw, data: bytes) -> bytes:
    layout = draw(st.sampled_from(_NUMBER_FORMATS))
    size = struct.calcsize(layout)
    number = draw(st.sampled_from(_NUMBERS)) % 256**size
    place = draw(st.integers(0, min(len(data), 600)))
    return data[:place] + struct.pack(layout, number) + data[place + size :]


def _range(draw: Draw, data: bytes) -> tuple[int, int]:
    start = draw(st.integers(0, len(data)))
    return start, min(len(data), start + draw(st.integers(0, 300)))


def _truncate(draw: Draw, data: bytes) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def _remove(draw: Draw, data: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:start] + data[end:]


def _repeat(draw: Draw, data: bytes) -> bytes:
    start, end = _range(draw, data)
    return data[:end] + data[start:end] * draw(st.integers(1, 100)) + data[end:]


def _overwrite(draw: Draw, data: bytes) -> bytes:
    start, end = _range(draw, data)
    filling = draw(st.binary(min_size=1, max_size=16))
    return data[:start] + (filling * (end - start))[: end - start] + data[end:]


def _splice(draw: Draw, data: bytes) -> bytes:
    other = draw(st.sampled_from(list(samples().values())))
    return data[: draw(st.integers(0, len(data)))] + other[draw(st.integers(0, len(other))) :]


def _prefix(draw: Draw, data: bytes) -> bytes:
    prefix = draw(st.sampled_from(_PREFIXES))
    return prefix + data[draw(st.sampled_from((0, len(prefix)))) :]


def _part(draw: Draw, data: bytes) -> tuple[list[bytes], int]:
    found = parts(data)
    return found, draw(st.integers(0, len(found) - 1))


def _repeat_part(draw: Draw, data: bytes) -> bytes:
    found, index = _part(draw, data)
    times = draw(st.sampled_from((0, 2, 3, 1000)))
    # Or into another place: a part that comes late may come early.
    place = draw(st.sampled_from((index, 0, 1, len(found))))
    return b"".join([*found[:place], *[found[index]] * times, *found[place + (place == index) :]])


def _damage_part(draw: Draw, data: bytes) -> bytes:
    found, index = _part(draw, data)
    damage = draw(st.sampled_from((_flip_bits, _write_number, _truncate, _repeat, _overwrite)))
    found[index] = damage(draw, found[index])
    return b"".join(found)


def _lie_about_size(draw: Draw, data: bytes) -> bytes:
    """Write other sides into the header, wherever the format has them."""
    width, height = (draw(st.sampled_from(_SIDES)) for _ in range(2))
    frame = re.search(rb"\xff[\xc0-\xc2]....", data, re.DOTALL)
    if data.startswith(b"\xff\xd8") and frame:
        return _at(data, frame.start() + 5, ">HH", height, width)
    if data.startswith(PNG_SIGNATURE):
        return repaired(_at(data, 16, ">II", width, height))
    if data.startswith(b"GIF"):
        return _at(data, 6, "<HH", width, height)
    if data.startswith(b"BM"):
        return _at(data, 18, "<II", width, height)
    if data.startswith(b"RIFF"):
        return _at(data, 24, "<II", width, height)
    for tag, value in ((256, width), (257, height)):
        place = data.find(struct.pack("<HHI", tag, 3, 1))
        if place >= 0:
            data = _at(data, place + 2, "<HII", 4, 1, value)
    return data


def _at(data: bytes, place: int, layout: str, *numbers: int) -> bytes:
    """Overwrite the data at a place with numbers, truncated to their size."""
    order, letters = layout[0], layout[1:]
    packed = b"".join(
        struct.pack(order + letter, number % 256 ** struct.calcsize(letter))
        for letter, number in zip(letters, numbers, strict=True)
    )
    return data[:place] + packed + data[place + len(packed) :]


_DAMAGES: Final[tuple[Callable[[Draw, bytes], bytes], ...]] = (
    _flip_bits,
    _write_number,
    _truncate,
    _remove,
    _repeat,
    _overwrite,
    _splice,
    _prefix,
    _repeat_part,
    _damage_part,
    _lie_about_size,
)
