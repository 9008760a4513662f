"""What an image file's header says: the photo's size, and what decoding it costs.

Read here, byte by byte, so that no library meets a file that has not been looked at, and so that
memory can be reserved before pixels exist. Metadata is read here too, as little as is used of it,
and taken out of the file: Pillow would make objects of all of it.

A reader's work and memory should depend only on the pixels and the bytes, which are capped. In some
files they grow with something else: tiles far larger than the picture, thousands of passes over the
same pixels, millions of empty blocks. No camera or program writes such files; they are refused.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from service.errors import ImageTooLarge, TooExpensive, UndecodableImage
from service.images.isobmff import read_picture
from service.images.profiles import MAX_PROFILE_BYTES
from service.images.tiff import ORIENTATION, PHOTOMETRIC, Directory, exif_orientation

MAX_SIDE: Final = 65_535
"""The longest side, pixels: the longest that a JPEG can have."""

MAX_STEPS: Final = 1 << 18
"""Largest number of segments, chunks or blocks that are looked at in one file.

A PNG of 20 MiB in chunks of 1 KiB has 20,000.
"""

MAX_STRIPS: Final = 1 << 16
"""Largest number of strips or tiles of a TIFF. Files with a strip for each row have fewer."""

MAX_VISITS: Final = 1 << 25
"""Largest number of visits to blocks of 8x8 pixels that a JPEG may need, counted for each scan.

libjpeg's own progressive files have 14 million at 64 million pixels. A visit takes up to 26 ns of
CPU time (Huffman coding, Xeon, 2026-11-30).
"""

MAX_PADDING: Final = 1 << 24
"""Largest number of pixels by which the tiles of a TIFF together may exceed the picture."""

SHARED_BYTES: Final = 16 << 20
"""Bytes by which the strips of a compressed TIFF together may exceed the file: some programs write
equal tiles once."""

SCALING_MARGIN: Final = 2.25
"""Minimum of decoded pixels per needed pixel along either side of a scaled photo.

For 12 VOC photos enlarged to 4,000 pixels, the mask then agrees with the whole photo's in 99.8 % of
the pixels (fp32) and 99.5 % (int8). An invisible change, a random grey level up or down, gives
99.5 % and 99.3 %, so a greater margin gains nothing. A margin of 1 gives 99.0 % (fp32).
"""

RGB_BYTES: Final = 3
WORKING_BYTES: Final = 48 << 20
"""Tables, buffers and stripes of the decoders at most, beside all that grows with the pixels."""

# A visit with arithmetic coding takes up to 0.4 us of CPU time, and a byte of its data 0.14 us,
# measured as above; what a scan and a row of blocks take even without data, in visits.
_ARITHMETIC_VISITS: Final = 16
_ARITHMETIC_BYTE_VISITS: Final = 5
_SCAN_VISITS: Final = 100
_ROW_VISITS: Final = 4

# In a scan's data FF00 stands for FF, and FFD0 to FFD7 restart it. Source: ITU-T T.81, annex B.
_MARKER: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_ALONE: Final = frozenset({0x01, 0xD8})
_END_OF_IMAGE: Final = 0xD9
_END: Final = b"\xff\xd9"
_ALL_SENT: Final = (1 << 64) - 1
_START_OF_SCAN: Final = 0xDA
_EXIF: Final = 0xE1
_ICC: Final = 0xE2
_ICC_NAME: Final = b"ICC_PROFILE\0"
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = frozenset({0xC2, 0xCA})
_ARITHMETIC: Final = frozenset({0xC9, 0xCA, 0xCB})
# Tables (Huffman, quantisation, arithmetic, restarts) and the two segments that tell colour spaces.
_JPEG_KEPT: Final = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_ANCILLARY: Final = 0x20
_PNG_GREY: Final = 0
_PNG_PALETTE: Final = 3

# Source: TIFF 6.0 and its supplements. Fields with a value for each strip, and all that decoding
# reads; the second number is the most values that such a field can have.
_OFFSETS: Final = (273, 324)
_BYTE_COUNTS: Final = (279, 325)
_TIFF_KEPT: Final = {
    **dict.fromkeys((*_OFFSETS, *_BYTE_COUNTS), MAX_STRIPS),
    **dict.fromkeys((256, 257, 258, 259, 262, 266, 277, 278, 284, 292, 293, 317, 322, 323), 16),
    **dict.fromkeys((332, 338, 339, 512, 513, 514, 515, 517, 518, 519, 520, 521), 16),
    **dict.fromkeys((529, 530, 531, 532), 16),
    320: 3 << 16,  # the palette
    347: 1 << 16,  # tables of JPEG
}
_TIFF_PROFILE: Final = 34675
_TIFF_RAW: Final = 1
_TIFF_JPEG: Final = (6, 7)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a file says.

    ``size``: ``(H, W)`` as stored, not upright; ``orientation``: EXIF's, 1 to 8; ``icc_profile``:
    as stored, not checked; ``data``: the file without metadata, for its reader; ``channels``: of a
    JPEG, else 0; ``lacks_end``: whether a JPEG lacks only the marker at its end, to judge by its
    scans; ``inverted``: whether zero is white, which the reader does not know; ``white``: the
    greatest sample of more than 8 and at most 16 bits. ``stored_bytes``: what a decoded pixel takes
    before it is converted to RGB; ``decoder_bytes``: what the decoder takes beside the pixels,
    whatever the scale.
    """

    image_format: str
    size: tuple[int, int]
    data: bytes
    stored_bytes: int
    decoder_bytes: int = 0
    channels: int = 0
    lacks_end: bool = False
    inverted: bool = False
    white: int = 65_535
    orientation: int = 1
    icc_profile: bytes | None = None

    def bytes_needed(self, needed_side: int | None = None) -> int:
        """Return the most memory in bytes that `service.images.decoding.decode` holds at once.

        That is its answer and all on the way to it, but neither the file that it was given nor
        `WORKING_BYTES`, which decoders share that work one after the other.
        """
        divisor = 1
        if needed_side and self.image_format == "JPEG":
            # Pillow's scales; simplejpeg decodes at three eighths too, where Pillow takes a half.
            quotient = max(self.size) // least_side(needed_side)
            divisor = next(scale for scale in (8, 4, 2, 1) if quotient >= scale or scale == 1)
        height, width = self.size
        pixels = -(-height // divisor) * -(-width // divisor)
        # The decoder has ended when the answer is begun.
        beside = max(self.decoder_bytes, pixels * RGB_BYTES)
        return pixels * self.stored_bytes + beside + len(self.data)


def least_side(needed_side: int | None) -> int:
    """Return the least pixels that the longest side of a scaled photo may have; 0: no scaling.

    ``needed_side``: see `service.images.decoding.decode`.
    """
    return math.ceil(needed_side * SCALING_MARGIN) if needed_side else 0


def read_header(data: bytes, image_format: str, max_pixels: int) -> Header:
    """Read a file's header, and its metadata as far as it is used.

    ``image_format``: its name in Pillow. Raises `ImageTooLarge` for more than ``max_pixels`` pixels
    or a side over `MAX_SIDE`, `TooExpensive` for a file that would cost far more than its pixels,
    `UndecodableImage` for one that is broken.
    """
    try:
        header = _READERS[image_format](data, max_pixels)
    except (struct.error, IndexError) as exc:
        raise UndecodableImage(
            f"the {image_format} data is broken, truncated or too short"
        ) from exc
    check_size(header.size, max_pixels)
    return header


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise `ImageTooLarge` or `UndecodableImage` for a ``(H, W)`` that is not allowed."""
    height, width = size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height} pixels, "
            f"but at most {max_pixels} are allowed"
        )
    if max(size) > MAX_SIDE:
        raise ImageTooLarge(
            f"the image has {width} x {height} pixels, but at most {MAX_SIDE} a side are allowed"
        )
    if width < 1 or height < 1:
        raise UndecodableImage("the image has no pixels")


# ---- JPEG ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Frame:
    """A JPEG's frame: ``blocks`` has each component's ``(rows, columns)`` by its id, padded."""

    marker: int
    size: tuple[int, int]
    blocks: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, marker: int, body: bytes) -> _Frame:
        _, height, width, count = struct.unpack_from(">BHHB", body)
        parts = struct.unpack_from(f"{3 * count}B", body, 6)
        sampling = {
            component: (factors & 15 or 1, factors >> 4 or 1)
            for component, factors in zip(parts[::3], parts[1::3], strict=True)
        }
        tallest, widest = (
            max((one[axis] for one in sampling.values()), default=1) for axis in (0, 1)
        )
        rows, columns = -(-height // (8 * tallest)), -(-width // (8 * widest))
        blocks = {one: (rows * high, columns * wide) for one, (high, wide) in sampling.items()}
        return cls(marker, (height, width), blocks)

    def visits(self, components: bytes) -> int:
        """Return what a scan of these components costs, in visits to blocks."""
        sizes = [self.blocks[one] for one in components if one in self.blocks]
        blocks = sum(rows * columns for rows, columns in sizes)
        rows = max((rows for rows, _ in sizes), default=0)
        weight = _ARITHMETIC_VISITS if self.marker in _ARITHMETIC else 1
        return (blocks + _ROW_VISITS * rows) * weight + _SCAN_VISITS


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, the start and the end of a JPEG's segments, up to the image's end."""
    place = 0
    for _ in range(MAX_STEPS):
        found = _MARKER.search(data, place)
        if found is None or data[found.end() - 1] == _END_OF_IMAGE:
            return
        marker, start = data[found.end() - 1], found.start()
        place = found.end()
        if marker not in _ALONE:
            place += int.from_bytes(data[place : place + 2])
            yield marker, start, place
    raise TooExpensive(f"the image has more than {MAX_STEPS} segments")


def _note_sent(sent: dict[int, int], components: bytes, band: bytes) -> None:
    """Note in ``sent`` the coefficients of components whose last bits a scan has, a bit for each.

    ``band``: what follows the components in a scan's header: first and last coefficient, and the
    number of bits that were and are left for later scans.
    """
    first, last, bits_left = band[0], band[1], band[2] & 15
    if not bits_left:
        for one in components:
            sent[one] = sent.get(one, 0) | max(0, (2 << last) - (1 << first))


def _read_jpeg(data: bytes, max_pixels: int) -> Header:
    kept, frame, scans, visits = [b"\xff\xd8"], None, 0, 0
    exif, profile_parts = b"", {}
    sent: dict[int, int] = {}
    pixels_at = len(data)
    for marker, start, end in _segments(data):
        body = data[start + 4 : end]
        if marker in _FRAMES:
            if frame is not None:
                raise UndecodableImage("the image has two frames")
            frame = _Frame.of(marker, body)
            check_size(frame.size, max_pixels)
        if marker == _START_OF_SCAN:
            if frame is None:
                raise UndecodableImage("the image has no frame")
            pixels_at = min(pixels_at, start)
            scans += 1
            components = body[1 : 1 + 2 * body[0] : 2]
            visits += frame.visits(components)
            _note_sent(sent, components, body[1 + 2 * body[0] :])
            if visits > MAX_VISITS:
                break
            if frame.marker not in _PROGRESSIVE and body[0] == len(frame.blocks):
                break  # libjpeg reads no second scan
        elif scans == 0:
            if marker in _JPEG_KEPT:
                kept.append(data[start:end])
            elif marker == _EXIF and body.startswith(b"Exif\0\0") and not exif:
                exif = body
            elif marker == _ICC and body.startswith(_ICC_NAME):
                profile_parts[body[12:13]] = body[14:]
    if frame is None:
        raise UndecodableImage("the image has no frame")
    if frame.marker in _ARITHMETIC:
        visits += _ARITHMETIC_BYTE_VISITS * (len(data) - pixels_at)
    if visits > MAX_VISITS:
        raise TooExpensive("the image has too many scans for its size")
    blocks = sum(rows * columns for rows, columns in frame.blocks.values())
    several = scans > 1 or frame.marker in _PROGRESSIVE
    return Header(
        "JPEG",
        frame.size,
        b"".join((*kept, data[pixels_at:])),
        # Pillow's. simplejpeg's take less, but Pillow decodes what it refuses.
        stored_bytes=4,
        # The coefficients of all scans.
        decoder_bytes=blocks * 64 * 2 if several else 0,
        channels=len(frame.blocks),
        lacks_end=data.rfind(_END, pixels_at) < 0
        and all(sent.get(one, 0) & _ALL_SENT == _ALL_SENT for one in frame.blocks),
        orientation=exif_orientation(exif),
        icc_profile=b"".join(profile_parts[part] for part in sorted(profile_parts)),
    )


# ---- PNG -----------------------------------------------------------------------------------------


def _read_png(data: bytes, max_pixels: int) -> Header:
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    check_size((height, width), max_pixels)
    kept, exif, icc_profile = [_PNG_SIGNATURE], b"", b""
    place = len(_PNG_SIGNATURE)
    for _ in range(MAX_STEPS):
        if place + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind[0] & _PNG_ANCILLARY and not _is_whole_chunk(data[place:end]):
            pass  # libpng, and so each viewer, goes on without it
        elif kind in _PNG_KEPT:
            kept.append(data[place:end])
        elif kind == b"eXIf":
            exif = data[place + 8 : end - 4]
        elif kind == b"iCCP" and not icc_profile:
            icc_profile = _inflated_profile(data[place + 8 : end - 4])
        if kind == b"IEND":
            break
        place = end
    else:
        raise TooExpensive(f"the image has more than {MAX_STEPS} chunks")
    stored = {_PNG_GREY: 2 if depth == 16 else 1, _PNG_PALETTE: 1}.get(color, 4)
    return Header(
        "PNG",
        (height, width),
        b"".join(kept),
        stored_bytes=stored,
        orientation=exif_orientation(exif),
        icc_profile=icc_profile,
    )


def _is_whole_chunk(chunk: bytes) -> bool:
    return chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4)


def _inflated_profile(body: bytes) -> bytes:
    """Return the profile of a PNG's ``iCCP``; nothing if it is broken or too large."""
    _, _, packed = body.partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(packed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if inflate.eof else b""


# ---- TIFF ----------------------------------------------------------------------------------------


def _read_tiff(data: bytes, max_pixels: int) -> Header:
    directory = Directory.of(data)
    for tag, most in _TIFF_KEPT.items():
        field = directory.fields.get(tag)
        if field is not None and field.count > most:
            what = "strips or tiles" if most == MAX_STRIPS else f"values in field {tag}"
            raise TooExpensive(f"the image has more than {most} {what}")
    width, height = directory.number(256, 0), directory.number(257, 0)
    check_size((height, width), max_pixels)
    # Pillow reads no files whose samples differ.
    samples, bits = directory.number(277, 1), directory.number(258, 1)
    planes = samples if directory.number(284, 1) == 2 else 1
    tile_height, tile_width = _tile(directory, height, width)
    down, across = -(-height // tile_height), -(-width // tile_width)
    if down * across * planes > MAX_STRIPS:
        raise TooExpensive(f"the image has more than {MAX_STRIPS} strips or tiles")
    padded = down * tile_height * across * tile_width
    if _is_tiled(directory) and padded - height * width > MAX_PADDING:
        raise TooExpensive("the tiles of the image are far larger than the image")
    part_bytes = 0
    if directory.number(259, _TIFF_RAW) != _TIFF_RAW:
        _check_parts(directory, samples * -(-tile_height // 8) * -(-tile_width // 8))
        part_bytes = -(-samples * bits // 8) * tile_height * tile_width
    orientation = directory.number(ORIENTATION, 1)
    # Pillow inverts samples of 8 bits, and leaves others as they are or refuses them.
    inverted = bits > 8 and directory.number(PHOTOMETRIC, 1) == 0
    if inverted:
        directory = directory.with_number(PHOTOMETRIC, 1)
    return Header(
        "TIFF",
        (height, width),
        directory.with_only(frozenset(_TIFF_KEPT)),
        stored_bytes=4,
        # libtiff's strip or tile, and the colours that it makes of its samples.
        decoder_bytes=2 * part_bytes,
        inverted=inverted,
        white=(1 << bits) - 1 if 8 < bits < 16 else 65_535,
        orientation=orientation if 1 <= orientation <= 8 else 1,
        icc_profile=directory.bytes_of(_TIFF_PROFILE, MAX_PROFILE_BYTES),
    )


def _is_tiled(directory: Directory) -> bool:
    return 322 in directory.fields or 323 in directory.fields


def _tile(directory: Directory, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of a TIFF's tiles, or of its strips."""
    if not _is_tiled(directory):
        return max(1, min(height, directory.number(278, height))), width
    tile = directory.number(323, 0), directory.number(322, 0)
    if min(tile) < 1:
        raise UndecodableImage("the tiles of the image have no pixels")
    return tile


def _check_parts(directory: Directory, part_blocks: int) -> None:
    """Raise `UndecodableImage` if the strips or tiles of a compressed TIFF cost too much.

    ``part_blocks``: blocks of 8x8 samples in one of them.
    """
    data = directory.data
    parts = _strips(directory)
    # Without this, many strips could each read the whole file, and find next to no pixels.
    if sum(end - start for start, end in parts) > len(data) + SHARED_BYTES:
        raise TooExpensive("the strips of the image have more bytes than the file")
    if directory.number(259, _TIFF_RAW) not in _TIFF_JPEG:
        return
    scans = sum(data.count(b"\xff\xda", start, end) for start, end in parts)
    visits = scans * (part_blocks + _SCAN_VISITS)
    if re.search(rb"\xff[\xc9-\xcb]", data):
        visits = visits * _ARITHMETIC_VISITS + _ARITHMETIC_BYTE_VISITS * len(data)
    if visits > MAX_VISITS:
        raise TooExpensive("the image has too many scans for its size")


def _strips(directory: Directory) -> list[tuple[int, int]]:
    """Return the start and end in the file of all strips or tiles."""
    total = len(directory.data)
    (starts, counts) = (
        np.concatenate([directory.numbers(tag, MAX_STRIPS) for tag in tags])
        for tags in (_OFFSETS, _BYTE_COUNTS)
    )
    # libtiff takes the rest of the file for a strip without a count.
    missing = np.full(max(0, len(starts) - len(counts)), total)
    counts = np.concatenate((counts, missing))[: len(starts)]
    counts[counts == 0] = total
    ends = np.minimum(starts + counts, total)
    return list(zip(starts.tolist(), np.maximum(starts, ends).tolist(), strict=True))


# ---- GIF, WebP, BMP ------------------------------------------------------------------------------


def _read_gif(data: bytes, _: int) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    start = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    place, control = start, b""
    # Of all before the first frame, only the last control block counts: it has the transparency.
    for extension, end in _gif_extensions(data, start):
        place = end
        if data[extension + 1 : extension + 2] == b"\xf9":
            control = data[extension:end]
    if data[place : place + 1] == b",":
        # Pillow enlarges the picture to its first frame.
        left, top, wide, high = struct.unpack_from("<HHHH", data, place + 1)
        width, height = max(width, left + wide), max(height, top + high)
    whole = b"".join((data[:start], control, data[place:]))
    return Header("GIF", (height, width), whole, stored_bytes=1)


def _gif_extensions(data: bytes, place: int) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of the extensions before a GIF's first frame."""
    start = place
    inside = False
    for _ in range(MAX_STEPS):
        if not inside:
            if data[place : place + 1] != b"!":
                return
            start, place, inside = place, place + 2, True
        size = data[place] if place < len(data) else 0
        place += 1 + size
        if not size:
            inside = False
            yield start, place
    raise TooExpensive(f"the image has more than {MAX_STEPS} blocks")


def _read_webp(data: bytes, _: int) -> Header:
    if int.from_bytes(data[4:8], "little") > len(data) - 8:
        # A wrong total; the size of each chunk counts, as in browsers.
        data = b"".join((data[:4], struct.pack("<I", len(data) - 8), data[8:]))
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    chunks: dict[bytes, bytes] = {}
    place = 12
    for _ in range(MAX_STEPS):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if not name:
            break
        if name in (b"ICCP", b"EXIF"):
            chunks.setdefault(name, data[place + 8 : place + 8 + size])
        place += 8 + size + size % 2
    else:
        raise TooExpensive(f"the image has more than {MAX_STEPS} chunks")
    return Header(
        "WEBP",
        (height, width),
        data,
        stored_bytes=4,
        # libwebp's decoder of animations has two canvases. Pillow copies the file and its metadata.
        decoder_bytes=8 * width * height + 2 * len(data),
        orientation=exif_orientation(chunks.get(b"EXIF", b"")),
        icc_profile=chunks.get(b"ICCP"),
    )


def _read_bmp(data: bytes, _: int) -> Header:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    old = header_bytes == 12
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    (bits,) = struct.unpack_from("<H", data, 24 if old else 28)
    (compression,) = (0,) if old else struct.unpack_from("<I", data, 30)
    if compression in (1, 2):
        # Pillow's only decoder in Python; its time grows with the runs, up to ten million.
        raise UndecodableImage("run-length encoded BMP is not supported")
    return Header("BMP", (abs(height), width), data, stored_bytes=1 if bits <= 8 else 4)


def _read_avif(data: bytes, _: int) -> Header:
    picture = read_picture(data, "AVIF")
    if picture.size != picture.coded:
        raise UndecodableImage("AVIF that is to be cropped is not supported")
    height, width = picture.coded
    return Header(
        "AVIF",
        picture.size,
        data,
        stored_bytes=4,
        # Planes of up to 16 bits, their conversion, and two copies of the file.
        decoder_bytes=(8 + 4 * picture.alpha) * width * height + 2 * len(data),
        orientation=picture.orientation,
        icc_profile=picture.icc_profile,
    )


def _read_heif(data: bytes, max_pixels: int) -> Header:
    picture = read_picture(data, "HEIF")
    check_size(picture.coded, max_pixels)
    height, width = picture.coded
    # libheif turns and crops.
    size = picture.size if picture.orientation < 5 else picture.size[::-1]
    return Header(
        "HEIF",
        size,
        data,
        stored_bytes=4,
        # Planes of up to 16 bits, what they are turned to and its copy, and two copies of the file.
        decoder_bytes=(12 + 4 * picture.alpha) * width * height + 2 * len(data),
        icc_profile=picture.icc_profile,
    )


_READERS: Final[dict[str, Callable[[bytes, int], Header]]] = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "TIFF": _read_tiff,
    "GIF": _read_gif,
    "WEBP": _read_webp,
    "BMP": _read_bmp,
    "AVIF": _read_avif,
    "HEIF": _read_heif,
}
