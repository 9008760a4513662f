"""Directories of TIFF files and EXIF blocks: fields by tag, without reading what they point at.

Source: TIFF 6.0, section 2; BigTIFF, https://www.awaresystems.be/imaging/tiff/bigtiff.html.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from service.errors import TooExpensive

MAX_FIELDS: Final = 4096
"""Largest number of fields of a directory. Programs write a few dozen."""

_SUBFILE: Final = 254
_OLD_SUBFILE: Final = 255
PHOTOMETRIC: Final = 262
_CHILDREN: Final = 330
_DNG_VERSION: Final = 50706
# Canon's CR2, and Phase One's IIQ in both byte orders.
_RAW_MARKS: Final = frozenset({b"CR\x02\0", b"IIII", b"MMMM"})
# Photometric interpretations of a sensor's samples: with a colour filter, and without.
_SENSOR: Final = frozenset({32803, 34892})

MAX_CHILDREN: Final = 8
"""Most directories below a directory that are read."""

ORIENTATION: Final = 0x0112

_VALUE_BYTES: Final = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
}
_VALUE_BYTES_BIG: Final = {**_VALUE_BYTES, 16: 8, 17: 8, 18: 8}
_UNSIGNED: Final = {1: "B", 3: "H", 4: "I", 16: "Q"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field as stored.

    ``kind``: its type's number; ``count``: its number of values; ``place``: where its values start
    in the file; ``entry``: its bytes in the directory.
    """

    kind: int
    count: int
    place: int
    entry: bytes


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory of a file.

    ``order``: ``<`` or ``>``, as in `struct`; ``big``: whether it is a BigTIFF; ``has_next``:
    whether another one follows, of another picture. If a tag is
    repeated, its first field counts, as in libtiff.
    """

    data: bytes
    order: str
    big: bool
    fields: dict[int, Field]
    has_next: bool = False

    @classmethod
    def of(cls, data: bytes, start: int | None = None) -> Self:
        """Read the first directory, or the one at ``start``.

        Raises `TooExpensive` if it has too many fields, `struct.error` if it is truncated.
        """
        order = "<" if data.startswith(b"II") else ">"
        big = b"+" in data[2:4]
        counts, entry = struct.Struct(f"{order}{'Q' if big else 'H'}"), _entry_layout(order, big)
        if start is None:
            (start,) = struct.unpack_from(f"{order}{'8xQ' if big else '4xI'}", data)
        start = min(start, len(data))  # such places may not fit into an index
        (count,) = counts.unpack_from(data, start)
        if count > MAX_FIELDS:
            raise TooExpensive(f"the image has more than {MAX_FIELDS} fields of metadata")
        fields: dict[int, Field] = {}
        first = start + counts.size
        for place in range(first, first + count * entry.size, entry.size):
            tag, kind, values = entry.unpack_from(data, place)
            inline = 8 if big else 4
            at = place + entry.size - inline
            if values * _VALUE_BYTES_BIG.get(kind, 1) > inline:
                (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, at)
            stored = data[place : place + entry.size]
            fields.setdefault(tag, Field(kind, values, min(at, len(data)), stored))
        end = first + count * entry.size
        return cls(data, order, big, fields, any(data[end : end + (8 if big else 4)]))

    def children(self) -> list[Self]:
        """Return the directories of other pictures of this one, at most `MAX_CHILDREN`.

        Those that cannot be read are left out. Raises `TooExpensive` as `of` does.
        """
        found = []
        for start in self._starts():
            with suppress(struct.error):
                found.append(type(self).of(self.data, start))
        return found

    def _starts(self) -> list[int]:
        field = self.fields.get(_CHILDREN)
        if field is None:
            return []
        # Type 13 is a pointer to a directory, and 18 its form in a BigTIFF.
        kind = np.dtype(self.order + ("Q" if field.kind in (16, 18) else "I"))
        most = min(field.count, MAX_CHILDREN) * kind.itemsize
        stored = self.data[field.place : field.place + most]
        whole = stored[: len(stored) // kind.itemsize * kind.itemsize]
        return [int(start) for start in np.frombuffer(whole, kind)]

    def numbers(self, tag: int, most: int) -> npt.NDArray[np.int64]:
        """Return a field's values, ``(n,) int64``, without those past the end of the file.

        They are empty if there is no such field or its values are no unsigned integers. Raises
        `TooExpensive` if it has more than ``most`` values.
        """
        field = self.fields.get(tag)
        if field is None or field.kind not in _UNSIGNED:
            return np.empty(0, dtype=np.int64)
        if field.count > most:
            raise TooExpensive(f"the image has more than {most} values in field {tag}")
        kind = np.dtype(self.order + _UNSIGNED[field.kind])
        stored = self.data[field.place : field.place + field.count * kind.itemsize]
        values = np.frombuffer(stored[: len(stored) // kind.itemsize * kind.itemsize], dtype=kind)
        # No file has more bytes than that.
        return values.clip(max=2**32 - 1).astype(np.int64)

    def number(self, tag: int, otherwise: int) -> int:
        """Return a field's first value, ``otherwise`` if it has none."""
        field = self.fields.get(tag)
        if field is None or field.kind not in _UNSIGNED:
            return otherwise
        try:
            layout = self.order + _UNSIGNED[field.kind]
            (value,) = struct.unpack_from(layout, self.data, field.place)
        except struct.error:
            return otherwise
        return int(value)

    def bytes_of(self, tag: int, most: int) -> bytes:
        """Return a field's values as stored; nothing if there is none or more than ``most``."""
        field = self.fields.get(tag)
        if field is None:
            return b""
        size = field.count * _VALUE_BYTES_BIG.get(field.kind, 1)
        return self.data[field.place : field.place + size] if size <= most else b""

    def with_number(self, tag: int, value: int) -> Self:
        """Return the directory with one number of 16 bits in the place of a field's values."""
        layout = f"{self.order}{'HHQH6x' if self.big else 'HHIH2x'}"
        entry = struct.pack(layout, tag, 3, 1, value)
        return replace(self, fields={**self.fields, tag: Field(3, 1, 0, entry)})

    def with_only(self, tags: frozenset[int]) -> bytes:
        """Return the file with a directory of these tags alone, and no second directory."""
        entries = [field.entry for tag, field in sorted(self.fields.items()) if tag in tags]
        padding = bytes(-len(self.data) % 8)
        start = len(self.data) + len(padding)
        header = self.data[:8] if self.big else self.data[:4]
        pointer, counts = ("Q", "Q") if self.big else ("I", "H")
        header += struct.pack(self.order + pointer, start)
        directory = struct.pack(self.order + counts, len(entries)) + b"".join(entries) + bytes(8)
        return b"".join((header, self.data[len(header) :], padding, directory))


def _entry_layout(order: str, big: bool) -> struct.Struct:
    return struct.Struct(f"{order}{'HHQ8x' if big else 'HHI4x'}")


def is_raw(data: bytes) -> bool:
    """Return whether a TIFF is a camera's RAW file, or begins with a thumbnail as these do.

    DNG, CR2, NEF, ARW, PEF, SRW and more are TIFFs; in most the first picture is a small preview.
    """
    try:
        directory = Directory.of(data)
        pictures = (directory, *directory.children())
    except (TooExpensive, struct.error):
        return False
    reduced = directory.number(_SUBFILE, 0) & 1 or directory.number(_OLD_SUBFILE, 0) == 2
    return (
        _DNG_VERSION in directory.fields
        or data[8:12] in _RAW_MARKS
        or (bool(reduced) and (_CHILDREN in directory.fields or directory.has_next))
        or any(one.number(PHOTOMETRIC, 0) in _SENSOR for one in pictures)
    )


def exif_orientation(block: bytes) -> int:
    """Return an EXIF block's orientation, 1 to 8; 1 if there is none or the block is broken."""
    block = block.removeprefix(b"Exif\0\0")
    try:
        value = Directory.of(block).number(ORIENTATION, 1)
    except (TooExpensive, struct.error):
        return 1
    return value if 1 <= value <= 8 else 1
