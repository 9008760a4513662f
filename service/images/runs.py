"""A mask as run lengths: statistics of each class, and COCO's run-length encoding (RLE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt


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
        """Find the runs of a ``(H, W) uint8`` mask without transposing it."""
        height, width = mask.shape
        # Runs start where a pixel differs from the one above it, or from the last column's end.
        y, x = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), width)
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

    def counts(self, class_id: int) -> list[int]:
        """Return COCO's counts of one class: lengths of runs outside, inside, outside, ..."""
        chosen = self.ids == class_id
        bounds = np.stack((self.starts[chosen], self.ends[chosen]), axis=1).ravel()
        total = self.size[0] * self.size[1]
        # COCO writes no empty run at the end.
        tail = [] if bounds.size and bounds[-1] == total else [total]
        edges = np.concatenate(([0], bounds, tail)).astype(np.int64)
        counts: list[int] = np.diff(edges).tolist()
        return counts

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


def compress_counts(counts: list[int]) -> str:
    """Write run lengths as COCO's compressed ASCII.

    From the fourth count on, a count is written as its difference from the count two before. Every
    number is split into groups of 5 bits, least significant first; bit 6 is set if more groups
    follow, and 48 is added. Source: ``rleToString`` in cocoapi's ``common/maskApi.c``.
    """
    out = bytearray()
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            # Done if the rest is only the sign and the group's top bit has the same sign.
            more = value != (-1 if group & 0x10 else 0)
            out.append((group | 0x20 if more else group) + 48)
    return out.decode("ascii")
