"""Exact outlines of a mask's regions, along the borders of their pixels.

A ring is the outline of one 4-connected region. COCO polygons have no holes, so a bridge joins each
hole to its region's ring: a line walked there and back, which encloses nothing. Filled by the
even-odd rule, the rings of a class give its mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from service.errors import TooExpensive
from service.images.runs import Runs
from service.images.stripes import stripes

MAX_RINGS: Final = 1000
"""Largest number of outlines of one class, regions and holes together; the largest are kept. Photos
have a few dozen; noise has tens of thousands."""

MAX_CORNERS: Final = 1 << 20
"""Largest number of corners of a mask's outlines. Twenty-one classes of pure noise in each of 64 x
64 cells of a network give 0.9 million at 64 million pixels; photos give some ten thousand."""

Points = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# One bit for each of the four pixels around a corner that is of the class.
_UP_LEFT, _UP_RIGHT, _DOWN_LEFT, _DOWN_RIGHT = 1, 2, 4, 8
# How the outline passes a corner, with the region on its right: whether its horizontal line is to
# the right of the corner, whether its vertical line is below, and whether it leaves horizontally.
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
# Two pixels that touch only at the corner make two passages; the one with its line on the left
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


@dataclass(frozen=True, slots=True)
class Corners:
    """The corners of pixels where any class's outline turns, row by row.

    ``y`` and ``x``: ``(n,)``; ``around``: ``(4, n)``, the ids up left, up right, down left and down
    right of each; -1 outside the mask.
    """

    y: Ints
    x: Ints
    around: npt.NDArray[np.int16]

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> Self:
        """Find the corners of a ``(H, W) uint8`` mask, a stripe at a time.

        Raises `TooExpensive` if there are more than `MAX_CORNERS`.
        """
        height, width = mask.shape
        found: list[tuple[Ints, Ints, npt.NDArray[np.int16]]] = []
        corners = 0
        for stripe in stripes(height + 1, 2 * width):
            top, bottom = stripe.start, stripe.stop
            first, last = max(top - 1, 0), min(bottom, height)
            framed = np.full((bottom - top + 1, width + 2), -1, dtype=np.int16)
            framed[first - top + 1 : last - top + 1, 1:-1] = mask[first:last]
            down, across = framed[1:] != framed[:-1], framed[:, 1:] != framed[:, :-1]
            # Where ids change in one direction only, no outline turns.
            turns = (down[:, 1:] | down[:, :-1]) & (across[1:] | across[:-1])
            y, x = np.divmod(np.flatnonzero(turns), width + 1)
            around = (framed[y, x], framed[y, x + 1], framed[y + 1, x], framed[y + 1, x + 1])
            found.append((y + top, x, np.stack(around)))
            corners += len(y)
            if corners > MAX_CORNERS:
                raise TooExpensive(
                    f"the mask's outlines have more than {MAX_CORNERS} corners: ask for run "
                    "lengths or a PNG of it instead of polygons"
                )
        return cls(*(np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)))


@dataclass(frozen=True, slots=True)
class Ring:
    """A region's outline with its holes.

    ``points``: ``(n, 2) float64`` x and y; ``fixed``: ``(n,)``, true at the ends of bridges, which
    simplification must keep.
    """

    points: Points
    fixed: Flags


def trace_rings(corners: Corners, runs: Runs, class_id: int) -> list[Ring]:
    """Return the exact rings of one class, the largest first."""
    own = corners.around == class_id
    near = np.flatnonzero(own.any(axis=0))
    own = own[:, near]
    bits = own[0] * _UP_LEFT + own[1] * _UP_RIGHT + own[2] * _DOWN_LEFT + own[3] * _DOWN_RIGHT
    passed = _PASSED[bits]
    at = np.arange(len(bits)).repeat(passed)
    # A node is one passage of the outline through a corner. Nodes are sorted row by row.
    kind = _FIRST[bits[at]]
    second = np.flatnonzero(at[1:] == at[:-1]) + 1
    kind[second] = _SECOND[bits[at[second]]]
    x, y, leaves = corners.x[near[at]], corners.y[near[at]], _LEAVES[kind]
    following = np.empty(len(at), dtype=np.int64)
    # Along a row, each two nodes are the ends of a line; the same holds along a column.
    _link(following, np.arange(len(at)), leaves)
    _link(following, np.lexsort((_BELOW[kind], y, x)), ~leaves)
    successors: list[int] = following.tolist()
    ring, starts = _label(successors)
    area = np.bincount(ring, y * (x - x[following]), minlength=len(starts))
    kept = np.ones(len(starts), dtype=np.bool_)
    if len(starts) > MAX_RINGS:
        kept[np.argsort(-np.abs(area), kind="stable")[MAX_RINGS:]] = False
    # The first node of a ring is its uppermost left one. There a hole's outline arrives from the
    # right and a region's outline leaves to the right.
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
        rings.append(Ring(np.stack((x[nodes], y[nodes]), axis=1).astype(np.float64), fixed[nodes]))
    return rings


def _link(following: Ints, order: npt.NDArray[np.intp], forward: Flags) -> None:
    """Record for each two nodes in ``order`` which one follows the other."""
    first, second = order[0::2], order[1::2]
    onward = forward[first]
    following[first[onward]] = second[onward]
    following[second[~onward]] = first[~onward]


def _walk(successors: list[int], start: int) -> list[int]:
    """Return the nodes of a ring in order."""
    nodes, node = [start], successors[start]
    while node != start:
        nodes.append(node)
        node = successors[node]
    return nodes


def _label(successors: list[int]) -> tuple[Ints, Ints]:
    """Return the ring number of each node, ``(n,)``, and the first node of each ring."""
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
    """Vertical lines from holes to the outlines above them.

    ``start``: ``(k,)`` the uppermost left node of each hole; ``line``: ``(k,)`` the first node of
    the line that the bridge ends on; ``x`` and ``y``: ``(k,)`` the bridge's end on that line.
    """

    start: Ints
    line: Ints
    x: Ints
    y: Ints

    @classmethod
    def plan(cls, x: Ints, y: Ints, start: Ints, runs: Runs) -> Self:
        """Plan bridges straight up from each hole through the class's pixels."""
        height, width = runs.size
        left = x[start]
        above = np.searchsorted(runs.starts, left * height + y[start] - 1, side="right") - 1
        # A run may have begun at the bottom of the column before.
        top = np.maximum(runs.starts[above] - left * height, 0)
        # The left ends of horizontal lines, row by row.
        ends = y[0::2] * (width + 1) + x[0::2]
        line = 2 * (np.searchsorted(ends, top * (width + 1) + left, side="right") - 1)
        return cls(start, line, left, top)

    def between(self, holes: Ints, kept: Flags, ring: Ints) -> Self:
        """Return the bridges of the holes that are kept, extended across those that are not."""
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
        """Route the rings over the bridges: there, around the hole, and back.

        Each bridge adds three nodes: its upper end, the hole's first node again, the end again.
        """
        before = np.empty(len(following), dtype=np.int64)
        before[following] = np.arange(len(following))
        last = before[self.start].tolist()
        successors.extend([0] * (3 * len(self.start)))
        onward: dict[int, int] = {}
        # Lines with a region below them run to the right; so does the order of their bridges.
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
