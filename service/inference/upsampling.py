"""Logits to class ids at the photo's own size, exact and in bounded memory.

One bilinear interpolation with half-pixel centres (``align_corners=False``) maps the valid region
of the logits to the photo's pixels. The argmax follows, so labels are never resized. Only a few of
the interpolated values are computed:

* Four neighbouring logits are the corners of a cell of the photo. Each pixel of the cell is a
  convex combination of them, so a class that leads at all four corners leads at every pixel, and
  the cell is filled without arithmetic. On usual photos this is true for 75 to 95 % of the cells.
* For the same reason, a class that is below the same other class at all four corners cannot win in
  the cell. The two or three remaining candidates are interpolated. Only differences to the first
  candidate matter, so it needs no interpolation.
* In a cell, the interpolation is ``a + b t + c u + d t u`` for the pixel in row ``t`` and column
  ``u``. One matrix product, ``(cells, 4) @ (4, pixels)``, interpolates a class in many cells.
* The softmax also depends on differences only. A class is skipped if it is so far below another one
  at all four corners that it cannot change a confidence by a fraction of 1/255. Where this is true
  for all classes but one, the confidence is 1 without arithmetic.

Cells are processed in batches of about `BATCH_PIXELS`. Noisy logits, where every class is a
candidate in every cell, cost time but no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from service.artefact.preprocessing import Geometry

BATCH_PIXELS: Final = 2**16
"""Pixels interpolated at once: few enough for a core's cache, enough to keep calls few."""

PART_PIXELS: Final = 2**20
"""Pixels counted at once."""

CELL_SIDE: Final = 128
"""Longest side of a cell in pixels; longer cells are cut to bound the size of a batch."""

SMALL_PATCH: Final = 256
"""Pixels of a patch up to which it is painted by index: a slice for each takes longer."""

IGNORED_SHARE: Final = 0.49 / 255
"""Classes are left out of a softmax while their sum, relative to another class, is below this. With
rounding, the error of a confidence stays within 1 / 255."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Class ids and confidences of a photo's pixels.

    ``mask``: ``(H, W) uint8`` class ids. ``confidence``: ``(H, W) uint8``, the softmax probability
    of the pixel's class in 255ths, off by one at most; None if it was not asked for.
    """

    mask: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.uint8] | None

    def class_pixels(self) -> npt.NDArray[np.int64]:
        """The number of each class's pixels: ``(256,) int64``, indexed by class id."""
        counts = np.zeros(256, dtype=np.int64)
        mask = self.mask.ravel()
        # In parts, because np.bincount takes 8 bytes per pixel.
        for start in range(0, mask.size, PART_PIXELS):
            counts += np.bincount(mask[start : start + PART_PIXELS], minlength=256)
        return counts

    def class_confidence(self) -> npt.NDArray[np.float64]:
        """Mean confidence of each class over its own pixels.

        Returns ``(256,) float64`` in [0, 1], indexed by class id; 0 for classes without pixels, and
        for all classes without `confidence`.
        """
        means = np.zeros(256)
        if self.confidence is not None:
            mask, confidence = self.mask.ravel(), self.confidence.ravel()
            classes = int(mask.max()) + 1
            histogram = np.zeros((classes, 256))
            # In parts, because np.bincount takes 8 bytes per pixel.
            for start in range(0, mask.size, PART_PIXELS):
                pairs = mask[start : start + PART_PIXELS].astype(np.uint16) * 256
                pairs += confidence[start : start + PART_PIXELS]
                histogram += np.bincount(pairs, minlength=histogram.size).reshape(classes, 256)
            levels = np.arange(256) / 255
            means[:classes] = histogram @ levels / histogram.sum(axis=1).clip(1)
        return means


def upsample(
    logits: npt.NDArray[np.float32],
    geometry: Geometry,
    *,
    with_confidence: bool = False,
    batch_pixels: int = BATCH_PIXELS,
) -> Labels:
    """Upsample one photo's logits and take the argmax; ties go to the lower class id.

    ``logits``: ``(C, h, w) float32`` of the padded input, C at most 256. Returns `Labels` of size
    ``geometry.photo``. Ids are below C even where logits are not finite.
    """
    classes, *grid = logits.shape
    rows, columns = (
        _axis(*sizes)
        for sizes in zip(geometry.photo, geometry.resized, geometry.padded, grid, strict=True)
    )
    # (4, cells): indices of every cell's corners in the flat logits.
    corners = rows.corners[:, None, :, None] * grid[1] + columns.corners[:, None, :]
    corners = corners.reshape(4, -1)
    cells = _Cells(logits.reshape(classes, -1), corners, rows, columns)
    # One photo's infinite logits must not fail the others of its batch.
    with np.errstate(all="ignore"):
        winners = _leaders(cells.logits).take(corners)
        mixed = (winners != winners[0]).any(axis=0)
        mask = _Canvas.filled(winners[0], cells)
        mask.paint(_winners, _possible_winners(cells, np.flatnonzero(mixed)), cells, batch_pixels)
        if not with_confidence:
            return Labels(mask.image, None)
        uncertain = mixed | ~(_other_shares(cells.logits).take(corners).max(axis=0) < IGNORED_SHARE)
        confidence = _Canvas.filled(np.full_like(winners[0], 255), cells)
        found = _contributors(cells, np.flatnonzero(uncertain))
        confidence.paint(_confidences, found, cells, batch_pixels)
    return Labels(mask.image, confidence.image)


@dataclass(frozen=True, slots=True)
class _Axis:
    """The cells along one axis of a photo, in order.

    ``corners``: ``(2, cells)`` the logits before and after each; twice the same at the border.
    ``start``, ``stop`` and ``size``: ``(cells,)`` the pixels of each. The position of pixel
    ``start + t`` between its two logits is ``offset + t * step``, in [0, 1]. ``sizes``: the few
    sizes that occur, ascending; ``kind``: ``(cells,)`` each cell's index in it.
    """

    corners: npt.NDArray[np.intp]
    start: npt.NDArray[np.intp]
    stop: npt.NDArray[np.intp]
    size: npt.NDArray[np.intp]
    offset: npt.NDArray[np.float32]
    step: np.float32
    sizes: npt.NDArray[np.intp]
    kind: npt.NDArray[np.intp]

    @property
    def longest(self) -> int:
        """The most pixels of a cell."""
        return int(self.sizes[-1])


@lru_cache(maxsize=64)
def _axis(photo: int, resized: int, padded: int, logits: int) -> _Axis:
    """Cut an axis into cells, given its pixels (photo, resized, padded) and logits.

    Pixel ``y`` samples logits coordinate ``(y + 0.5) * resized / (photo * stride) - 0.5``, clamped
    to the logits, where the stride is ``padded / logits``.
    """
    step = resized * logits / (photo * padded)
    # Cell i holds the pixels from logit i - 1 to logit i. The first and the last are half cells.
    cell = np.arange(logits + 1)
    bounds = np.ceil((cell - 0.5) / step - 0.5).clip(0, photo).astype(np.intp)
    bounds[0] = 0
    size = np.diff(bounds, append=photo)
    side = max(CELL_SIDE, photo // 4096)
    parts = -(-size // side)
    cell = cell.repeat(parts)
    part = np.arange(len(cell)) - (parts.cumsum() - parts)[cell]
    start = bounds[cell] + part * side
    stop = np.append(start[1:], photo)
    corners = np.stack((cell - 1, cell)).clip(0, logits - 1)
    offset = ((start + 0.5) * step + 0.5 - cell).astype(np.float32)
    size = stop - start
    sizes, kind = np.unique(size, return_inverse=True)
    return _Axis(corners, start, stop, size, offset, np.float32(step), sizes, kind)


@lru_cache(maxsize=8)
def _basis(height: int, width: int) -> npt.NDArray[np.float32]:
    """``(4, height * width)``: 1, t, u and t * u of a patch's pixels."""
    t, u = np.indices((height, width), dtype=np.float32).reshape(2, -1)
    return np.stack((np.ones_like(t), t, u, t * u))


@dataclass(frozen=True, slots=True)
class _Cells:
    """A photo's cells, row by row.

    ``logits``: ``(C, h * w) float32``; ``corners``: ``(4, cells)`` the logits at each cell's top
    left, top right, bottom left and bottom right.
    """

    logits: npt.NDArray[np.float32]
    corners: npt.NDArray[np.intp]
    rows: _Axis
    columns: _Axis

    @property
    def are_small(self) -> bool:
        """Whether patches are painted by index."""
        return self.rows.longest * self.columns.longest <= SMALL_PATCH

    def values(self, cells: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """All classes' logits at the corners of M cells: ``(C, 4, M)``."""
        return self.logits.take(self.corners.take(cells, axis=1), axis=1)

    def of_classes(
        self, cells: npt.NDArray[np.intp], classes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float32]:
        """One class's logits at the corners of each of P cells: ``(4, P)``."""
        places = self.corners.take(cells, axis=1)
        places += classes * np.intp(self.logits.shape[1])
        return self.logits.reshape(-1).take(places)

    def factors(
        self, cells: npt.NDArray[np.intp], values: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Factors ``(P, 4)`` of a `_basis` from ``values``: ``(4, P)`` at P cells' corners."""
        row, column = np.divmod(cells, len(self.columns.size))
        y, x = self.rows.offset[row], self.columns.offset[column]
        left, right = values[0], values[1]
        left_down, right_down = values[2] - left, values[3] - right
        first = left + y * left_down
        across, twist = right + y * right_down - first, right_down - left_down
        factors = np.empty((len(cells), 4), dtype=np.float32)
        factors[:, 0] = first + x * across
        factors[:, 1] = self.rows.step * (left_down + x * twist)
        factors[:, 2] = self.columns.step * across
        factors[:, 3] = self.rows.step * self.columns.step * twist
        return factors


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The classes to interpolate in each of M cells; cells with most candidates come first.

    ``cells`` and ``counts``: ``(M,)``. ``ids``: ``(K, M) uint8``; the first ``counts[i]`` are the
    candidates of cell i.
    """

    cells: npt.NDArray[np.intp]
    counts: npt.NDArray[np.intp]
    ids: npt.NDArray[np.uint8]

    @classmethod
    def of(
        cls, cells: npt.NDArray[np.intp], counts: npt.NDArray[np.intp], ids: npt.NDArray[np.uint8]
    ) -> Self:
        """Keep the cells that have two or more candidates; ``ids``: ``(C, cells) uint8``."""
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts > 1)]
        counts = counts[order]
        return cls(cells[order], counts, ids[: counts.max(initial=0)].take(order, axis=1))

    def __getitem__(self, batch: slice) -> Self:
        """Some of the cells."""
        counts = self.counts[batch]
        return type(self)(self.cells[batch], counts, self.ids[: counts[0], batch])


@dataclass(frozen=True, slots=True)
class _Batch:
    """M cells' candidates, ready to interpolate.

    ``ids``: ``(K, M) uint8``, as in `_Candidates`; ``counts``: of the cells, the first ones, that
    have a second, third, ... candidate. ``differences``: ``(4, P) float32``, the logits of all
    second, then third, ... candidates minus those of their cell's first one, at the corners.
    ``factors``: ``(P, 4) float32``, of ``basis``: ``(4, pixels) float32``.
    """

    ids: npt.NDArray[np.uint8]
    counts: list[int]
    differences: npt.NDArray[np.float32]
    factors: npt.NDArray[np.float32]
    basis: npt.NDArray[np.float32]

    @classmethod
    def of(cls, found: _Candidates, photo: _Cells, basis: npt.NDArray[np.float32]) -> Self:
        """Gather all that is needed of the photo's logits."""
        nth = np.arange(1, len(found.ids))
        counts = np.count_nonzero(found.counts > nth[:, None], axis=1).tolist()
        every = np.arange(len(found.cells))
        which = np.concatenate([every[:n] for n in counts])
        classes = np.concatenate([ids[:n] for ids, n in zip(found.ids[1:], counts, strict=True)])
        cells = found.cells[which]
        differences = photo.of_classes(cells, classes)
        differences -= photo.of_classes(found.cells, found.ids[0]).take(which, axis=1)
        return cls(found.ids, counts, differences, photo.factors(cells, differences), basis)

    def full(self, value: float, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array ``(M, pixels)``."""
        return np.full((self.ids.shape[1], self.basis.shape[1]), value, dtype=dtype)

    def parts(self) -> Iterator[slice]:
        """The places of all second, third, ... candidates in `differences` and `factors`."""
        stop = 0
        for n in self.counts:
            start, stop = stop, stop + n
            yield slice(start, stop)

    def planes(self) -> Iterator[npt.NDArray[np.float32]]:
        """The interpolated differences of all second, third, ... candidates: ``(n, pixels)``.

        The next one overwrites the last: page faults of new arrays would cost more than the
        arithmetic.
        """
        buffer = self.full(0, np.float32)
        for part, n in zip(self.parts(), self.counts, strict=True):
            yield np.matmul(self.factors[part], self.basis, out=buffer[:n])


def _leaders(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The class of the highest of ``values``: ``(C, n)``, the lowest of equals: ``(n,) uint8``."""
    last = len(values) - 1
    # Several times faster than argmax along the first axis. If none is equal to the highest, which
    # is then not a number, the result is the last class.
    order = np.arange(last, -1, -1, dtype=np.uint8)[:, None]
    highest = (values == values.max(axis=0)).view(np.uint8)
    leaders: npt.NDArray[np.uint8] = last - (highest * order).max(axis=0)
    return leaders


def _excess(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each class's largest lead over one reference class of its cell: ``(C, cells)``.

    ``values``: ``(C, 4, cells)``. The reference is the class that leads at the cell's centre. Any
    other would be correct too, but this one rules out the most classes.
    """
    leader = _leaders(values.sum(axis=1))
    leading = values[leader, :, np.arange(len(leader))].T
    excess: npt.NDArray[np.float32] = (values - leading).max(axis=1)
    return excess


def _possible_winners(photo: _Cells, cells: npt.NDArray[np.intp]) -> _Candidates:
    """The classes that may win in a cell, ascending."""
    possible = _excess(photo.values(cells)) >= 0
    every = np.arange(len(possible), dtype=np.uint8)[:, None]
    ids = np.sort(np.where(possible, every, every[-1]), axis=0)
    return _Candidates.of(cells, possible.sum(axis=0), ids)


def _other_shares(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The sum of all other classes' softmax divided by the highest: ``(n,)`` from ``(C, n)``.

    Where one class leads at all corners of a cell, this is at most the largest of the four in all
    of the cell, because the exponential is convex.
    """
    shares: npt.NDArray[np.float32] = np.exp(logits - logits.max(axis=0)).sum(axis=0) - 1
    return shares


def _contributors(photo: _Cells, cells: npt.NDArray[np.intp]) -> _Candidates:
    """The classes that matter in a cell's softmax, highest first.

    A class's share is at most the exponential of its excess. The smallest shares are skipped while
    their sum is below `IGNORED_SHARE`.
    """
    shares = np.exp(_excess(photo.values(cells))).T.copy()
    # Positive floats sort as integers do. The last 8 of 23 bits hold the class, so that one sort
    # orders both.
    keys = shares.view(np.int32)
    keys &= ~0xFF
    keys |= np.arange(keys.shape[1], dtype=np.int32)
    keys.sort(axis=1)
    ids = keys.astype(np.uint8)[:, ::-1].T
    sums = shares.T.copy()
    # Several times faster than cumsum.
    for nth in range(1, len(sums)):
        sums[nth] += sums[nth - 1]
    skipped = sums < IGNORED_SHARE
    return _Candidates.of(cells, (~skipped).sum(axis=0), ids)


def _winners(batch: _Batch) -> npt.NDArray[np.uint8]:
    """Class ids: ``(M, pixels) uint8``."""
    ids, best = batch.full(0, np.uint8), batch.full(0, np.float32)
    ids[:] = batch.ids[0, :, None]
    buffer = np.empty_like(ids)
    for nth, plane in enumerate(batch.planes(), start=1):
        n = len(plane)
        higher = buffer[:n]
        np.greater(plane, best[:n], out=higher.view(np.bool_))
        # Ids ascend, so the last class that is higher has the largest id.
        np.multiply(higher, batch.ids[nth, :n, None], out=higher)
        np.maximum(ids[:n], higher, out=ids[:n])
        np.maximum(best[:n], plane, out=best[:n])
    return ids


def _confidences(batch: _Batch) -> npt.NDArray[np.uint8]:
    """The winner's softmax in 255ths: ``(M, pixels) uint8``."""
    best = _highest(batch)
    total = np.exp(-best)
    for plane in batch.planes():
        n = len(plane)
        np.subtract(plane, best[:n], out=plane)
        np.exp(plane, out=plane)
        np.add(total[:n], plane, out=total[:n])
    np.divide(255, total, out=total)
    total += 0.5
    return total.astype(np.uint8)


def _highest(batch: _Batch) -> npt.NDArray[np.float32]:
    """The highest candidate's logit minus the first one's: ``(M, pixels) float32``."""
    best: npt.NDArray[np.float32] = batch.full(0, np.float32)
    # Only a class that is above the first candidate at a corner can be above it at a pixel.
    higher = batch.differences.max(axis=0) > 0
    for part in batch.parts():
        where = np.flatnonzero(higher[part])
        if where.size:
            plane = batch.factors[part][where] @ batch.basis
            best[where] = np.maximum(best[where], plane)
    return best


_OUTSIDE: Final = 2**62
"""More than the index of any photo's pixel."""


@dataclass(frozen=True, slots=True)
class _Canvas:
    """An image ``(H, W) uint8`` to paint.

    ``pixels``: the image's, flat. If patches are small, a row follows that is not in the image.
    """

    pixels: npt.NDArray[np.uint8]
    image: npt.NDArray[np.uint8]

    @classmethod
    def filled(cls, levels: npt.NDArray[np.uint8], photo: _Cells) -> Self:
        """Fill each cell with one of ``levels``: ``(cells,) uint8``."""
        heights = photo.rows.size.copy()
        heights[-1] += photo.are_small
        lines = levels.reshape(len(heights), -1).repeat(photo.columns.size, axis=1)
        rows = lines.repeat(heights, axis=0)
        return cls(rows.reshape(-1), rows[: photo.rows.stop[-1]])

    def paint(
        self,
        patches_of: Callable[[_Batch], npt.NDArray[np.uint8]],
        found: _Candidates,
        photo: _Cells,
        batch_pixels: int,
    ) -> None:
        """Paint the patches of cells, a batch at a time."""
        rows, columns = photo.rows, photo.columns
        size = rows.longest, columns.longest
        basis = _basis(*size)
        step = max(1, batch_pixels // basis.shape[1])
        places = self._places(rows, columns) if photo.are_small else None
        for start in range(0, len(found.cells), step):
            candidates = found[start : start + step]
            patches = patches_of(_Batch.of(candidates, photo, basis))
            row, column = np.divmod(candidates.cells, len(columns.size))
            top, left = rows.start[row], columns.start[column]
            if places is not None:
                kinds = rows.kind[row] * len(columns.sizes) + columns.kind[column]
                chosen = places.take(kinds, axis=0)
                chosen += (top * self.image.shape[1] + left)[:, None]
                # Pixels outside their cell are written to one outside the image.
                self.pixels[np.minimum(chosen, self.image.size, out=chosen)] = patches
                continue
            boxes = np.stack((top, rows.stop[row], left, columns.stop[column]), axis=1)
            patches = patches.reshape(-1, *size)
            for (y, bottom, x, right), patch in zip(boxes.tolist(), patches, strict=True):
                self.image[y:bottom, x:right] = patch[: bottom - y, : right - x]

    def _places(self, rows: _Axis, columns: _Axis) -> npt.NDArray[np.intp]:
        """Places of a patch's pixels after the first one: ``(kinds, pixels)``.

        A kind is a height and a width; pixels outside a cell of that kind are `_OUTSIDE`.
        """
        t, u = np.arange(rows.longest)[:, None], np.arange(columns.longest)
        inside = (t < rows.sizes[:, None, None, None]) & (u < columns.sizes[:, None, None])
        places = np.where(inside, t * self.image.shape[1] + u, _OUTSIDE)
        return places.reshape(-1, rows.longest * columns.longest)
