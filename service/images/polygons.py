"""Outlines of a mask's regions as COCO polygons.

A ring is the outline of one 4-connected region along the borders of its pixels. COCO polygons have
no holes, so a bridge joins each hole to its region's ring: a line walked there and back, which
encloses nothing. Filled by the even-odd rule, as COCO's rasteriser does, the rings of a class give
its mask.

Exact outlines are stairs. Two steps simplify them. Where a stair is one pixel high, the middle
between its two corners replaces them. Then points within a tolerance of the remaining line are left
out (Douglas and Peucker 1973, all rings at once). A region keeps its exact outline if the simpler
one would change too many of its pixels.
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
"""Largest distance in pixels between the simplified line and a point that was left out."""

MOST_CHANGED: Final = 0.018
"""Largest part of a region's pixels that a simplified outline may add and remove together."""

_NEARLY: Final = 0.03
"""Pixels by which a line may miss a pixel's centre and still count as beyond it."""

MAX_RINGS: Final = 1000
"""Largest number of outlines of one class, regions and holes together; the largest are kept. Photos
have a few dozen; noise has tens of thousands."""

_MAX_ROUNDS: Final = 100

Points = npt.NDArray[np.float64]
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
    rings = [ring for found in traced.values() for ring in found]
    outlines = iter(_simplify(rings, tolerance) if tolerance > 0 else [one.points for one in rings])
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


def _simplify(rings: list[_Ring], tolerance: float) -> list[Points]:
    """Leave out points of rings where that hardly changes their regions' pixels.

    Returns ``(n, 2) float64`` x and y of each ring; there is at least one ring.
    """
    # All rings one after the other, each closed by its first point.
    points = np.concatenate([part for ring in rings for part in (ring.points, ring.points[:1])])
    fixed = np.concatenate([np.append(ring.fixed, True) for ring in rings])
    lengths = np.array([len(ring.points) + 1 for ring in rings])
    last = lengths.cumsum() - 1
    first = last - lengths + 1
    fixed[first] = True
    along = np.diff(points, axis=0)
    # Even places: the points. Odd places: the middle between two points.
    path = np.empty((2 * len(points) - 1, 2))
    path[::2], path[1::2] = points, points[:-1] + along / 2

    chosen = np.flatnonzero(_without_stairs(along, fixed))
    stays = (chosen % 2 == 0) & fixed[chosen // 2]
    _thin(path[chosen], stays, tolerance)
    chosen = chosen[stays]

    number = np.arange(len(rings)).repeat(lengths)
    edges = np.delete(np.arange(len(along)), last[:-1])  # without those from ring to ring
    x, y = points.T
    area = np.bincount(number[edges], (x[:-1] * along[:, 1] - y[:-1] * along[:, 0])[edges] / 2)
    # COCO's rasteriser rounds points to fifths of a pixel.
    measured, pixels = _changed_pixels(np.floor(path * 5 + 0.5) / 5, chosen, along, edges)
    changed = np.bincount(number[measured], pixels, minlength=len(rings))
    exact = (changed > MOST_CHANGED * area)[number]
    keep = np.zeros(len(path), dtype=np.bool_)
    keep[chosen] = True
    keep[::2] = np.where(exact, True, keep[::2])
    keep[1::2] &= ~exact[:-1]
    keep[2 * last] = False
    starts = np.append(0, keep.cumsum())[2 * first]
    return np.split(path[keep], starts[1:])


def _without_stairs(along: Points, fixed: Flags) -> Flags:
    """Flag the middle of each stair of one pixel, and all points but the stairs' corners.

    ``along``: ``(n - 1, 2)`` from each point to the next; ``fixed``: ``(n,)``. Returns ``(2 * n -
    1,)``: points at even places, middles at odd ones.
    """
    turn = along[:-1, 0] * along[1:, 1] - along[:-1, 1] * along[1:, 0]
    unit = np.abs(along[1:-1]).sum(axis=1) == 1
    stair = unit & (turn[:-1] * turn[1:] < 0) & ~(fixed[1:-2] | fixed[2:-1])
    place = 2 * np.flatnonzero(stair) + 3
    keep = np.zeros(2 * len(fixed) - 1, dtype=np.bool_)
    keep[::2] = True
    keep[place - 1] = keep[place + 1] = False
    keep[place] = True
    return keep


def _changed_pixels(
    path: Points, chosen: Ints, along: Points, edges: Ints
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Estimate how many pixels beside each exact edge change if lines join the chosen points.

    Each unit of an edge borders a column of pixels (a row, where the line is steep). The line
    crosses this column at some distance from the unit, and about as many pixels change.

    Returns the edges that were measured, once for each unit, and the pixels: both ``(k,)``.
    """
    after = np.searchsorted(chosen, 2 * edges + 1)
    origin = path[chosen[after - 1]]
    chord = path[chosen[after]] - origin
    steep = np.abs(chord[:, 1]) > np.abs(chord[:, 0])
    measured = along[edges, steep.astype(np.int64)] != 0
    edges, origin, chord, steep = (
        edges[measured],
        origin[measured],
        chord[measured],
        steep[measured],
    )
    length, start = along[edges], path[2 * edges] - origin
    # From here on the first coordinate is the one along the line.
    for pairs in (chord, length, start):
        pairs[steep] = pairs[steep, ::-1]
    slope = chord[:, 1] / chord[:, 0]
    offset = start[:, 0] * slope - start[:, 1]
    # COCO's rasteriser works in fifths of a pixel and draws its lines half a fifth aside.
    offset += np.where(steep, slope, -np.abs(slope)) / 10
    units = np.abs(length[:, 0]).astype(np.int64)
    nth = np.arange(len(edges)).repeat(units)
    unit = np.arange(len(nth)) - (units.cumsum() - units)[nth] + 0.5
    distance = np.abs(offset[nth] + (np.sign(length[:, 0]) * slope)[nth] * unit)
    return edges[nth], np.rint(distance + _NEARLY)


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
