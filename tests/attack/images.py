"""Image files made to cost their readers far more than their pixels, thousands from a seed.

``python -m tests.attack.images --cases 3000 --seed 1`` decodes each file in a process of its own
and prints the files that took the most CPU time and the most memory, and those that took more
memory than their header announced. ``--only SEED:N`` decodes one of them again, ``--keep FOLDER``
writes the worst.

Exit status: 0, or 1 if a file took more than `CPU_S` or `PEAK_BYTES`, more memory than announced,
or ended its process.
"""

from __future__ import annotations

import argparse
import lzma
import os
import random
import signal
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from service.errors import ImageError
from service.images import decoding
from service.images.headers import WORKING_BYTES
from tests.mutations import PNG_SIGNATURE, chunk, samples, save

MAX_PIXELS: Final = 64_000_000
MAX_BYTES: Final = 20 << 20
CPU_S: Final = 2.5
PEAK_BYTES: Final = 800 << 20

Rng = random.Random


class Case(NamedTuple):
    """A hostile file: its kind, with the seed that makes it again, and its bytes."""

    name: str
    data: bytes


def cases(seed: int, count: int) -> Iterator[Case]:
    """Yield ``count`` files, each made from ``seed`` and its number alone."""
    for nth in range(count):
        yield case(seed, nth)


def case(seed: int, nth: int) -> Case:
    """Make the file of a number."""
    rng = random.Random(f"{seed}:{nth}")  # noqa: S311
    kind = rng.choice(list(_KINDS))
    data = _KINDS[kind](rng)[:MAX_BYTES]
    return Case(f"{kind} {seed}:{nth}", data)


# ---- numbers -------------------------------------------------------------------------------------


def _number(rng: Rng, most: int) -> int:
    """Between 1 and ``most``, any number of digits as likely as another."""
    return max(1, min(most, round(2 ** rng.uniform(0, most.bit_length()))))


def _sides(rng: Rng, longest: int = 70_000) -> tuple[int, int]:
    """A width and a height, often with about as many pixels as are allowed."""
    if rng.random() < 0.3:
        return _number(rng, longest), _number(rng, longest)
    pixels = rng.choice((MAX_PIXELS, MAX_PIXELS, MAX_PIXELS // 4, 1 << 20, 256))
    width = min(longest, _number(rng, longest))
    return width, max(1, min(longest, pixels // width))


@lru_cache(maxsize=8)
def _zeros(size: int) -> bytes:
    """This many zeros, deflated."""
    pack = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [pack.compress(block) for _ in range(size >> 20)]
    return b"".join((*parts, pack.compress(bytes(size & 0xFFFFF)), pack.flush()))


def _deflated(rng: Rng, size: int) -> bytes:
    """About this many bytes, deflated: zeros, a short pattern, noise, or nothing in many blocks."""
    kind = rng.randrange(4)
    if kind == 0:
        return b"\x78\x9c" + b"\0\0\0\xff\xff" * _number(rng, 2_000_000)
    if kind == 1:
        return zlib.compress(rng.randbytes(rng.choice((3, 64, 4000))) * min(size // 64 + 1, 50_000))
    if kind == 2:
        return zlib.compress(rng.randbytes(min(size, 1 << 20)), 1)
    # A few sizes, so that they are made once.
    return _zeros(1 << min(size, 4 * MAX_PIXELS).bit_length())


# ---- ICC -----------------------------------------------------------------------------------------


def _curve(rng: Rng) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        count = _number(rng, 100_000)
        stored = rng.choice((count, count, 1, 40_000))
        return b"curv\0\0\0\0" + struct.pack(">I", count) + rng.randbytes(2 * stored)
    if kind == 1:
        return b"para\0\0\0\0" + struct.pack(">HH", rng.randrange(6), 0) + rng.randbytes(28)
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, rng.randrange(65536))


def _table(rng: Rng, channels: int) -> bytes:
    grid = rng.choice((2, 9, 17, 33, 64, 255))
    inputs = rng.choice((channels, channels, channels, 1, 15))
    head = struct.pack(
        ">BBBB9i", inputs, rng.choice((3, 3, 16)), grid, 0, *[65536, 0, 0, 0] * 2, 65536
    )
    kind = rng.randrange(3)
    stored = min(3 * grid**channels, rng.choice((0, 1000, 3 << 20)))
    if kind == 0:
        return b"mft1\0\0\0\0" + head + rng.randbytes(256 * (channels + 3) + stored)
    if kind == 1:
        entries = rng.choice((2, 256, 4096, 65535))
        body = struct.pack(">HH", entries, entries) + rng.randbytes(2 * entries * (channels + 3))
        return b"mft2\0\0\0\0" + head + body + rng.randbytes(2 * stored)
    at = [rng.choice((0, 32, 100)) for _ in range(4)]
    points = bytes([grid] * 16) + bytes([rng.choice((1, 2)), 0, 0, 0])
    offsets = struct.pack(">BBHIIIII", inputs, 3, 0, at[0], at[1], at[2], 200, at[3])
    body = _curve(rng) * 3
    return (
        (b"mAB \0\0\0\0" + offsets + body)[:200].ljust(200, b"\0") + points + rng.randbytes(stored)
    )


def _program(rng: Rng, channels: int) -> bytes:
    """Multi-process elements: the same matrix many times."""
    count = _number(rng, 60_000)
    matrix = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    place = struct.pack(">II", 16 + 8 * count, len(matrix))
    return b"mpet\0\0\0\0" + struct.pack(">HHI", channels, 3, count) + place * count + matrix


def profile(rng: Rng, space: bytes | None = None) -> bytes:
    """An ICC profile of any kind, with tags that share their bytes."""
    space = space or rng.choice((b"RGB ", b"GRAY", b"CMYK", b"Lab ", b"15CL"))
    channels = {b"RGB ": 3, b"GRAY": 1, b"CMYK": 4, b"Lab ": 3}.get(space, 15)
    xyz = b"XYZ \0\0\0\0" + rng.randbytes(12)
    curve = _curve(rng)
    tags = {name: rng.choice((xyz, xyz, curve)) for name in (b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt")}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC", b"kTRC"), curve)
    for name in (b"A2B0", b"A2B1", b"B2A0", b"D2B0", b"D2B1", b"B2D0", b"gamt", b"desc"):
        if rng.random() < 0.4:
            tags[name] = rng.choice((_table, _program))(rng, channels)
    if rng.random() < 0.1:
        tags |= {struct.pack(">I", n): xyz for n in range(_number(rng, 100_000))}
    places: dict[bytes, int] = {}
    first = 132 + 12 * len(tags)
    table, body = bytearray(struct.pack(">I", len(tags))), bytearray()
    for name, tag in tags.items():
        if tag not in places:
            places[tag] = first + len(body)
            body += tag + bytes(-len(tag) % 4)
        table += name + struct.pack(">II", places[tag], len(tag))
    kind = rng.choice((b"mntr", b"mntr", b"scnr", b"prtr", b"spac", b"link", b"nmcl"))
    version = rng.choice((0x02100000, 0x04400000, 0x05000000))
    head = struct.pack(">I4sI", first + len(body), b"lcms", version) + kind + space
    head += rng.choice((b"XYZ ", b"Lab ")) + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    return bytes(head.ljust(128, b"\0") + table + body)


def _with_profile(rng: Rng) -> bytes:
    mode = rng.choice(("RGB", "RGB", "L", "CMYK"))
    space = {"RGB": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK"}[mode]
    icc_profile = profile(rng, rng.choice((space, space, None)))
    formats = ("JPEG", "TIFF") if mode == "CMYK" else ("JPEG", "TIFF", "PNG", "WEBP")
    image = Image.new(mode, (rng.choice((16, 700)), 16))
    return save(image, rng.choice(formats), icc_profile=icc_profile[: 8 << 20])


# ---- TIFF ----------------------------------------------------------------------------------------


def _directory(rng: Rng, fields: list[tuple[int, int, int, bytes]], data: bytes) -> bytes:
    """A TIFF of fields, given as tag, type, count and values; ``data`` starts at byte 16."""
    order, big = rng.choice("<>"), rng.random() < 0.2
    if big:
        head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HHH", 43, 8, 0)
    else:
        head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 42)
    width = 8 if big else 4
    # Values first, so that the directory's place is known: it is the last thing in the file.
    after, entries = bytearray(), []
    for tag, kind, count, little in fields:
        values = little
        size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}[kind]
        if order == ">" and size in (2, 4, 8) and kind != 5:
            values = np.frombuffer(little, dtype=f"<u{size}").astype(f">u{size}").tobytes()
        if count * size <= width and len(values) <= width:
            stored = values.ljust(width, b"\0")
        else:
            stored = struct.pack(f"{order}{'Q' if big else 'I'}", 16 + len(data) + len(after))
            after += values + bytes(len(values) % 2)
        entries.append(struct.pack(f"{order}HH{'Q' if big else 'I'}", tag, kind, count) + stored)
    start = 16 + len(data) + len(after)
    head += struct.pack(f"{order}{'Q' if big else 'I'}", start)
    count_of = struct.pack(f"{order}{'Q' if big else 'H'}", len(entries) & 0xFFFF)
    return head.ljust(16, b"\0") + data + bytes(after) + count_of + b"".join(entries) + bytes(8)


def _strip_data(rng: Rng, compression: int, size: int) -> bytes:
    """Data of one strip that unpacks to about ``size`` bytes, or pretends to."""
    size = min(size, 4 * MAX_PIXELS)
    if compression in (8, 32946):
        return _deflated(rng, size)
    if compression == 50000:
        blocks = [struct.pack("<I", 1 << 1 | (1 << 17) << 3)[:3] + b"\0"] * (size >> 17)
        window = rng.choice((0, 0x50, 0xA8))  # 1 KiB to 2 GiB
        return struct.pack("<IBB", 0xFD2FB528, 0, window) + b"".join(blocks) + b"\1\0\0"
    if compression == 34925:
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": rng.choice((4096, 1 << 20))}]
        data = lzma.compress(bytes(min(size, 1 << 22)), filters=filters)
        # The size of its dictionary, up to 4 GiB: the block's header has no valid checksum then.
        return data[:20] + bytes([rng.choice((data[20], 40))]) + data[21:]
    if compression == 32773:
        return rng.choice((b"\x81\0", b"\x80")) * min(size // 128 + 1, 4 << 20)
    if compression == 5:
        return rng.choice((b"\x80\0", b"\x80\x40\x20\x10\x08\x04\x02\x01\x00")) * min(
            size // 4096 + 1, 1 << 20
        )
    if compression in (6, 7):
        return scans(rng)
    if compression == 50001:
        return save(Image.new("RGB", (rng.choice((16, 4096)), 16)), "WEBP", lossless=True)
    return rng.choice((b"\xff", b"\0", rng.randbytes(64))) * _number(rng, 1 << 20)


# Photometric interpretation, samples of a pixel, and bits of a sample.
_TIFF_PIXELS: Final = (
    (0, 1, 8),
    (1, 1, 1),
    (1, 1, 16),
    (1, 1, 32),
    (2, 3, 8),
    (2, 3, 16),
    (2, 4, 8),
    (2, 4, 16),
    (3, 1, 8),
    (5, 4, 8),
    (5, 4, 16),
    (6, 3, 8),
    (8, 3, 8),
)


def _tiff(rng: Rng) -> bytes:
    width, height = _sides(rng)
    compression = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000, 50001, 32809))
    photometric, samples_per_pixel, bits = rng.choice(_TIFF_PIXELS)
    if compression in (2, 3, 4):
        photometric, samples_per_pixel, bits = 0, 1, 1
    if rng.random() < 0.2:
        photometric, samples_per_pixel = rng.choice((0, 2, 6)), rng.choice((1, 3, 6, 500))
    tiled = rng.random() < 0.5
    down = min(height, _number(rng, 1 << 17)), _number(rng, 1 << 17)
    tile_height, tile_width = (down[1], _number(rng, 1 << 17)) if tiled else (down[0], width)
    parts = -(-height // tile_height) * -(-width // tile_width)
    count = min(rng.choice((parts, parts, 1, 70_000)), 200_000)
    each = tile_height * tile_width * bits * samples_per_pixel // 8
    data = _strip_data(rng, compression, each)[: 12 << 20]
    sizes = rng.choice((len(data), len(data), 0, 2**31, 10))
    starts = np.full(count, 16, dtype="<u4").tobytes()
    counts = np.full(count, sizes, dtype="<u4").tobytes()

    def short(tag: int, *values: int) -> tuple[int, int, int, bytes]:
        stored = struct.pack(f"<{len(values)}H", *(value & 0xFFFF for value in values))
        return tag, 3, len(values), stored

    def long(tag: int, value: int) -> tuple[int, int, int, bytes]:
        return tag, 4, 1, struct.pack("<I", value)

    fields = [long(256, width), long(257, height), short(258, *[bits] * min(samples_per_pixel, 6))]
    fields += [short(259, compression), short(262, photometric), short(277, samples_per_pixel)]
    fields += [short(284, rng.choice((1, 1, 2))), short(317, rng.choice((1, 2, 3)))]
    if tiled:
        fields += [long(322, tile_width), long(323, tile_height)]
        fields += [(324, 4, count, starts), (325, 4, count, counts)]
    else:
        fields += [(273, 4, count, starts), long(278, tile_height)]
        if rng.random() < 0.8:
            fields.append((279, 4, count, counts))
    if photometric == 3:
        fields.append((320, 3, 768, bytes(1536)))
    if samples_per_pixel > 3 and photometric == 2:
        fields.append(short(338, rng.choice((0, 1, 2))))
    if rng.random() < 0.2:
        fields.append(long(rng.choice((256, 257, 258, 322)), _number(rng, 1 << 30)))
    if rng.random() < 0.1:
        # Numbers of two numbers each, and bytes that several fields share.
        fields.append((rng.choice((282, 283, 270, 34665, 9999)), 5, 200_000, bytes(1_600_000)))
    if rng.random() < 0.1:
        fields += [(40_000 + nth, 7, 1 << 20, b"\0" * 8) for nth in range(_number(rng, 5000))]
    return _directory(rng, sorted(fields, key=lambda field: field[0]), data)


# ---- JPEG ----------------------------------------------------------------------------------------


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _scan(components: list[int], start: int, end: int, high: int, low: int) -> bytes:
    chosen = b"".join(bytes([one, 0]) for one in components)
    return _segment(0xDA, bytes([len(components)]) + chosen + bytes([start, end, high << 4 | low]))


def scans(rng: Rng) -> bytes:
    """A JPEG of many scans over many blocks, almost without data."""
    width, height = _sides(rng, 65_500)
    frame = rng.choice((0xC0, 0xC1, 0xC2, 0xC2, 0xC2, 0xC3, 0xC9, 0xCA, 0xCA))
    factors: tuple[int, ...] = rng.choice(
        ((0x11,), (0x11,) * 3, (0x22, 0x11, 0x11), (0x41, 0x41, 0x11))
    )
    if rng.random() < 0.3:
        factors = tuple(rng.choice((1, 2, 3, 4)) << 4 | rng.choice((1, 2, 4)) for _ in range(4))
    components = list(range(1, len(factors) + 1))
    sampling = b"".join(
        bytes([one, each, 0]) for one, each in zip(components, factors, strict=True)
    )
    out = bytearray(b"\xff\xd8" + _segment(0xDB, b"\0" + b"\1" * 64))
    out += _segment(frame, struct.pack(">BHHB", 8, height, width, len(factors)) + sampling)
    out += _segment(0xC4, b"\0\1" + bytes(16))
    out += _segment(0xC4, b"\x10\1\1" + bytes(14) + b"\xe0\0")
    if rng.random() < 0.2:
        out += _segment(0xDD, struct.pack(">H", _number(rng, 65_535)))
    progressive = frame in (0xC2, 0xCA)
    data = rng.choice((b"", b"\0", b"\x7f\xff\0\xff\0", rng.randbytes(40).replace(b"\xff", b"")))
    out += _scan(components, 0, 0 if progressive else 63, 0, int(progressive)) + data
    spectral = [1], 1, 63
    again = {
        0: _scan(components, 0, 0, 1, 0),
        1: _scan(*spectral, 0, 1),
        2: _scan(*spectral, 1, 0),
        3: _scan([1], 0, 63, 0, 0),
    }[rng.randrange(4)] + data
    between = _segment(0xFE, b"") * rng.choice((0, 0, 3)) + _segment(0xC4, b"\0\1" + bytes(16))
    if rng.random() < 0.8:
        between = b""
    count = rng.choice((1, 10, _number(rng, 300_000)))
    out += (between + again) * min(count, (MAX_BYTES - len(out)) // len(between + again))
    return bytes(out + b"\xff\xd9")


# ---- PNG, GIF, WebP, BMP -------------------------------------------------------------------------


def _png(rng: Rng) -> bytes:
    width, height = _sides(rng)
    depth, color = rng.choice(((8, 2), (8, 2), (8, 6), (16, 6), (16, 0), (1, 0), (8, 3), (16, 4)))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    rows = height * (1 + width * channels * depth // 8)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, rng.choice((0, 0, 0, 1)))
    pixels = _deflated(rng, rows)
    extra: list[bytes] = []
    if color == 3:
        extra.append(chunk(b"PLTE", rng.randbytes(768)))
        extra.append(chunk(b"tRNS", rng.randbytes(256)))
    kind = rng.randrange(8)
    if kind == 0:
        extra += [chunk(rng.choice((b"prVt", b"tIME", b"gAMA")), b"")] * _number(rng, 300_000)
    elif kind == 1:
        text = rng.choice((b"zTXt", b"iCCP")), b"k\0\0" + _zeros(1 << rng.randrange(20, 29))
        extra += [chunk(*text)] * _number(rng, 100)
    elif kind == 2:
        extra += [chunk(b"iTXt", b"k\0\1\0\0\0" + _zeros(1 << 24))] * _number(rng, 100)
    elif kind == 3:
        extra.append(chunk(b"eXIf", _exif(rng)))
    elif kind == 4:
        extra.append(chunk(b"acTL", struct.pack(">II", 1 << 20, 0)))
        frame = struct.pack(">IIIIIHHBB", 0, width, height, 0, 0, 1, 1, 0, 0)
        extra += [chunk(b"fcTL", frame)] * _number(rng, 10_000)
    elif kind == 5:
        extra.append(chunk(b"iCCP", b"k\0\0" + zlib.compress(profile(rng), 1)))
    step = rng.choice((len(pixels), 1, 100, 8192))
    step = max(step, len(pixels) // 300_000, 1)
    parts = [pixels[at : at + step] for at in range(0, len(pixels), step)]
    parts += [b""] * rng.choice((0, 0, 0, 300_000))
    whole = b"".join((*extra, *(chunk(b"IDAT", part) for part in parts)))
    return PNG_SIGNATURE + chunk(b"IHDR", header) + whole + chunk(b"IEND", b"")


def _gif(rng: Rng) -> bytes:
    width, height = (min(side, 65_535) for side in _sides(rng))
    out = bytearray(b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + bytes(768))
    kind = rng.randrange(4)
    if kind == 0:
        out += (b"!" + bytes([rng.choice((0xF9, 0xFE, 0xFF, 1))]) + b"\1x\0") * _number(
            rng, 300_000
        )
    elif kind == 1:
        out += b"!\xfe" + b"\1x" * _number(rng, 1_000_000) + b"\0"
    elif kind == 2:
        out += b"!\xf9\4" + bytes([rng.randrange(32), 0, 0, rng.randrange(256)]) + b"\0"
    left, top = (rng.choice((0, 0, 1000, 65_535)) for _ in range(2))
    frame = struct.pack("<HHHHB", left, top, width, height, rng.choice((0, 0x40, 0x87)))
    # The clear code and one colour, again and again; or codes of ever longer runs.
    codes = rng.choice((b"\0\3\4", b"\0\1\4\x18\x50\xc0\x81\3\x11\x44\xb0", rng.randbytes(255)))
    codes *= _number(rng, 1_000_000) // len(codes) + 1
    size = rng.choice((1, 8, 255))
    blocks = b"".join(
        bytes([len(codes[at : at + size])]) + codes[at : at + size]
        for at in range(0, min(len(codes), 400_000 * size), size)
    )
    picture = b"," + frame + bytes([rng.choice((8, 2, 11))]) + blocks + b"\0"
    return bytes(out + picture * rng.choice((1, 1, 3)) + b";")


def _webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


@lru_cache(maxsize=8)
def _webp_bits(width: int, height: int, lossless: bool) -> bytes:
    """The chunk of a picture of one colour."""
    image = Image.new("RGB", (width, height), (9, 99, 199))
    return save(image, "WEBP", lossless=lossless, method=0)[12:]


def _webp(rng: Rng) -> bytes:
    side = rng.choice(((16, 16), (16, 16), (16383, 3900), (8000, 8000), (3900, 16383)))
    bits = _webp_bits(*side, rng.random() < 0.5)
    width, height = rng.choice((side, side, _sides(rng, 1 << 24)))
    frames = rng.choice((0, 0, 1, 100, _number(rng, 100_000)))
    sizes = b"".join((one - 1).to_bytes(3, "little") for one in (width, height))
    flags = (
        (2 if frames else 0)
        | (0x20 if rng.random() < 0.5 else 0)
        | (8 if rng.random() < 0.5 else 0)
    )
    parts = [_webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sizes)]
    if flags & 0x20:
        parts.append(_webp_chunk(b"ICCP", profile(rng)))
    if frames:
        frame_sizes = b"".join((one - 1).to_bytes(3, "little") for one in side)
        frame = _webp_chunk(b"ANMF", bytes(6) + frame_sizes + b"\1\0\0\0" + bits)
        parts.append(_webp_chunk(b"ANIM", bytes(6)))
        parts += [frame] * min(frames, MAX_BYTES // len(frame))
    else:
        parts.append(bits)
    if flags & 8:
        parts.append(_webp_chunk(b"EXIF", _exif(rng)))
    if rng.random() < 0.2:
        parts += [_webp_chunk(b"xxxx", b"")] * _number(rng, 1_000_000)
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


def _bmp(rng: Rng) -> bytes:
    width, height = _sides(rng)
    bits = rng.choice((1, 4, 8, 16, 24, 32, 2, 64))
    compression = rng.choice((0, 0, 0, 1, 2, 3, 6))
    size = rng.choice((12, 40, 52, 56, 64, 108, 124))
    height = rng.choice((height, -height))
    if size == 12:
        head = struct.pack("<IHHHH", 12, width & 0xFFFF, abs(height) & 0xFFFF, 1, bits)
    else:
        colors = rng.choice((0, 256, 2**31))
        head = struct.pack(
            "<IiiHHIIiiII", size, width, height, 1, bits, compression, 0, 1, 1, colors, 0
        )
    head = head.ljust(size, b"\xff") + bytes(1024)
    rows = -(-width * bits // 32) * 4 * abs(height)
    body = rng.choice((b"\0", b"\1\2", b"\xff\1")) * (min(rows, _number(rng, MAX_BYTES)) // 2)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(head)) + head + body


def _exif(rng: Rng) -> bytes:
    """A block of fields that share their bytes, or of numbers that are objects in Python."""
    kind, count, size = rng.choice(((7, 1 << 20, 1), (5, 100_000, 8), (3, 500_000, 2), (13, 9, 4)))
    entries = _number(rng, 3000)
    tags = [274, 282, 283, 34665, 34853, *range(40_000, 40_000 + entries)]
    body = b"".join(struct.pack("<HHII", tag, kind, count, 10 + 12 * len(tags)) for tag in tags)
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body
    return block + bytes(min(count * size, 4 << 20))


def _with_exif(rng: Rng) -> bytes:
    block = b"Exif\0\0" + _exif(rng)
    if rng.random() < 0.5:
        return save(Image.new("RGB", (16, 16)), rng.choice(("WEBP", "PNG")), exif=block)
    jpeg = save(Image.new("RGB", (16, 16)), "JPEG")
    pieces = [block[6 + at : 6 + at + 60_000] for at in range(0, len(block), 60_000)]
    segments = b"".join(_segment(0xE1, b"Exif\0\0" + piece) for piece in pieces)
    more = rng.choice(
        (b"", _segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 9000), _segment(0xFE, b""))
    )
    return jpeg[:2] + segments + more * _number(rng, 10_000) + jpeg[2:]


def _mixture(rng: Rng) -> bytes:
    """Two other files, cut, joined and damaged."""
    kinds = [make for name, make in _KINDS.items() if name != "mixture"]
    data = bytearray(rng.choice(kinds)(rng))
    other = rng.choice((rng.choice(kinds)(rng), rng.choice(list(samples().values()))))
    if rng.random() < 0.5:
        data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    for _ in range(rng.randrange(6)):
        place = rng.randrange(min(len(data), 300))
        layout = rng.choice(("B", "<H", ">H", "<I", ">I"))
        number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
        packed = struct.pack(layout, number % 256 ** struct.calcsize(layout))
        data[place : place + len(packed)] = packed
    return bytes(data)


_KINDS: Final[dict[str, Callable[[Rng], bytes]]] = {
    "profile": _with_profile,
    "tiff": _tiff,
    "tiff again": _tiff,
    "scans": scans,
    "png": _png,
    "gif": _gif,
    "webp": _webp,
    "bmp": _bmp,
    "exif": _with_exif,
    "mixture": _mixture,
}


# ---- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a file, and what decoding it took beside what the process had before."""

    name: str
    file_bytes: int
    result: str
    cpu_s: float
    peak_bytes: int
    announced_bytes: int

    @property
    def failed(self) -> bool:
        """Whether it took too much, more than announced, or ended its process."""
        lost = self.result.startswith("ended")
        more = self.peak_bytes > max(self.announced_bytes, 64 << 20)
        return lost or more or self.cpu_s > CPU_S or self.peak_bytes > PEAK_BYTES


def decode_apart(one: Case, needed_side: int | None) -> Outcome:
    """Decode a file in a process of its own, which a signal ends after 30 s of CPU time."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        signal.setitimer(signal.ITIMER_PROF, 30)
        os.write(writer, _decode(one.data, needed_side).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode()
    _, status, usage = os.wait4(pid, 0)
    result, announced, peak = answer.split("|") if answer else ("", "0", "0")
    if status:
        result = f"ended with {signal.Signals(status & 127).name}"
    cpu_s = usage.ru_utime + usage.ru_stime
    return Outcome(one.name, len(one.data), result, cpu_s, int(peak), int(announced))


def _decode(data: bytes, needed_side: int | None) -> str:
    before = _peak_bytes(reset=True)
    announced, result = 0, "decoded"
    try:
        header = decoding.inspect(data, MAX_PIXELS)
        announced = header.bytes_needed(needed_side) + WORKING_BYTES
        decoding.decode_inspected(header, needed_side)
    except ImageError as exc:
        result = type(exc).__name__
    return f"{result}|{announced}|{_peak_bytes() - before}"


def _peak_bytes(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.images", description=__doc__)
    parser.add_argument("--cases", type=int, default=3000, help="files (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--only", help="one file again, as SEED:N")
    parser.add_argument("--keep", type=Path, help="folder for the files that fail")
    given = parser.parse_args()
    decoding.keep_readers_quiet()
    decoding.decode(save(Image.new("CMYK", (64, 64)), "TIFF"), MAX_PIXELS)  # loads everything
    if given.only:
        seed, nth = map(int, given.only.split(":"))
        chosen = iter([case(seed, nth)])
    else:
        chosen = cases(given.seed, given.cases)
    outcomes: list[Outcome] = []
    for nth, one in enumerate(chosen):
        outcome = decode_apart(one, 512 if nth % 2 else None)
        outcomes.append(outcome)
        if outcome.failed:
            print(_line(outcome), flush=True)
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / one.name.replace(" ", "-")).write_bytes(one.data)
    print(dict(Counter(outcome.result for outcome in outcomes).most_common()))
    for title, key in _RANKINGS.items():
        print(f"{title}:")
        for outcome in sorted(outcomes, key=key, reverse=True)[:5]:
            print(f"  {_line(outcome)}")
    return int(any(outcome.failed for outcome in outcomes))


_RANKINGS: Final[dict[str, Callable[[Outcome], float]]] = {
    "most CPU time": lambda outcome: outcome.cpu_s,
    "most memory": lambda outcome: outcome.peak_bytes,
    "most memory beside what was announced": lambda outcome: (
        outcome.peak_bytes - outcome.announced_bytes
    ),
}


def _line(outcome: Outcome) -> str:
    return (
        f"{outcome.name}: {outcome.file_bytes:,} bytes, {outcome.cpu_s:.2f} s, "
        f"{outcome.peak_bytes >> 20} MiB of {outcome.announced_bytes >> 20}, {outcome.result}"
    )


if __name__ == "__main__":
    sys.exit(main())
