"""Refuse image files that cost their readers far more than their pixels.

A reader's work and memory should depend only on the pixels and bytes, which are capped. In some
files they grow with something else: millions of empty blocks, each an object in Pillow, or
thousands of passes over the same pixels. No camera or program writes such files.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from typing import Final

from PIL import ImageFile

from service.errors import UndecodableImage

MAX_READS: Final = 1 << 18
"""Largest number of reads that Pillow may need for one file.

A file of 20 MiB in chunks of 1 KiB needs about a third of that.
"""

MAX_HEADER_BYTES: Final = 8 << 20
"""Largest number of bytes before the first pixel, for formats that store metadata there.

Pillow joins the pieces of a JPEG's metadata one by one, so its time grows with their square.
"""

MAX_STRIPS: Final = 1 << 16
"""Largest number of strips or tiles of a TIFF, which Pillow lists in memory. Files with a strip for
each row have fewer."""

MAX_SCAN_PIXELS: Final = 500_000_000
"""Largest number of a JPEG's pixels, counted once for each scan: the ten scans of libjpeg's own
progressive files at 50 million pixels."""

_SEQUENTIAL: Final = ("JPEG", "PNG", "GIF")
_STRIP_TAGS: Final = (273, 324)  # StripOffsets, TileOffsets
_RUN_LENGTH_CODEC: Final = "bmp_rle"

_SCAN: Final = b"\xff\xda"
_START_OF_IMAGE: Final = b"\xff\xd8"
_END_OF_IMAGE: Final = b"\xff\xd9"
# In a scan's data FF00 stands for FF, and FFD0 to FFD7 restart it. Source: ITU-T T.81, annex B.
_MARKER: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class MeteredFile(io.BytesIO):
    """A file in memory that limits its reads to `MAX_READS` and `MAX_HEADER_BYTES`.

    ``image_format``: Pillow's name of the file's format. Reads beyond a limit raise
    `UndecodableImage`, which none of Pillow's readers catches.
    """

    def __init__(self, data: bytes, image_format: str) -> None:
        super().__init__(data)
        self._reads = 0
        self._header_bytes = MAX_HEADER_BYTES if image_format in _SEQUENTIAL else sys.maxsize

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like `io.BytesIO`. Raises `UndecodableImage` beyond a limit."""
        self._reads += 1
        if self._reads > MAX_READS:
            raise UndecodableImage(f"reading the image takes more than {MAX_READS} steps")
        if self.tell() > self._header_bytes:
            raise UndecodableImage(f"the image has over {MAX_HEADER_BYTES} bytes of metadata")
        return super().read(size)

    def header_ends(self) -> None:
        """Lift the header's limit: pixels may be anywhere in the file."""
        self._header_bytes = sys.maxsize


def check_before_opening(data: bytes, image_format: str) -> None:
    """Raise `UndecodableImage` if the file is too expensive for Pillow to open."""
    if image_format == "TIFF" and _strips(data) > MAX_STRIPS:
        raise UndecodableImage(f"the image has more than {MAX_STRIPS} strips or tiles")


def check_before_decoding(data: bytes, image: ImageFile.ImageFile) -> None:
    """Raise `UndecodableImage` if an opened image is too expensive to decode."""
    codec = image.tile[0].codec_name if image.tile else ""
    # Pillow's only decoder in Python; its time grows with the runs, up to ten million.
    if codec == _RUN_LENGTH_CODEC:
        raise UndecodableImage("run-length encoded BMP is not supported")
    if codec == "jpeg":
        _check_scans(data, image)


def _strips(data: bytes) -> int:
    """Return the number of strips or tiles according to the first directory of a TIFF."""
    order = "<" if data.startswith(b"II") else ">"
    big = b"+" in data[2:4]
    pointer, count = ("8xQ", "Q") if big else ("4xI", "H")
    entry = struct.Struct(f"{order}{'H2xQ8x' if big else 'H2xI4x'}")
    try:
        (start,) = struct.unpack_from(order + pointer, data)
        (entries,) = struct.unpack_from(order + count, data, start)
    except struct.error:  # the file is truncated; Pillow reports it
        return 0
    first = start + struct.calcsize(order + count)
    directory = data[first : first + entries * entry.size]
    whole = memoryview(directory)[: len(directory) // entry.size * entry.size]
    return max((size for tag, size in entry.iter_unpack(whole) if tag in _STRIP_TAGS), default=0)


def _check_scans(data: bytes, image: ImageFile.ImageFile) -> None:
    pixels = image.width * image.height
    # Bytes in metadata or after the image can look like scans; the exact count below is slow.
    if not _has_more_scans(data, image) or data.count(_SCAN) * pixels <= MAX_SCAN_PIXELS:
        return
    scans = place = 0
    for _ in range(MAX_READS):
        marker = _MARKER.search(data, place)
        if marker is None or marker[0] == _END_OF_IMAGE:
            return
        scans += marker[0] == _SCAN
        if scans * pixels > MAX_SCAN_PIXELS:
            break
        place = marker.end()
        if marker[0] != _START_OF_IMAGE:
            place += int.from_bytes(data[place : place + 2])
    raise UndecodableImage("the image has too many scans for its size")


def _has_more_scans(data: bytes, image: ImageFile.ImageFile) -> bool:
    """Return whether an opened JPEG may have more than one scan.

    It may if the first scan, whose header Pillow has just read, is not complete. Otherwise libjpeg
    reads no second one.
    """
    if image.fp is None or "progressive" in image.info:
        return True
    components = len(image.getbands())
    header = _SCAN + struct.pack(">HB", 6 + 2 * components, components)
    end = image.fp.tell()
    start = data.rfind(_SCAN, 0, end)
    return start + len(_SCAN) + 6 + 2 * components != end or not data.startswith(header, start)
