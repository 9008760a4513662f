"""Outlines of a mask's regions as COCO polygons.

A ring is the outline of one region (4-connected) along the borders of its pixels. Polygons have no
holes of their own, so each hole is cut into its region's ring by a bridge: a line that is walked
there and back and so encloses nothing. Filled by the even-odd rule, as COCO's own rasteriser fills,
the rings of a class give its mask.

Exact outlines are stairs. They are simplified in two steps. Where a stair is one pixel high, its
two corners make way for the middle between them, which takes no pixel's centre across the outline.
Then points are left out that are within a tolerance of the line that stays (Douglas and Peucker
1973, all rings at once). A region of which that changes too many pixels keeps its exact outline.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from service.images.runs import Runs
from service.images.stripes import stripes

TOLERANCE: Final = 0.6
"""Pixels that the simplified line may be away from a point that was left out."""

MOST_CHANGED: Final = 0.015
"""Part of a region's pixels, at most, that a simplified outline adds and takes away together."""

MAX_RINGS: Final = 1000
"""Outlines of one class, regions and holes, that are traced, the largest. Photos have a few dozen;
noise has tens of thousands."""

_MAX_ROUNDS: Final = 100

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# The class's own among the four pixels around a corner, as bits.
_UP_LEFT, _UP_RIGHT, _DOWN_LEFT, _DOWN_RIGHT = 1, 2, 4, 8
# How the outline passes, the region at its right hand: whether its horizontal line is to the right
# of the corner, whether its vertical line is below, and whether it leaves by the horizontal one.
_PASSAGES: Final = {
    _DOWN_RIGHT: (True, True, True),
    _DOWN_LEFT: (False, True, False),
    _UP_LEFT: (False, False, True),
    _UP_RIGHT: (True, False, False),
    15 - _DOWN_RIGHT: (True, True, False),
    15 - _DOWN_LEFT: (False, True, True),
    15 - _UP_LEFT: (False, False, False),
    15 - _UP_RIGHT: (True, False, True),
}
# Two pixels that touch at the corner alone are two passages: the one with its line on the left
# comes first.
_TOUCHING: Final = {
    _UP_LEFT + _DOWN_RIGHT: (_UP_LEFT, _DOWN_RIGHT),
    _DOWN_LEFT + _UP_RIGHT: (_DOWN_LEFT, _UP_RIGHT),
}
_PASSED: Final = np.array([2 if b in _TOUCHING else int(b in _PASSAGES) for b in range(16)])
_FIRST, _SECOND = (
    np.array([_TOUCHING.get(bits, (bits, bits))[nth] for bits in range(16)]) for nth in (0, 1)
)
_BELOW, _LEAVES = (
    np.array([_PASSAGES.get(bits, (False,) * 3)[part] for bits in range(16)]) for part in (1, 2)
)


def trace_polygons(
    mask: npt.NDArray[np.uint8],
    runs: Runs,
    class_ids: Iterable[int],
    tolerance: float = TOLERANCE,
) -> dict[int, list[list[float]]]:
    """The rings of classes of a mask: ``{class id: [[x, y, x, y, ...], ...]}``.

    ``mask``: ``(H, W) uint8`` class ids; ``runs``: its `Runs`. Coordinates are in pixels, (0, 0)
    the outer corner of the first pixel and (W, H) that of the last one. A class's largest region
    comes first. A ``tolerance`` of 0 gives the exact outlines.
    """
    corners = _Corners.of(mask)
    traced = {index: _trace(corners, runs, index) for index in class_ids}
    if not any(traced.values()):
        return {index: [] for index in traced}
    rings = _Rings.join([ring for found in traced.values() for ring in found])
    if tolerance > 0:
        rings = rings.simplified(tolerance, runs.size)
    outlines = iter(np.split(rings.points, rings.starts[1:]))
    return {
        index: [next(outlines).ravel().tolist() for _ in found] for index, found in traced.items()
    }


@dataclass(frozen=True, slots=True)
class _Corners:
    """The corners of pixels where some class's outline turns, row by row.

    ``y`` and ``x``: ``(n,)``; ``around``: ``(4, n)``, the ids up left, up right, down left and down
    right of each; -1 beyond the mask.
    """

    y: Ints
    x: Ints
    around: npt.NDArray[np.int16]

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> Self:
        """Find them in a ``(H, W) uint8`` mask, a stripe at a time."""
        height, width = mask.shape
        found: list[tuple[Ints, Ints, npt.NDArray[np.int16]]] = []
        for stripe in stripes(height + 1, 2 * width):
            top, bottom = stripe.start, stripe.stop
            first, last = max(top - 1, 0), min(bottom, height)
            framed = np.full((bottom - top + 1, width + 2), -1, dtype=np.int16)
            framed[first - top + 1 : last - top + 1, 1:-1] = mask[first:last]
            down, across = framed[1:] != framed[:-1], framed[:, 1:] != framed[:, :-1]
            # Where ids change in one direction alone, every outline goes straight on.
            turns = (down[:, 1:] | down[:, :-1]) & (across[1:] | across[:-1])
            y, x = np.divmod(np.flatnonzero(turns), width + 1)
            around = (framed[y, x], framed[y, x + 1], framed[y + 1, x], framed[y + 1, x + 1])
            found.append((y + top, x, np.stack(around)))
        return cls(*(np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)))


@dataclass(frozen=True, slots=True)
class _Ring:
    """``points``: ``(n, 2) float64`` x and y; ``fixed``: ``(n,)``, ends of bridges, which stay."""

    points: npt.NDArray[np.float64]
    fixed: Flags


def _trace(corners: _Corners, runs: Runs, class_id: int) -> list[_Ring]:
    """The exact rings of one class, the largest first."""
    own = corners.around == class_id
    bits = own[0] * _UP_LEFT + own[1] * _UP_RIGHT + own[2] * _DOWN_LEFT + own[3] * _DOWN_RIGHT
    passed = _PASSED[bits]
    at = np.arange(len(bits)).repeat(passed)
    # Nodes are passages of the outline through a corner, row by row.
    kind = _FIRST[bits[at]]
    second = np.flatnonzero(at[1:] == at[:-1]) + 1
    kind[second] = _SECOND[bits[at[second]]]
    x, y, leaves = corners.x[at], corners.y[at], _LEAVES[kind]
    following = np.empty(len(at), dtype=np.int64)
    # Along a row every first and second node are the ends of a line, and so along a column.
    _link(following, np.arange(len(at)), leaves)
    _link(following, np.lexsort((_BELOW[kind], y, x)), ~leaves)
    successors: list[int] = following.tolist()
    ring, starts = _label(successors)
    area = np.bincount(ring, y * (x - x[following]), minlength=len(starts))
    kept = np.ones(len(starts), dtype=np.bool_)
    if len(starts) > MAX_RINGS:
        kept[np.argsort(-np.abs(area), kind="stable")[MAX_RINGS:]] = False
    # The first node of a ring is its uppermost left one; there a hole's outline comes from the
    # right, and a region's leaves to it.
    holes = np.flatnonzero(~leaves[starts])
    bridges = _Bridges.plan(x, y, starts[holes], runs)
    bridges = bridges.between(holes, kept, ring)
    bridges.build(successors, following)
    x = np.concatenate((x, bridges.x.repeat(3)))
    y = np.concatenate((y, bridges.y.repeat(3)))
    x[len(at) + 1 :: 3], y[len(at) + 1 :: 3] = x[bridges.start], y[bridges.start]
    fixed = np.zeros(len(x), dtype=np.bool_)
    fixed[bridges.start] = True
    fixed[len(at) :] = True
    regions = np.flatnonzero(kept & leaves[starts])
    rings = []
    for region in regions[np.argsort(-area[regions], kind="stable")].tolist():
        nodes = _walk(successors, int(starts[region]))
        rings.append(_Ring(np.stack((x[nodes], y[nodes]), axis=1).astype(np.float64), fixed[nodes]))
    return rings


def _link(following: Ints, order: npt.NDArray[np.intp], forward: Flags) -> None:
    """Note for each two nodes in ``order`` which of them follows the other."""
    first, second = order[0::2], order[1::2]
    onward = forward[first]
    following[first[onward]] = second[onward]
    following[second[~onward]] = first[~onward]


def _walk(successors: list[int], start: int) -> list[int]:
    """The nodes of a ring."""
    nodes, node = [start], successors[start]
    while node != start:
        nodes.append(node)
        node = successors[node]
    return nodes


def _label(successors: list[int]) -> tuple[Ints, Ints]:
    """The ring of each node ``(n,)``, and the first node of each ring."""
    ring = [-1] * len(successors)
    starts: list[int] = []
    for start in range(len(successors)):
        if ring[start] < 0:
            node = start
            while ring[node] < 0:
                ring[node] = len(starts)
                node = successors[node]
            starts.append(start)
    return np.array(ring, dtype=np.int64), np.array(starts, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Bridges:
    """From holes to what is above them.

    ``start``: ``(k,)`` the uppermost left node of each hole; ``line``: ``(k,)`` the node at which
    begins the line that the bridge ends on; ``x`` and ``y``: ``(k,)`` where it ends there.
    """

    start: Ints
    line: Ints
    x: Ints
    y: Ints

    @classmethod
    def plan(cls, x: Ints, y: Ints, start: Ints, runs: Runs) -> Self:
        """Straight up from each hole, as far as the class's pixels go."""
        height, width = runs.size
        left = x[start]
        above = np.searchsorted(runs.starts, left * height + y[start] - 1, side="right") - 1
        # A run may have begun at the bottom of the column before.
        top = np.maximum(runs.starts[above] - left * height, 0)
        # The horizontal lines' left ends, row by row.
        ends = y[0::2] * (width + 1) + x[0::2]
        line = 2 * (np.searchsorted(ends, top * (width + 1) + left, side="right") - 1)
        return cls(start, line, left, top)

    def between(self, holes: Ints, kept: Flags, ring: Ints) -> Self:
        """The bridges of the holes that are kept, over those that are not."""
        if kept.all():
            return self
        number = {hole: nth for nth, hole in enumerate(holes.tolist())}
        through = np.arange(len(holes))
        for nth, line in enumerate(self.line.tolist()):
            below = number.get(int(ring[line]))
            if below is not None and not kept[holes[below]]:
                through[nth] = through[below]
        chosen = kept[holes]
        through = through[chosen]
        return type(self)(self.start[chosen], self.line[through], self.x[through], self.y[through])

    def build(self, successors: list[int], following: Ints) -> None:
        """Lead the rings over the bridges: there, around the hole, and back.

        Three nodes are added for each: its end above, the hole's first node again, the end again.
        """
        before = np.empty(len(following), dtype=np.int64)
        before[following] = np.arange(len(following))
        last = before[self.start].tolist()
        successors.extend([0] * (3 * len(self.start)))
        onward: dict[int, int] = {}
        # Lines with a region below them go to the right, and so from bridge to bridge.
        for nth in np.lexsort((self.x, self.line)).tolist():
            start, line = int(self.start[nth]), int(self.line[nth])
            there = len(following) + 3 * nth
            again, back = there + 1, there + 2
            leaves_from = onward.get(line, line)
            successors[back] = successors[leaves_from]
            successors[leaves_from] = there
            successors[there] = start
            successors[last[nth]] = again
            successors[again] = back
            onward[line] = back


@dataclass(frozen=True, slots=True)
class _Rings:
    """Rings one after the other.

    ``points``: ``(n, 2) float64`` x and y; ``fixed``: ``(n,)``; ``starts``: ``(rings,)``.
    """

    points: npt.NDArray[np.float64]
    fixed: Flags
    starts: Ints

    @classmethod
    def join(cls, rings: list[_Ring]) -> Self:
        """Put rings one after the other; there is at least one."""
        lengths = np.array([len(ring.points) for ring in rings])
        return cls(
            np.concatenate([ring.points for ring in rings]),
            np.concatenate([ring.fixed for ring in rings]),
            lengths.cumsum() - lengths,
        )

    def simplified(self, tolerance: float, size: tuple[int, int]) -> Self:
        """With fewer points, where that keeps a region's pixels as they are, about."""
        simple = self._without_stairs()._thinned(tolerance)
        exact, other = self._crossings(size), simple._crossings(size)
        changed = _enclosed(np.concatenate((exact, other)), len(self.starts), size)
        faithful = changed <= MOST_CHANGED * _enclosed(exact, len(self.starts), size)
        chosen = [
            _Ring(points, fixed)
            for mine, theirs, take in zip(self._split(), simple._split(), faithful, strict=True)
            for points, fixed in [theirs if take else mine]
        ]
        return self.join(chosen)

    def _split(self) -> list[tuple[npt.NDArray[np.float64], Flags]]:
        inner = self.starts[1:]
        return list(zip(np.split(self.points, inner), np.split(self.fixed, inner), strict=True))

    def _ring_of_points(self) -> Ints:
        return np.arange(len(self.starts)).repeat(np.diff(self.starts, append=len(self.points)))

    def _neighbours(self) -> tuple[Ints, Ints]:
        """The points before and after each, around its ring."""
        before, after = np.arange(len(self.points)) - 1, np.arange(len(self.points)) + 1
        ends = np.append(self.starts[1:], len(self.points))
        before[self.starts], after[ends - 1] = ends - 1, self.starts
        return before, after

    def _selected(self, points: npt.NDArray[np.float64], fixed: Flags, keep: Flags) -> Self:
        """Some of as many points for each as there are here."""
        times = len(points) // len(self.points)
        starts = np.concatenate(([0], np.cumsum(keep)))[self.starts * times]
        return type(self)(points[keep], fixed[keep], starts)

    def _without_stairs(self) -> Self:
        """The middle of each stair of one pixel, instead of its corners."""
        before, after = self._neighbours()
        along = self.points[after] - self.points
        come = along[before]
        turn = come[:, 0] * along[:, 1] - come[:, 1] * along[:, 0]
        stair = (np.abs(along).sum(axis=1) == 1) & (turn * turn[after] < 0)
        stair &= ~(self.fixed | self.fixed[after])
        both = np.stack((self.points, self.points + along / 2), axis=1).reshape(-1, 2)
        keep = np.stack((~(stair | stair[before]), stair), axis=1).ravel()
        fixed = np.stack((self.fixed, np.zeros_like(self.fixed)), axis=1).ravel()
        return self._selected(both, fixed, keep)

    def _thinned(self, tolerance: float) -> Self:
        """Without the points that are within ``tolerance`` pixels of the line that stays."""
        # Each ring is closed by its first point again; that and the farthest from it stay.
        ring = self._ring_of_points()
        last = np.append(self.starts[1:], len(self.points)) - 1
        apart = ((self.points - self.points[self.starts[ring]]) ** 2).sum(axis=1)
        keep = self.fixed.copy()
        keep[self.starts] = True
        keep[_first_largest(apart, self.starts)] = True
        points = np.insert(self.points, last + 1, self.points[self.starts], axis=0)
        stays = np.insert(keep, last + 1, True)
        _thin(points, stays, tolerance)
        return self._selected(
            self.points, self.fixed, np.delete(stays, last + 1 + np.arange(len(last)))
        )

    def _crossings(self, size: tuple[int, int]) -> Ints:
        """Where the rings cross the middle of a column of pixels, as COCO's rasteriser has it.

        ``(k,)``: ``(ring * W + column) * (H + 1) + row``, the row that begins at the crossing.
        Source: ``rleFrPoly`` in cocoapi's ``common/maskApi.c``.
        """
        height, width = size
        # It rounds to fifths of a pixel, and goes along a line in the fifths of its longer side.
        points = np.floor(self.points * 5 + 0.5).astype(np.int64)
        ends = np.stack((points, points[self._neighbours()[1]]))
        swap = ends[0, :, 0] > ends[1, :, 0]
        ends[:, swap] = ends[::-1, swap]
        # Columns whose middle, from the third fifth to the fourth, lies between the two ends.
        first = (ends[0, :, 0] + 2) // 5
        count = (ends[1, :, 0] + 2) // 5 - first
        edge = np.arange(len(points)).repeat(count)
        column = np.arange(len(edge)) - (count.cumsum() - count - first)[edge]
        (x, y), (dx, dy) = ends[0, edge].T, (ends[1] - ends[0])[edge].T
        along = 5 * column + 2 - x
        # In floating point, because ties are where that puts them.
        slope = dy / dx
        flat = np.floor(y + slope * (along + (dy < 0)) + 0.5).astype(np.int64)
        up = -(-(2 * along + 1) * np.abs(dy) // (2 * dx))
        steep = y + np.where(dy > 0, up - 1, -up)
        row = (np.where(dx >= np.abs(dy), flat, steep) + 2) // 5
        ring = self._ring_of_points()[edge]
        found: Ints = (ring * width + column) * (height + 1) + row.clip(0, height)
        return found


def _enclosed(crossings: Ints, rings: int, size: tuple[int, int]) -> Ints:
    """Pixels inside each ring, ``(rings,)``, by the even-odd rule."""
    ordered = np.sort(crossings)
    # Closed lines cross every column an even number of times.
    ring = ordered[0::2] // (size[1] * (size[0] + 1))
    pixels = np.bincount(ring, ordered[1::2] - ordered[0::2], minlength=rings)
    return pixels.astype(np.int64)


def _first_largest(values: npt.NDArray[np.float64], starts: Ints) -> npt.NDArray[np.intp]:
    """Where each group's largest value is, the first of equals. No group is empty."""
    lengths = np.diff(starts, append=len(values))
    largest = np.flatnonzero(values == np.maximum.reduceat(values, starts).repeat(lengths))
    group = np.arange(len(starts)).repeat(lengths)[largest]
    return largest[np.flatnonzero(np.diff(group, prepend=-1))]


def _thin(points: npt.NDArray[np.float64], stays: Flags, tolerance: float) -> None:
    """Douglas and Peucker's rounds, on all lines at once: set in ``stays`` what is needed.

    ``points``: ``(n, 2)`` of one line after another, whose ends stay already.
    """
    fixed = np.flatnonzero(stays)
    inner = np.flatnonzero(~stays)
    place = np.searchsorted(fixed, inner)
    start, end = fixed[place - 1], fixed[place]
    for _ in range(_MAX_ROUNDS):
        if not inner.size:
            return
        origin = points[start]
        chord, offset = points[end] - origin, points[inner] - origin
        length = (chord**2).sum(axis=1)
        along = ((chord * offset).sum(axis=1) / np.maximum(length, 1e-9)).clip(0, 1)
        apart = ((offset - along[:, None] * chord) ** 2).sum(axis=1)
        lines = np.flatnonzero(np.diff(start, prepend=-1))
        lengths = np.diff(lines, append=len(inner))
        farthest = _first_largest(apart, lines)
        far = apart[farthest] > tolerance**2
        stays[inner[farthest[far]]] = True
        split = inner[farthest].repeat(lengths)
        # What is left are the points on either side of the farthest one, where that was far.
        rest = far.repeat(lengths) & (inner != split)
        inner, split, start, end = inner[rest], split[rest], start[rest], end[rest]
        start, end = np.where(inner > split, split, start), np.where(inner < split, split, end)
    # Never seen but in theory: an outline that is split at its very end each time.
    stays[inner] = True
