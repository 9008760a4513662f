"""Masks as Label Studio's brush regions: run lengths of an RGBA image, packed into bits.

The stream, most significant bit first: 32 bits for the number of values, 5 bits for a value's bits
less one, four times 4 bits for the bits of a length less one; then for each run a set bit, 2 bits
for which of the four lengths' sizes follows, the length less one, and the value. Source: rle-pack,
https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack, which Label Studio decodes with.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

CHANNELS: Final = 4
_VALUE_BITS: Final = 8
_LENGTH_BITS: Final = (3, 4, 8, 16)
_LONGEST: Final = 1 << _LENGTH_BITS[-1]

_RUNS_AT_ONCE: Final = 1 << 16
"""Runs packed at once: their bits take a few MiB, one byte each."""


@dataclass(frozen=True, slots=True)
class RowRuns:
    """A mask's runs of equal class ids along its rows, from one row into the next.

    ``lengths``: ``(n,) int64`` pixels; ``ids``: ``(n,) uint8``.
    """

    lengths: npt.NDArray[np.int64]
    ids: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> Self:
        """Find the runs of a ``(H, W) uint8`` mask."""
        pixels = mask.reshape(-1)
        starts = np.concatenate(([0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1))
        return cls(np.diff(starts, append=pixels.size), pixels[starts])

    def counts(self) -> npt.NDArray[np.float64]:
        """Pixels of each class, ``(256,) float64`` indexed by class id."""
        return np.bincount(self.ids, self.lengths, minlength=256).astype(np.float64)

    def brush(self, class_ids: Collection[int]) -> bytes:
        """The pixels of these classes as one brush region: 255 in all channels, 0 elsewhere."""
        chosen = np.zeros(256, dtype=bool)
        chosen[list(class_ids)] = True
        inside = chosen[self.ids]
        # Neighbouring runs of classes that are all chosen, or all not, are one.
        first = np.concatenate(([0], np.flatnonzero(inside[1:] != inside[:-1]) + 1))
        lengths = np.add.reduceat(self.lengths, first) * CHANNELS
        return _pack(lengths, np.where(inside[first], 255, 0))


def _pack(lengths: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> bytes:
    """Runs ``(n,)`` of values in [0, 255] as rle-pack's stream."""
    parts = -(-lengths // _LONGEST)
    last = np.cumsum(parts) - 1
    rest = lengths - (parts - 1) * _LONGEST
    values = values.repeat(parts)
    lengths = np.full(len(values), _LONGEST)
    lengths[last] = rest

    sizes = np.searchsorted(1 << np.array(_LENGTH_BITS), lengths)
    length_bits = np.array(_LENGTH_BITS)[sizes]
    codes = (4 + sizes) << length_bits | (lengths - 1)
    codes = codes << _VALUE_BITS | values
    code_bits = 3 + length_bits + _VALUE_BITS

    header = _VALUE_BITS - 1
    for length_size in _LENGTH_BITS:
        header = header << 4 | (length_size - 1)
    total = int(lengths.sum())
    # 32 + 5 + 16 bits: the last three bits of the seventh byte are the first run's.
    stream = struct.pack(">I", total) + (header << 3).to_bytes(3, "big")
    packed = [stream[:-1]]
    carried = np.unpackbits(np.frombuffer(stream[-1:], dtype=np.uint8))[:5]
    for start in range(0, len(codes), _RUNS_AT_ONCE):
        part = slice(start, start + _RUNS_AT_ONCE)
        bits = np.concatenate((carried, _bits(codes[part], code_bits[part])))
        whole = len(bits) // 8 * 8
        packed.append(np.packbits(bits[:whole]).tobytes())
        carried = bits[whole:]
    return b"".join([*packed, np.packbits(carried).tobytes()])


def _bits(codes: npt.NDArray[np.int64], code_bits: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Codes ``(n,)``, each of its own number of bits, one after the other: one ``uint8`` a bit."""
    ends = np.cumsum(code_bits)
    shifts = ends.repeat(code_bits) - 1 - np.arange(ends[-1])
    bits: npt.NDArray[np.uint8] = (codes.repeat(code_bits) >> shifts & 1).astype(np.uint8)
    return bits
