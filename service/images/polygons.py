"""Outlines of a mask's regions as COCO polygons with few points.

Exact outlines are stairs. Two steps simplify them. Where a stair is one pixel high, the middle
between its two corners replaces them. Then points within a tolerance of the remaining line are left
out (Douglas and Peucker 1973, all rings at once). A region keeps its exact outline if the simpler
one would change too many of its pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from service.images.outlines import Corners, Flags, Ints, Points, Ring, trace_rings
from service.images.runs import Runs

TOLERANCE: Final = 0.6
"""Largest distance in pixels between the simplified line and a point that was left out."""

MOST_CHANGED: Final = 0.018
"""Largest part of a region's pixels that a simplified outline may add and remove together."""

_NEARLY: Final = 0.03
"""Pixels by which a line may miss a pixel's centre and still count as beyond it."""

_MAX_ROUNDS: Final = 100

_UNITS_AT_ONCE: Final = 1 << 18
"""Unit edges that are measured at once, about: their numbers take some 20 MiB."""


def trace_polygons(
    mask: npt.NDArray[np.uint8],
    runs: Runs,
    class_ids: Iterable[int],
    tolerance: float = TOLERANCE,
) -> dict[int, list[list[float]]]:
    """Return the rings of classes of a mask: ``{class id: [[x, y, x, y, ...], ...]}``.

    ``mask``: ``(H, W) uint8`` class ids; ``runs``: its `Runs`. Coordinates are in pixels, (0, 0)
    the outer corner of the first pixel and (W, H) that of the last one. A class's largest region
    comes first. A ``tolerance`` of 0 gives the exact outlines.
    """
    corners = Corners.of(mask)
    traced = {index: trace_rings(corners, runs, index) for index in class_ids}
    if not any(traced.values()):
        return {index: [] for index in traced}
    rings = [ring for found in traced.values() for ring in found]
    outlines = iter(_simplify(rings, tolerance) if tolerance > 0 else [one.points for one in rings])
    return {
        index: [next(outlines).ravel().tolist() for _ in found] for index, found in traced.items()
    }


def _simplify(rings: list[Ring], tolerance: float) -> list[Points]:
    """Leave out points of rings where that hardly changes their regions' pixels.

    Returns ``(n, 2) float64`` x and y of each ring; there is at least one ring.
    """
    # All rings in one array, each closed by its first point.
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
    edges = np.delete(np.arange(len(along)), last[:-1])  # without those between two rings
    x, y = points.T
    area = np.bincount(number[edges], (x[:-1] * along[:, 1] - y[:-1] * along[:, 0])[edges] / 2)
    # COCO's rasteriser rounds points to fifths of a pixel.
    changed = np.zeros(len(rings))
    rounded = np.floor(path * 5 + 0.5) / 5
    for part in _simplified(chosen, along, edges):
        measured, pixels = _changed_pixels(rounded, chosen, along, part)
        changed += np.bincount(number[measured], pixels, minlength=len(rings))
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


def _simplified(chosen: Ints, along: Points, edges: Ints) -> Iterator[Ints]:
    """Yield the edges that the line through the chosen points leaves, a part at a time.

    A part has about `_UNITS_AT_ONCE` units, and at least one edge.
    """
    after = np.searchsorted(chosen, 2 * edges + 1)
    kept = (chosen[after - 1] == 2 * edges) & (chosen[after] == 2 * edges + 2)
    edges = edges[~kept]
    units = np.abs(along[edges]).sum(axis=1).cumsum()
    total = int(units[-1]) if units.size else 0
    bounds = np.searchsorted(units, np.arange(_UNITS_AT_ONCE, total, _UNITS_AT_ONCE)) + 1
    yield from np.split(edges, np.unique(bounds))


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
    """Return the index of each group's first largest value. No group is empty."""
    lengths = np.diff(starts, append=len(values))
    largest = np.flatnonzero(values == np.maximum.reduceat(values, starts).repeat(lengths))
    group = np.arange(len(starts)).repeat(lengths)[largest]
    return largest[np.flatnonzero(np.diff(group, prepend=-1))]


def _thin(points: npt.NDArray[np.float64], stays: Flags, tolerance: float) -> None:
    """Set in ``stays`` the points that Douglas and Peucker's algorithm keeps, all lines at once.

    ``points``: ``(n, 2)`` of all lines in order; the ends of lines are set already.
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
        # The points on either side of a far point go into the next round.
        rest = far.repeat(lengths) & (inner != split)
        inner, split, start, end = inner[rest], split[rest], start[rest], end[rest]
        start, end = np.where(inner > split, split, start), np.where(inner < split, split, end)
    # Only in theory: an outline that every round splits next to its end.
    stays[inner] = True
