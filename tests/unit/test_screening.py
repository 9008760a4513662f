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

from service.errors import ImageError, ImageTooLarge, TooExpensive, UndecodableImage
from service.images.decoding import decode, inspect
from service.images.headers import (
    MAX_PADDING,
    MAX_SIDE,
    MAX_STEPS,
    MAX_STRIPS,
    MAX_VISITS,
)
from service.images.screening import MAX_READS
from service.images.tiff import MAX_FIELDS
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
    """EXIF segments of 9 MiB."""
    return (b"\xff\xe1" + struct.pack(">H", 60_008) + b"Exif\0\0" + bytes(60_000)) * 160


def shared_exif() -> bytes:
    """An EXIF block whose 2,000 fields all have the same 50,000 bytes."""
    fields = b"".join(struct.pack("<HHII", 40_000 + nth, 7, 50_000, 8) for nth in range(2000))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2000) + fields + bytes(50_000)


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
    return data[:start] + scan * (MAX_VISITS // 125**2 + 1)


def narrow_scans() -> bytes:
    """Scans of one column of pixels, which takes as many blocks as eight."""
    data = save(Image.new("L", (1, 65_500), 128), "JPEG", progressive=True)
    last = data[data.rindex(SCAN) : -2]
    return data[:-2] + last * (MAX_VISITS // 65_500 * 8) + data[-2:]


def arithmetic_scans() -> bytes:
    """A tenth of the scans that Huffman coding may have."""
    data = scans(1000, MAX_VISITS // 125**2 // 10)
    return data.replace(b"\xff\xc2", b"\xff\xca", 1)


def tiled(side: int, data: bytes, tiles: int = 1) -> bytes:
    """A TIFF of 16 x 1 pixels in deflated tiles, all of the same data."""
    fields = {256: 16 * tiles, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side}
    starts = struct.pack(f"<{tiles}I", *[8] * tiles)
    counts = struct.pack(f"<{tiles}I", *[len(data)] * tiles)
    end = 8 + len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    entries += struct.pack("<HHII", 324, 4, tiles, end if tiles > 1 else 8)
    entries += struct.pack("<HHII", 325, 4, tiles, end + len(starts) if tiles > 1 else len(data))
    directory = struct.pack("<H", len(fields) + 2) + entries + bytes(4)
    place = struct.pack("<I", end + len(starts) + len(counts))
    return b"II*\0" + place + data + starts + counts + directory


def jpeg_in_tiff() -> bytes:
    """A TIFF compressed as a JPEG of too many scans."""
    data = save(Image.new("L", (1000, 1000)), "TIFF", compression="jpeg")
    return data + SCAN * (MAX_VISITS // 125**2 + 1)


def one_strip(data: bytes) -> bytes:
    """A TIFF whose only strip, the first one, ends with the file."""
    counts = data.index(struct.pack("<HH", 279, 4)) + 4
    return data[: counts + 4] + struct.pack("<I", len(data)) + data[counts + 8 :]


TOO_MUCH: Final[dict[str, tuple[Make, str]]] = {
    "comments of a JPEG": (lambda: jpeg(EMPTY_COMMENT * MAX_STEPS), "segments"),
    "chunks of a PNG": (lambda: png(chunk(b"prVt", b"") * MAX_STEPS), "chunks"),
    "empty pixels of a PNG": (lambda: png(chunk(b"IDAT", b"") * (MAX_READS // 2)), "steps"),
    "blocks of a GIF": (lambda: gif(b"!\xfe" + b"\1x" * MAX_STEPS + b"\0"), "blocks"),
    "extensions of a GIF": (lambda: gif(b"!\xfe\0" * MAX_STEPS), "blocks"),
    "fields of a TIFF": (lambda: tiff([(9999, 1)] * (MAX_FIELDS + 1), big=True), "fields"),
    "values of a TIFF": (lambda: tiff([(256, 1), (258, 100_000)]), "values"),
    "a tile": (lambda: tiled(46_336, zlib.compress(b"")), "larger than the image"),
    "tiles": (lambda: tiled(1024, zlib.compress(b""), 4000), "larger than the image"),
    "bytes of tiles": (lambda: tiled(16, bytes(20_000), 4000), "more bytes than the file"),
    "scans of a JPEG": (lambda: scans(1000, MAX_VISITS // 125**2), "scans"),
    "narrow scans": (narrow_scans, "scans"),
    "arithmetic scans": (arithmetic_scans, "scans"),
    "segments between scans": (lambda: scans(48, 60, EMPTY_COMMENT * 5000), "segments"),
    "separate scans": (separate_scans, "scans"),
    "scans in a TIFF": (lambda: one_strip(jpeg_in_tiff()), "scans"),
}


@pytest.mark.parametrize(("make", "reason"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_would_take_too_long_is_refused(make: Make, reason: str) -> None:
    """Unchecked, each takes seconds to hours, or gigabytes."""
    with pytest.raises(TooExpensive, match=reason):
        decode(make(), CAP)


def test_run_lengths_of_a_bmp_are_not_supported() -> None:
    """Pillow decodes them in Python, run by run."""
    with pytest.raises(UndecodableImage, match="run-length"):
        decode(run_length_bmp(), CAP)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_a_side_is_limited(image_format: str) -> None:
    """A picture of one row or column is no photo, and costs more than its pixels say."""
    longest = 65_500 if image_format == "JPEG" else MAX_SIDE
    data = save(Image.new("L", (longest, 1)), image_format)
    assert inspect(data, CAP).size == (1, longest)
    if image_format in ("PNG", "TIFF", "BMP"):
        with pytest.raises(ImageTooLarge, match=f"65536 x 1 pixels, but at most {MAX_SIDE} a side"):
            decode(save(Image.new("L", (MAX_SIDE + 1, 1)), image_format), CAP)


def test_tiles_may_be_larger_than_the_image() -> None:
    """By as much as programs make them."""
    side = 1 << 12
    assert side**2 <= MAX_PADDING
    assert decode(tiled(side, zlib.compress(bytes(side**2))), CAP).size == (1, 16)


@pytest.mark.parametrize("tag", [273, 324])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_strips_and_tiles_are_counted(tag: int, big: bool, order: str) -> None:
    """In all four kinds of TIFF, before Pillow makes an object of each."""
    with pytest.raises(TooExpensive, match="strips or tiles"):
        decode(tiff([(256, 1), (tag, MAX_STRIPS + 1)], big=big, order=order), CAP)
    with pytest.raises(ImageError) as caught:
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
    "padding": (lambda: jpeg(b"\xff" * 1_000_000), SIDE),
    "EXIF": (lambda: jpeg(pieces_of_exif()), SIDE),
    "EXIF of shared bytes": (lambda: png(chunk(b"eXIf", shared_exif())), SIDE),
    "chunks": (lambda: png(chunk(b"prVt", b"") * 50_000), SIDE),
    "blocks": (lambda: gif(b"!\xfe" + b"\1x" * 50_000 + b"\0"), SIDE),
    "text": (
        lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 9))) * 100),
        SIDE,
    ),
    "profile": (
        lambda: png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**26)))),
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
from service.images.decoding import decode_inspected, inspect
from service.images.headers import WORKING_BYTES

def peak_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = file.read()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # resets it
    before = peak_kib()
    for side in (512, None):
        header = inspect(data, 100_000_000)
        decode_inspected(header, side)
        print(peak_kib() - before, header.bytes_needed(side) + WORKING_BYTES)
"""


def test_the_memory_that_decoding_needs_is_known_before(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """From the header alone, scaled and whole, for every kind of pixels and way to store them."""
    folder = tmp_path_factory.mktemp("large")
    side = 2000
    rgb, alpha, cmyk, grey = (
        Image.new(mode, (side, side)) for mode in ("RGB", "RGBA", "CMYK", "L")
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "lossless.webp": save(alpha, "WEBP", lossless=True, method=0),
        "alpha.png": save(alpha, "PNG", compress_level=1),
        "deep.png": save(Image.new("I;16", (side, side)), "PNG", compress_level=1),
        "lzw.tiff": save(cmyk, "TIFF", compression="tiff_lzw"),
        "rotated.tiff": save(rgb, "TIFF", compression="jpeg", exif=exif),
        "float.tiff": save(Image.new("F", (side, side)), "TIFF", compression="zstd"),
        "cmyk.jpg": save(cmyk, "JPEG", progressive=True),
        "rotated.jpg": save(rgb, "JPEG", progressive=True, subsampling=0, exif=exif),
        "grey.gif": save(grey, "GIF"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *(folder / name for name in files)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(files)
    for name, line in zip((name for name in files for _ in range(2)), lines, strict=True):
        taken, announced = int(line[0]) * 1024, int(line[1])
        # The second number: what decoders take whatever the size, and copies of the file.
        assert taken <= announced <= 12 * side**2 + 2**26, name
