"""A mask as run lengths: statistics of each class, and COCO's run-length encoding (RLE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from service.errors import TooExpensive

MAX_RUNS: Final = 1 << 22
"""Largest number of runs of a mask. Twenty-one classes of pure noise in each of a network's 256 x
256 cells give 3.3 million at 64 million pixels; photos give some ten thousand."""

_NUMBERS_AT_ONCE: Final = 1 << 16
"""Run lengths that are compressed at once: they take a few MiB."""


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """One class of a mask: its pixels and its bounding box ``(x, y, w, h)`` in pixels."""

    class_id: int
    pixels: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Runs:
    """A mask's runs of equal class ids down its columns, left to right: COCO's order.

    ``starts`` and ``ends``: ``(n,) int64`` pixel positions, end exclusive; ``ids``: ``(n,) uint8``;
    ``size``: ``(height, width)``.
    """

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    ids: npt.NDArray[np.uint8]
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> Self:
        """Find the runs of a ``(H, W) uint8`` mask without transposing it.

        Raises `TooExpensive` if there are more than `MAX_RUNS`.
        """
        height, width = mask.shape
        # Runs start where a pixel differs from the one above it, or from the last column's end.
        changes = mask[1:] != mask[:-1]
        check_runs(int(np.count_nonzero(changes)) + width)
        y, x = np.divmod(np.flatnonzero(changes), width)
        tops = np.flatnonzero(mask[0, 1:] != mask[-1, :-1]) + 1
        starts = np.concatenate(([0], x * height + y + 1, tops * height)).astype(np.int64)
        starts.sort()
        ends = np.append(starts[1:], mask.size)
        x, y = np.divmod(starts, height)
        return cls(starts, ends, mask[y, x], (height, width))

    def statistics(self) -> list[ClassStatistics]:
        """Return the classes present, most pixels first; equal counts by ascending id."""
        lengths = self.ends - self.starts
        found = [
            ClassStatistics(int(index), int(lengths[self.ids == index].sum()), self._bbox(index))
            for index in np.unique(self.ids)
        ]
        return sorted(found, key=lambda one: (-one.pixels, one.class_id))

    def counts(self, class_id: int) -> npt.NDArray[np.int64]:
        """Return COCO's counts of one class: lengths of runs outside, inside, outside, ..."""
        chosen = self.ids == class_id
        bounds = np.stack((self.starts[chosen], self.ends[chosen]), axis=1).ravel()
        total = self.size[0] * self.size[1]
        # COCO writes no empty run at the end.
        after = [] if bounds.size and bounds[-1] == total else [total]
        return np.diff(bounds, prepend=0, append=np.array(after, dtype=np.int64))

    def rle(self, class_id: int) -> str:
        """Return COCO's compressed ``counts`` of one class, as in ``pycocotools.mask.encode``."""
        return compress_counts(self.counts(class_id))

    def _bbox(self, class_id: int) -> tuple[int, int, int, int]:
        height = self.size[0]
        chosen = self.ids == class_id
        first, last = self.starts[chosen], self.ends[chosen] - 1
        left, right = int(first[0]) // height, int(last[-1]) // height
        if np.any(first // height != last // height):
            # A run that wraps from one column into the next touches both the bottom and the top.
            top, bottom = 0, height - 1
        else:
            top, bottom = int((first % height).min()), int((last % height).max())
        return left, top, right - left + 1, bottom - top + 1


def check_runs(runs: int) -> None:
    """Raise `TooExpensive` for more than `MAX_RUNS` runs."""
    if runs > MAX_RUNS:
        raise TooExpensive(
            f"the mask has more than {MAX_RUNS} runs: ask for a PNG of it instead of run lengths "
            "or polygons"
        )


def compress_counts(counts: npt.NDArray[np.int64]) -> str:
    """Write run lengths, ``(n,)``, as COCO's compressed ASCII.

    From the fourth count on, a count is written as its difference from the count two before. Every
    number is split into groups of 5 bits, least significant first; bit 6 is set if more groups
    follow, and 48 is added. Source: ``rleToString`` in cocoapi's ``common/maskApi.c``.
    """
    values = counts.copy()
    values[3:] -= counts[1:-2]
    parts = [
        _groups(values[start : start + _NUMBERS_AT_ONCE])
        for start in range(0, len(values), _NUMBERS_AT_ONCE)
    ]
    return b"".join(parts).decode("ascii")


def _groups(values: npt.NDArray[np.int64]) -> bytes:
    # The last group's top bit is the sign, so that ``n`` groups hold ``5 n - 1`` bits and a sign.
    limits = np.int64(1) << np.arange(4, 63, 5)
    groups = np.searchsorted(limits, np.where(values < 0, ~values, values), side="right") + 1
    last = groups.cumsum() - 1
    nth = np.arange(last[-1] + 1) - (last - groups + 1).repeat(groups)
    letters = (values.repeat(groups) >> 5 * nth & 0x1F) | 0x20
    letters[last] &= 0x1F
    return (letters + 48).astype(np.uint8).tobytes()
