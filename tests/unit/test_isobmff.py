"""HEIF and AVIF: files of other tools, and what their boxes may not do."""

from __future__ import annotations

import re
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.errors import ImageError, ImageTooLarge, TooExpensive, UndecodableImage
from service.images.decoding import decode, inspect, sniff

IMAGES = Path(__file__).parents[1] / "images"
CAP = 1_000_000
RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (250, 250, 250)


def read(name: str) -> bytes:
    """The bytes of one of the images."""
    return (IMAGES / name).read_bytes()


def avif(size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    """An AVIF by Pillow."""
    file = BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "AVIF", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "size", "corners"),
    [
        ("plain.heic", (50, 75), (RED, GREEN, BLUE, WHITE)),
        ("turned.heic", (75, 50), (WHITE, GREEN, BLUE, RED)),
        ("alpha.heic", (50, 75), (RED, GREEN, (255,) * 3, (255,) * 3)),
        ("turned.avif", (75, 50), (RED, BLUE, GREEN, WHITE)),
        ("grid.avif", (128, 192), (RED, GREEN, BLUE, WHITE)),
    ],
)
def test_files_of_other_tools(
    name: str, size: tuple[int, int], corners: tuple[tuple[int, int, int], ...]
) -> None:
    """Upright, cropped, put together from tiles, and transparency over white."""
    photo = decode(read(name), CAP)
    assert photo.size == size
    assert photo.pixels.shape == (*size, 3)
    seen = [photo.pixels[y, x] for y in (5, -5) for x in (5, -5)]
    assert np.allclose(seen, corners, atol=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_are_exifs(orientation: int) -> None:
    """Pillow writes an AVIF's turn from EXIF's orientation, and decodes no other way round."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    header = inspect(avif(exif=exif), CAP)
    assert header.orientation == orientation
    assert header.size == (48, 64)


def test_the_kind_is_the_brands() -> None:
    """Of the file's first box, whatever a file is called; others of this family are refused."""
    assert sniff(read("plain.heic")) == "HEIF"
    assert sniff(avif()) == "AVIF"
    assert sniff(read("plain.heic").replace(b"ftypheic", b"ftypmif1")) == "HEIF"
    for other in (b"isom", b"crx ", b"qt  "):
        with pytest.raises(ImageError, match="HEIF"):
            sniff(b"\0\0\0\x14ftyp" + other + b"\0\0\0\0" + other)


def test_a_profile_is_applied() -> None:
    """One in the file's box, as in other formats."""
    plain = decode(avif(), CAP).pixels[5, 5].astype(int)
    header = inspect(avif(icc_profile=b"\0" * 200), CAP)
    assert header.icc_profile == b"\0" * 200
    assert np.abs(decode(avif(icc_profile=b"\0" * 200), CAP).pixels[5, 5] - plain).max() == 0


def test_a_picture_that_is_to_be_cropped() -> None:
    """A HEIF is; an AVIF is refused, because its decoder would show all of it."""
    assert inspect(read("plain.heic"), CAP).size == (50, 75)
    with pytest.raises(UndecodableImage, match="cropped"):
        decode(read("crop.avif"), CAP)


def test_the_cap_is_checked_by_the_header() -> None:
    """Before a decoder sees the file."""
    for data in (read("grid.avif"), read("turned.heic")):
        with pytest.raises(ImageTooLarge, match="at most 1000"):
            inspect(data, 1000)


def test_a_size_that_lies() -> None:
    """An AVIF's picture is scaled to it, a HEIF is refused."""
    data = bytearray(avif())
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", 32, 48)
    photo = decode(bytes(data), CAP)
    assert photo.size == (48, 32)
    assert np.allclose(photo.pixels, RED, atol=25)
    with pytest.raises(UndecodableImage):
        decode(
            read("plain.heic").replace(struct.pack(">II", 75, 50), struct.pack(">II", 70, 50)), CAP
        )


def test_every_cut_and_every_changed_byte_is_an_image_error_or_a_photo() -> None:
    """No other exception, whatever the boxes say."""
    for name in ("turned.heic", "grid.avif"):
        whole = read(name)
        meta = whole.index(b"mdat")
        for place in range(8, meta):
            for data in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
                try:
                    inspect(data, CAP)
                except ImageError:
                    continue


def box(name: bytes, *parts: bytes) -> bytes:
    """A box."""
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), name) + content


def heif(*boxes: bytes) -> bytes:
    """A HEIF whose primary item is 1, with more boxes of its ``meta``."""
    head = box(b"ftyp", b"heic\0\0\0\0mif1heic")
    primary = box(b"pitm", bytes(4), b"\0\1")
    return head + box(b"meta", bytes(4), primary, *boxes)


HOSTILE = {
    "boxes": heif(box(b"iprp", box(b"ipco", box(b"free") * 70_000))),
    "extents without bytes": heif(
        box(b"iloc", b"\0\0\0\0\0\0\xff\xff", b"\0\1\0\0\xff\xff" * 65_535)
    ),
    "references to nothing": heif(
        box(b"iref", bytes(4), box(b"dimg", b"\0\1\xff\xff") * 20, bytes(140_000))
    ),
    "items": heif(
        box(
            b"iinf",
            bytes(6),
            *(box(b"infe", b"\2\0\0\0", struct.pack(">HH", n, 0), b"hvc1") for n in range(5000)),
        )
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_boxes_that_repeat_something_for_nothing(name: str) -> None:
    """They are refused before they cost seconds."""
    with pytest.raises(TooExpensive, match="more than"):
        inspect(HOSTILE[name], CAP)


def test_a_grid_of_large_tiles_is_refused() -> None:
    """The tiles may exceed the picture by little."""
    data = read("grid.avif")
    sizes = [found.start() + 8 for found in re.finditer(b"ispe", data)]
    tile = min(sizes, key=lambda at: struct.unpack_from(">I", data, at)[0])
    large = data[:tile] + struct.pack(">II", 60_000, 60_000) + data[tile + 8 :]
    with pytest.raises(TooExpensive, match="tiles"):
        inspect(large, CAP)
