"""Files that viewers show whole though something harmless is wrong, and RAW files."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from service.errors import UndecodableImage, UnsupportedImageType
from service.images.decoding import decode
from tests.artefacts import encode

CAP = 1_000_000
NOISE = np.random.default_rng(1).integers(0, 256, (48, 64, 3)).astype(np.uint8)
END = b"\xff\xd9"


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    """A JPEG of noise in one of Pillow's modes."""
    out = io.BytesIO()
    Image.fromarray(NOISE).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0\0", b"\0" * 5000, b"\xff"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("needed_side", [None, 8])
def test_a_jpeg_without_its_end(
    tail: bytes, mode: str, progressive: bool, needed_side: int | None
) -> None:
    """Broken downloads and recovered cards: all pixels are there, with nothing or zeros behind."""
    data = jpeg(mode, progressive=progressive)
    assert data.endswith(END)
    found = decode(data[:-2] + tail, CAP, needed_side).pixels
    assert np.array_equal(found, decode(data, CAP, needed_side).pixels)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_pixels(progressive: bool) -> None:
    """Twenty bytes of them are enough for an error."""
    with pytest.raises(UndecodableImage):
        decode(jpeg(progressive=progressive)[:-20], CAP)


def test_a_progressive_jpeg_without_its_last_scan() -> None:
    """What has come shows a coarse picture, which is not the photo."""
    data = jpeg(progressive=True)
    with pytest.raises(UndecodableImage):
        decode(data[: data.rindex(b"\xff\xda")], CAP)


def test_wrong_checksums_of_what_a_png_can_do_without() -> None:
    """Libpng goes on without the chunk; here, the transparency of a colour."""
    out = io.BytesIO()
    image = Image.fromarray(NOISE).convert("P")
    image.save(out, "PNG", transparency=3)
    data = out.getvalue()
    place = data.index(b"tRNS")
    (length,) = struct.unpack_from(">I", data, place - 4)
    end = place + 4 + length
    found = decode(data[:end] + b"oops" + data[end + 4 :], CAP).pixels
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("tail", [b"\0" * 100, b"x" * 5000, END])
def test_what_follows_an_image(image_format: str, tail: bytes) -> None:
    """It is no part of the image."""
    data = encode(NOISE, image_format)
    assert np.array_equal(decode(data + tail, CAP).pixels, decode(data, CAP).pixels)


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: data[:-4] + bytes(4)])
def test_a_png_without_its_end(damage: Callable[[bytes], bytes]) -> None:
    """The chunk at the end has no pixels."""
    assert np.array_equal(decode(damage(encode(NOISE)), CAP).pixels, NOISE)


def test_a_webp_with_a_wrong_total() -> None:
    """The size of each chunk counts."""
    data = encode(NOISE, "WEBP", lossless=True)
    wrong = data[:4] + struct.pack("<I", len(data) + 1000) + data[8:]
    assert np.array_equal(decode(wrong, CAP).pixels, NOISE)


# ---- RAW files -----------------------------------------------------------------------------------

Fields = list[tuple[int, int, int, int]]
"""Tag, type, count and value of each."""


def tiff(order: str, fields: Fields, *, child: Fields | None = None, more: bool = False) -> bytes:
    """A TIFF of 4x4 grey pixels with these fields, another directory below it and one behind."""
    pixels, child_at, main_at = 16, 32, 512

    def directory(entries: Fields, following: int) -> bytes:
        packed = b"".join(
            struct.pack(order + "HHI", tag, kind, count)
            + struct.pack(order + ("H2x" if kind == 3 else "I"), value)
            for tag, kind, count, value in sorted(entries)
        )
        return struct.pack(order + "H", len(entries)) + packed + struct.pack(order + "I", following)

    grey = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (277, 3, 1, 1)]
    grey += [(278, 3, 1, 4), (273, 4, 1, pixels), (279, 4, 1, 16)]
    if not any(tag == 262 for tag, *_ in fields):
        grey.append((262, 3, 1, 1))
    below = [(330, 4, 1, child_at)] if child is not None else []
    start = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, main_at)
    data = start.ljust(pixels, b"\0") + bytes(range(16)) + directory(child or [], 0)
    main = directory(grey + fields + below, child_at if more else 0)
    return data.ljust(main_at, b"\0") + main


THUMBNAIL = (254, 4, 1, 1)
SENSOR = (262, 3, 1, 32803)
RAW = {
    "DNG": {"fields": [(50706, 1, 4, 0x0401)]},
    "NEF, ARW: a preview, then the sensor below it": {"fields": [THUMBNAIL], "child": [SENSOR]},
    "a preview that does not say so": {"fields": [], "child": [SENSOR]},
    "a linear one below": {"fields": [], "child": [(262, 3, 1, 34892)]},
    "DCR, SRW: a preview, then more": {"fields": [THUMBNAIL], "more": True},
    "the old field for previews": {"fields": [(255, 3, 1, 2)], "more": True},
    "PEF: the sensor first": {"fields": [SENSOR]},
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", RAW)
def test_a_raw_file_is_not_its_thumbnail(name: str, order: str) -> None:
    """415 that names the formats: nobody wants the mask of a preview of 160x120 pixels."""
    with pytest.raises(UnsupportedImageType, match="JPEG, PNG"):
        decode(tiff(order, **RAW[name]), CAP)  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", [b"CR\x02\0", b"IIII", b"MMMM"])
def test_the_marks_of_raw_files(mark: bytes) -> None:
    """CR2 and IIQ have one behind a TIFF's header."""
    data = tiff("<", [])
    with pytest.raises(UnsupportedImageType):
        decode(data[:8] + mark + data[12:], CAP)


@pytest.mark.parametrize(
    ("fields", "child", "more"),
    [
        ([], [], False),
        ([], [THUMBNAIL], False),  # a pyramid
        ([], None, True),  # pages
        ([THUMBNAIL], None, False),  # the only picture
    ],
)
def test_tiffs_of_several_pictures_are_no_raw_files(
    fields: Fields, child: Fields | None, more: bool
) -> None:
    """The first picture is the whole one."""
    for order in "<>":
        found = decode(tiff(order, fields, child=child, more=more), CAP).pixels
        assert np.array_equal(found[..., 0].ravel(), np.arange(16))
