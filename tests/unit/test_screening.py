"""Files made to keep their readers busy are refused, or cost no more than their pixels."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Final

import numpy as np
import pytest
from PIL import Image

from service.errors import UndecodableImage
from service.images.decoding import decode
from service.images.screening import MAX_HEADER_BYTES, MAX_READS, MAX_SCAN_PIXELS, MAX_STRIPS
from tests.artefacts import encode
from tests.mutations import PNG_SIGNATURE, chunk, save

CAP: Final = 50_000_000
SIDE: Final = 48
PHOTO: Final = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
SCAN: Final = b"\xff\xda"
EMPTY_COMMENT: Final = b"\xff\xfe\0\2"
Make = Callable[[], bytes]


def jpeg(inserted: bytes) -> bytes:
    """Insert data before its other segments."""
    data = encode(PHOTO, "JPEG")
    return data[:2] + inserted + data[2:]


def png(inserted: bytes) -> bytes:
    """Insert data between its header and its pixels."""
    data = encode(PHOTO, "PNG")
    end_of_header = len(PNG_SIGNATURE) + 25
    return data[:end_of_header] + inserted + data[end_of_header:]


def gif(inserted: bytes) -> bytes:
    """Make one of one colour, with data before its frame."""
    data = save(Image.new("L", (SIDE, SIDE)), "GIF")
    frame = data.index(b",\0\0\0\0")
    return data[:frame] + inserted + data[frame:]


def tiff(fields: list[tuple[int, int]], *, big: bool = False, order: str = "<") -> bytes:
    """Make a directory of fields without values, given as tag and count."""
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    start += struct.pack(f"{order}HHQ", 8, 0, 16) if big else struct.pack(f"{order}I", 8)
    layout = f"{order}{'HHQQ' if big else 'HHII'}"
    entries = b"".join(struct.pack(layout, tag, 4, count, 0) for tag, count in fields)
    return start + struct.pack(f"{order}{'Q' if big else 'H'}", len(fields)) + entries + bytes(8)


def pieces_of_exif() -> bytes:
    """An EXIF block with enough segments to be too long."""
    piece = b"\xff\xe1" + struct.pack(">H", 60_008) + b"Exif\0\0" + bytes(60_000)
    return piece * (MAX_HEADER_BYTES // len(piece) + 2)


def run_length_bmp() -> bytes:
    """Two bytes for each run of one pixel."""
    header = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024) + b"\1\2" * 4096


def scans(side: int, count: int, between: bytes = b"") -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = save(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data[data.rindex(SCAN) : -2]
    return data[:-2] + (between + last) * count + data[-2:]


def separate_scans() -> bytes:
    """A sequential JPEG whose first scan has one component of three; too many scans follow."""
    data = encode(np.zeros((1000, 1000, 3), dtype=np.uint8), "JPEG")
    start = data.index(SCAN)
    scan = SCAN + bytes([0, 8, 1, 1, 0, 0, 63, 0]) + data[start + 14 : -2]
    return data[:start] + scan * (MAX_SCAN_PIXELS // 1000**2 + 1)


TOO_MUCH: Final[dict[str, tuple[Make, str]]] = {
    "comments of a JPEG": (lambda: jpeg(EMPTY_COMMENT * MAX_READS), "steps"),
    "padding of a JPEG": (lambda: jpeg(b"\xff" * MAX_READS), "steps"),
    "EXIF of a JPEG": (lambda: jpeg(pieces_of_exif()), "bytes of metadata"),
    "chunks of a PNG": (lambda: png(chunk(b"prVt", b"") * (MAX_READS // 2)), "steps"),
    "text of a PNG": (
        lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 9))) * 65),
        "broken",
    ),
    "profile of a PNG": (
        lambda: png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**24)))),
        "broken",
    ),
    "blocks of a GIF": (lambda: gif(b"!\xfe" + b"\1x" * MAX_READS + b"\0"), "steps"),
    "fields of a TIFF": (lambda: tiff([(9999, 1)] * MAX_READS, big=True), "steps"),
    "runs of a BMP": (run_length_bmp, "run-length"),
    "scans of a JPEG": (lambda: scans(1000, 600), "scans"),
    "segments between scans": (lambda: scans(3000, 60, EMPTY_COMMENT * (MAX_READS // 50)), "scans"),
    "separate scans": (separate_scans, "scans"),
}


@pytest.mark.parametrize(("make", "reason"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_would_take_too_long_is_refused(make: Make, reason: str) -> None:
    """Unchecked, each takes seconds to hours, or a gigabyte."""
    with pytest.raises(UndecodableImage, match=reason):
        decode(make(), 2 * CAP)


@pytest.mark.parametrize("tag", [273, 324])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_strips_and_tiles_are_counted(tag: int, big: bool, order: str) -> None:
    """In all four kinds of TIFF, before Pillow makes an object of each."""
    with pytest.raises(UndecodableImage, match="strips or tiles"):
        decode(tiff([(256, 1), (tag, MAX_STRIPS + 1)], big=big, order=order), CAP)
    with pytest.raises(UndecodableImage) as caught:
        decode(tiff([(256, 1), (tag, MAX_STRIPS)], big=big, order=order), CAP)
    assert "strips" not in str(caught.value)


def many_frames() -> bytes:
    """A GIF of 5,000."""
    data = gif(b"")
    frame = data[data.index(b",\0\0\0\0") : -1]
    return data[:-1] + frame * 4999 + data[-1:]


def many_pictures() -> bytes:
    """A TIFF of 300."""
    picture = Image.new("L", (SIDE, SIDE))
    return save(picture, "TIFF", save_all=True, append_images=[picture.copy()] * 299)


def motion_photo() -> bytes:
    """A progressive JPEG followed by a film whose bytes look like scans."""
    return scans(1000, 0) + SCAN * 1000


HARMLESS: Final[dict[str, tuple[Make, int]]] = {
    "comments": (lambda: jpeg(EMPTY_COMMENT * 50_000), SIDE),
    "chunks": (lambda: png(chunk(b"prVt", b"") * 50_000), SIDE),
    "blocks": (lambda: gif(b"!\xfe" + b"\1x" * 50_000 + b"\0"), SIDE),
    "text": (
        lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 9))) * 3),
        SIDE,
    ),
    "scans": (lambda: scans(1000, 100), 1000),
    "scans behind the image": (motion_photo, 1000),
    "frames": (many_frames, SIDE),
    "pictures": (many_pictures, SIDE),
}


@pytest.mark.parametrize(("make", "side"), HARMLESS.values(), ids=HARMLESS)
def test_what_is_merely_odd_is_answered(make: Make, side: int) -> None:
    """More metadata than any camera writes costs little work."""
    assert decode(make(), CAP).size == (side, side)


PEAK: Final = """
import sys
from PIL import Image
from service.images.decoding import decode

def peak_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak_kib()
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        decode(file.read(), 10_000_000)
print(peak_kib() - before)
"""


def test_memory_follows_from_the_pixels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """At most 24 bytes per pixel in every format, plus the files themselves."""
    folder = tmp_path_factory.mktemp("large")
    side = 2000
    files = {
        "a.webp": save(Image.new("RGB", (side, side)), "WEBP", lossless=True),
        "b.png": save(Image.new("RGBA", (side, side)), "PNG", compress_level=1),
        "c.tiff": save(Image.new("CMYK", (side, side)), "TIFF", compression="tiff_lzw"),
        "d.jpg": save(Image.new("CMYK", (side, side)), "JPEG", progressive=True),
        "e.gif": save(Image.new("P", (side, side)), "GIF"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *(folder / name for name in files)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 <= 24 * side**2 + 2**24
