"""What the header of a HEIF or AVIF file says: the size, the turns, the profile, the tiles.

Both are boxes of ISO's base media file format. Items are images, or grids of images; properties are
shared by items. Sources: ISO/IEC 14496-12 (boxes), 23008-12 (HEIF), 23000-22 (MIAF), AV1 Image File
Format v1.1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from service.errors import TooExpensive, UndecodableImage
from service.images.profiles import MAX_PROFILE_BYTES

MAX_ITEMS: Final = 4096
"""Largest number of images in a file. A phone's photo of 48 megapixels has 192 tiles."""

MAX_PADDING: Final = 1 << 24
"""Largest number of pixels by which the tiles of a grid may exceed the picture."""

_MAX_STEPS: Final = 1 << 16
_MAX_BRANDS: Final = 64
_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIF"),
}
_CODED: Final = {"AVIF": b"av01", "HEIF": b"hvc1"}

_PROFILES: Final = (b"prof", b"rICC")

# Quarter turns against the clock, and whether then the left and right sides are exchanged
# -> EXIF's orientation, which exchanges first and turns by the clock.
_ORIENTATION: Final = {
    (0, False): 1,
    (1, False): 8,
    (2, False): 3,
    (3, False): 6,
    (0, True): 2,
    (1, True): 7,
    (2, True): 4,
    (3, True): 5,
}


def sniff_brand(data: bytes) -> str | None:
    """Return "AVIF" or "HEIF" if a file begins like one."""
    if data[4:8] != b"ftyp":
        return None
    size = min(int.from_bytes(data[:4]), 16 + 4 * _MAX_BRANDS)
    brands = [data[at : at + 4] for at in (8, *range(16, size, 4))]
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)


@dataclass(slots=True)
class Picture:
    """The picture that a file shows.

    ``coded``: ``(H, W)`` of its pixels; ``size``: of what remains after cropping, before the turns;
    ``orientation``: EXIF's, 1 to 8; ``alpha``: whether it may have transparency.
    """

    coded: tuple[int, int]
    size: tuple[int, int]
    orientation: int
    alpha: bool
    icc_profile: bytes | None


@dataclass(slots=True)
class _Item:
    kind: bytes = b""
    properties: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    extents: list[tuple[int, int, int]] = field(default_factory=list)


def read_picture(data: bytes, image_format: str) -> Picture:
    """Read the picture of a file, as far as its boxes say.

    ``image_format``: "AVIF" or "HEIF". Raises `UndecodableImage`, `TooExpensive`, or, for broken
    data, `struct.error` or `IndexError`.
    """
    return _Meta(data, image_format).picture()


class _Meta:
    """The box ``meta`` of a file."""

    def __init__(self, data: bytes, image_format: str) -> None:
        self._data = data
        self._format = image_format
        self._steps_left = _MAX_STEPS
        self._items: dict[int, _Item] = {}
        self._properties: list[tuple[bytes, int, int]] = []
        self._primary: int | None = None
        self._idat: tuple[int, int] = (0, 0)
        self._alpha = False
        meta = next((span for name, *span in self._boxes(0, len(data)) if name == b"meta"), None)
        if meta is None:
            raise UndecodableImage(f"the {image_format} file has no picture")
        found = {name: (start, end) for name, start, end in self._boxes(meta[0] + 4, meta[1])}
        for name, read in (
            (b"pitm", self._read_primary),
            (b"iinf", self._read_items),
            (b"iloc", self._read_places),
            (b"iref", self._read_references),
            (b"iprp", self._read_properties),
        ):
            if name in found:
                read(*found[name])
        self._idat = found.get(b"idat", (0, 0))

    def picture(self) -> Picture:
        """The primary item, and what it is made of."""
        item = self._items.get(self._primary or 0)
        if item is None:
            raise UndecodableImage(f"the {self._format} file has no picture")
        size = coded = self._size(item)
        if item.kind == b"grid":
            self._check_grid(item, size)
        elif item.kind != _CODED[self._format]:
            raise UndecodableImage(f"{self._format} of this kind is not supported")
        self._check_bytes(item)
        turns, mirrored = 0, False
        profile = None
        for name, start, end in self._of(item):
            if name == b"irot":
                # A turn after an exchange of sides is the opposite turn before it.
                turns += -(self._data[start] & 3) if mirrored else self._data[start] & 3
            elif name == b"imir":
                # Exchanging top and bottom is half a turn and exchanging the sides.
                mirrored = not mirrored
                turns += 2 if not self._data[start] & 1 else 0
            elif name == b"clap":
                size = self._cropped(start, size)
            elif name == b"colr" and self._data[start : start + 4] in _PROFILES:
                profile = self._data[start + 4 : min(end, start + 5 + MAX_PROFILE_BYTES)]
        orientation = _ORIENTATION[turns % 4, mirrored]
        return Picture(coded, size, orientation, self._alpha, profile)

    def _boxes(self, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield the type of each box between two places, and where its content is."""
        while start + 8 <= end:
            self._step()
            size, name = struct.unpack_from(">I4s", self._data, start)
            head = 8
            if size == 1:
                (size,) = struct.unpack_from(">Q", self._data, start + 8)
                head = 16
            last = end if size == 0 else min(start + size, end)
            if last < start + head:
                raise UndecodableImage(f"the {self._format} data is broken")
            yield name, start + head, last
            start = last

    def _step(self, count: int = 1) -> None:
        """Count what is read: sizes of 0 bytes can repeat something for nothing."""
        self._steps_left -= count
        if self._steps_left < 0:
            raise TooExpensive(f"the image has more than {_MAX_STEPS} boxes and entries")

    def _number(self, at: int, size: int) -> int:
        if at + size > len(self._data):
            raise IndexError("the file is too short")
        return int.from_bytes(self._data[at : at + size])

    def _read_primary(self, start: int, _: int) -> None:
        self._primary = self._number(start + 4, 2 if self._data[start] == 0 else 4)

    def _read_items(self, start: int, end: int) -> None:
        first = start + (6 if self._data[start] == 0 else 8)
        for name, at, _ in self._boxes(first, end):
            if name != b"infe" or self._data[at] < 2:
                continue
            wide = 2 if self._data[at] == 2 else 4
            number = self._number(at + 4, wide)
            kind = self._data[at + 6 + wide : at + 10 + wide]
            self._items.setdefault(number, _Item()).kind = kind
        if len(self._items) > MAX_ITEMS:
            raise TooExpensive(f"the image has more than {MAX_ITEMS} parts")

    def _read_places(self, start: int, _: int) -> None:
        version = self._data[start]
        sizes = self._data[start + 4], self._data[start + 5]
        offset_size, length_size = sizes[0] >> 4, sizes[0] & 15
        base_size, index_size = sizes[1] >> 4, sizes[1] & 15 if version else 0
        wide = 4 if version == 2 else 2
        at = start + 6
        count = self._number(at, wide)
        at += wide
        for _ in range(count):
            number = self._number(at, wide)
            at += wide
            method = 0
            if version:
                method = self._number(at, 2) & 15
                at += 2
            base = self._number(at + 2, base_size)
            at += 2 + base_size
            extents = self._number(at, 2)
            at += 2
            self._step(1 + extents)
            item = self._items.get(number)
            for _ in range(extents):
                offset = self._number(at + index_size, offset_size)
                length = self._number(at + index_size + offset_size, length_size)
                at += index_size + offset_size + length_size
                if item is not None:
                    item.extents.append((method, base + offset, length))

    def _read_references(self, start: int, end: int) -> None:
        wide = 2 if self._data[start] == 0 else 4
        for name, at, _ in self._boxes(start + 4, end):
            source, count = self._number(at, wide), self._number(at + wide, 2)
            first = at + wide + 2
            self._step(count)
            targets = [self._number(first + wide * one, wide) for one in range(count)]
            if name == b"dimg" and source in self._items:
                self._items[source].tiles = targets
            elif name == b"auxl" and self._primary in targets:
                # Of a primary item, depth and gain maps too: then memory is counted too high.
                self._alpha = True

    def _read_properties(self, start: int, end: int) -> None:
        for name, first, last in self._boxes(start, end):
            if name == b"ipco":
                self._properties = list(self._boxes(first, last))
            elif name == b"ipma":
                self._read_associations(first)

    def _read_associations(self, start: int) -> None:
        version, wide_index = self._data[start], self._data[start + 3] & 1
        wide = 2 if version == 0 else 4
        count = self._number(start + 4, 4)
        at = start + 8
        for _ in range(count):
            item = self._items.get(self._number(at, wide))
            associated = self._number(at + wide, 1)
            self._step(1 + associated)
            at += wide + 1
            for _ in range(associated):
                index = self._number(at, 1 + wide_index) & (0x7FFF if wide_index else 0x7F)
                at += 1 + wide_index
                if item is not None:
                    item.properties.append(index)

    def _of(self, item: _Item) -> Iterator[tuple[bytes, int, int]]:
        for index in item.properties:
            if 1 <= index <= len(self._properties):
                yield self._properties[index - 1]

    def _size(self, item: _Item) -> tuple[int, int]:
        for name, start, _ in self._of(item):
            if name == b"ispe":
                return self._number(start + 8, 4), self._number(start + 4, 4)
        raise UndecodableImage(f"the {self._format} file does not say how large its picture is")

    def _cropped(self, start: int, size: tuple[int, int]) -> tuple[int, int]:
        """The size after cropping, by a property ``clap``."""
        width, width_parts, height, height_parts = struct.unpack_from(">4I", self._data, start)
        if not width_parts or not height_parts:
            raise UndecodableImage(f"the {self._format} data is broken")
        return min(size[0], height // height_parts), min(size[1], width // width_parts)

    def _check_grid(self, item: _Item, size: tuple[int, int]) -> None:
        """Raise unless the tiles of a grid together are about the picture."""
        method, offset, length = item.extents[0]
        at = offset + (self._idat[0] if method == 1 else 0)
        wide = 4 if self._number(at + 1, 1) & 1 else 2
        rows, columns = self._number(at + 2, 1) + 1, self._number(at + 3, 1) + 1
        width, height = self._number(at + 4, wide), self._number(at + 4 + wide, wide)
        if length < 4 + 2 * wide or (height, width) != size or len(item.tiles) != rows * columns:
            raise UndecodableImage(f"the {self._format} file's grid is broken")
        area = 0
        for number in {*item.tiles}:
            tile = self._items.get(number)
            if tile is None or tile.kind != _CODED[self._format]:
                raise UndecodableImage(f"the {self._format} file's grid is broken")
            self._check_bytes(tile)
            tall, across = self._size(tile)
            area = max(area, tall * across)
        if area * rows * columns > height * width + MAX_PADDING:
            raise TooExpensive("the tiles of the image are far larger than the image")

    def _check_bytes(self, item: _Item) -> None:
        """Raise unless an item's data is in the file once."""
        if sum(length for _, _, length in item.extents) > len(self._data):
            raise UndecodableImage(f"the {self._format} data is broken")
