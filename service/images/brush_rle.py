"""Masks as Label Studio's brush regions: run lengths of an RGBA image, packed into bits.

The stream, most significant bit first, has a header: 32 bits for the number of values, 5 bits for
the size of a value in bits minus one, and four times 4 bits for the sizes of a length minus one.
Each run has a set bit, 2 bits that choose one of the four sizes, the length minus one, and the
value. Source: rle-pack, https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack, which
Label Studio decodes with.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from service.images.runs import check_runs

CHANNELS: Final = 4
_VALUE_BITS: Final = 8
_LENGTH_BITS: Final = (3, 4, 8, 16)
_LONGEST: Final = 1 << _LENGTH_BITS[-1]

_RUNS_AT_ONCE: Final = 1 << 16
"""Runs packed at once: their bits take a few MiB, at one byte per bit."""


@dataclass(frozen=True, slots=True)
class RowRuns:
    """A mask's runs of equal class ids along its rows; a run may continue in the next row.

    ``lengths``: ``(n,) int64`` pixels; ``ids``: ``(n,) uint8``.
    """

    lengths: npt.NDArray[np.int64]
    ids: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> Self:
        """Find the runs of a ``(H, W) uint8`` mask.

        Raises `TooExpensive` if there are more than `service.images.runs.MAX_RUNS`.
        """
        pixels = mask.reshape(-1)
        changes = pixels[1:] != pixels[:-1]
        check_runs(int(np.count_nonzero(changes)) + 1)
        starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
        return cls(np.diff(starts, append=pixels.size), pixels[starts])

    def counts(self) -> npt.NDArray[np.float64]:
        """Return the pixels of each class, ``(256,) float64`` indexed by class id."""
        return np.bincount(self.ids, self.lengths, minlength=256).astype(np.float64)

    def brush(self, class_ids: Collection[int]) -> bytes:
        """Encode the pixels of these classes as one brush region: 255 in all channels, else 0."""
        chosen = np.zeros(256, dtype=bool)
        chosen[list(class_ids)] = True
        inside = chosen[self.ids]
        # Neighbouring runs merge where all are chosen or none is.
        first = np.concatenate(([0], np.flatnonzero(inside[1:] != inside[:-1]) + 1))
        lengths = np.add.reduceat(self.lengths, first) * CHANNELS
        return _pack(lengths, inside[first] * np.uint8(255))


def _pack(lengths: npt.NDArray[np.int64], values: npt.NDArray[np.uint8]) -> bytes:
    """Pack runs ``(n,)`` of values in [0, 255] as rle-pack's stream."""
    header = _VALUE_BITS - 1
    for length_size in _LENGTH_BITS:
        header = header << 4 | (length_size - 1)
    total = int(lengths.sum())
    # 32 + 5 + 16 bits: the first run starts in the last three bits of the seventh byte.
    stream = struct.pack(">I", total) + (header << 3).to_bytes(3, "big")
    packed = [stream[:-1]]
    carried = np.unpackbits(np.frombuffer(stream[-1:], dtype=np.uint8))[:5]
    for start in range(0, len(lengths), _RUNS_AT_ONCE):
        part = slice(start, start + _RUNS_AT_ONCE)
        bits = np.concatenate((carried, _bits(*_codes(lengths[part], values[part]))))
        whole = len(bits) // 8 * 8
        packed.append(np.packbits(bits[:whole]).tobytes())
        carried = bits[whole:]
    return b"".join([*packed, np.packbits(carried).tobytes()])


def _codes(
    lengths: npt.NDArray[np.int64], values: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return runs as codes, and each code's bits; runs that are too long are split."""
    parts = -(-lengths // _LONGEST)
    last = np.cumsum(parts) - 1
    rest = lengths - (parts - 1) * _LONGEST
    values = values.repeat(parts)
    lengths = np.full(len(values), _LONGEST)
    lengths[last] = rest
    sizes = np.searchsorted(1 << np.array(_LENGTH_BITS), lengths)
    length_bits = np.array(_LENGTH_BITS)[sizes]
    codes = (4 + sizes) << length_bits | (lengths - 1)
    return codes << _VALUE_BITS | values, 3 + length_bits + _VALUE_BITS


def _bits(codes: npt.NDArray[np.int64], code_bits: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Write codes ``(n,)``, each with its own number of bits, as one ``uint8`` per bit."""
    ends = np.cumsum(code_bits)
    shifts = ends.repeat(code_bits) - 1 - np.arange(ends[-1])
    bits: npt.NDArray[np.uint8] = (codes.repeat(code_bits) >> shifts & 1).astype(np.uint8)
    return bits
