"""Logits to class ids at the photo's own size, exact and in bounded memory.

One bilinear interpolation with half-pixel centres (``align_corners=False``) maps the valid region
of the logits to the photo's pixels. The argmax follows, so labels are never resized. Only a few of
the interpolated values are computed:

* Four neighbouring logits are the corners of a cell of the photo. Each pixel of the cell is a
  convex combination of them, so a class that leads at all four corners leads at every pixel, and
  the cell is filled without arithmetic. On usual photos this is true for 75 to 95 % of the cells.
* For the same reason, a class that is below the same other class at all four corners cannot win in
  the cell. The two or three remaining candidates are interpolated: ``rows @ corners @ columns``
  with the weights ``(T, 2)`` and ``(2, T)`` of the cell's pixels and the ``(2, 2)`` corners. Only
  differences to the first candidate matter, so it needs no interpolation.
* The softmax also depends on differences only. A class is skipped if it is so far below another one
  at all four corners that it cannot change a confidence by a fraction of 1/255.

Cells are processed in batches of about `BATCH_PIXELS`. Noisy logits, where every class is a
candidate in every cell, cost time but no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from service.artefact.preprocessing import Geometry

BATCH_PIXELS: Final = 2**16
"""Pixels interpolated at once: few enough for a core's cache, enough to keep calls few."""

PART_PIXELS: Final = 2**20
"""Pixels counted at once."""

CELL_SIDE: Final = 512
"""Longest side of a cell in pixels; longer cells are cut to bound the size of a batch."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Class ids and confidences of a photo's pixels.

    ``mask``: ``(H, W) uint8`` class ids. ``confidence``: ``(H, W) uint8``, the softmax probability
    of the pixel's class in 255ths, off by one at most; None if it was not asked for.
    """

    mask: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.uint8] | None

    def class_confidence(self) -> npt.NDArray[np.float64]:
        """Mean confidence of each class over its own pixels.

        Returns ``(256,) float64`` in [0, 1], indexed by class id; 0 for classes without pixels, and
        for all classes without `confidence`.
        """
        histogram = np.zeros((256, 256))
        if self.confidence is not None:
            mask, confidence = self.mask.ravel(), self.confidence.ravel()
            # In parts, because np.bincount takes 8 bytes per pixel.
            for start in range(0, mask.size, PART_PIXELS):
                pairs = mask[start : start + PART_PIXELS].astype(np.uint16) * 256
                pairs += confidence[start : start + PART_PIXELS]
                histogram += np.bincount(pairs, minlength=256 * 256).reshape(256, 256)
        levels = np.arange(256) / 255
        means: npt.NDArray[np.float64] = histogram @ levels / histogram.sum(axis=1).clip(1)
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
    flat = logits.reshape(classes, -1)
    winners = flat.argmax(axis=0).astype(np.uint8)[corners]
    mixed = np.flatnonzero((winners != winners[0]).any(axis=0))
    fill = winners[0].reshape(len(rows.size), -1)
    mask = fill.repeat(columns.size, axis=1).repeat(rows.size, axis=0)
    confidence = np.full_like(mask, 255) if with_confidence else None
    # One photo's infinite logits must not fail the others of its batch.
    with np.errstate(all="ignore"):
        found = _possible_winners(flat.take(corners[:, mixed], axis=1))
        _paint(mask, _winners, found, mixed, rows, columns, batch_pixels)
        if confidence is not None:
            found = _contributors(flat.take(corners, axis=1))
            everywhere = np.arange(corners.shape[1])
            _paint(confidence, _confidences, found, everywhere, rows, columns, batch_pixels)
    return Labels(mask, confidence)


@dataclass(frozen=True, slots=True)
class _Axis:
    """The cells along one axis of a photo, in order.

    ``corners``: ``(2, cells)`` the logits before and after each; twice the same at the border.
    ``start`` and ``stop``: ``(cells,)`` the pixels of each. The position of pixel ``start + t``
    between its two logits is ``offset + t * step``, in [0, 1].
    """

    corners: npt.NDArray[np.intp]
    start: npt.NDArray[np.intp]
    stop: npt.NDArray[np.intp]
    size: npt.NDArray[np.intp]
    offset: npt.NDArray[np.float64]
    step: float

    def weights(self, cells: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Weights of both corners at the cells' pixels: ``(cells, T, 2)``, T the largest size."""
        after = self.offset[cells, None] + self.step * np.arange(self.size.max())
        return np.stack((1 - after, after), axis=-1).astype(np.float32)


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
    return _Axis(corners, start, stop, stop - start, (start + 0.5) * step + 0.5 - cell, step)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The classes to interpolate in each of M cells; cells with most candidates come first.

    ``cells`` and ``counts``: ``(M,)``. ``ids``: ``(K, M) uint8``; the first ``counts[i]`` are the
    candidates of cell i. ``differences``: ``(K, M, 2, 2) float32``, the candidates' logits at the
    corners minus those of the cell's first candidate.
    """

    cells: npt.NDArray[np.intp]
    counts: npt.NDArray[np.intp]
    ids: npt.NDArray[np.uint8]
    differences: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls,
        values: npt.NDArray[np.float32],
        ids: npt.NDArray[np.uint8],
        counts: npt.NDArray[np.intp],
    ) -> Self:
        """Gather the candidates ``ids``: ``(C, cells) uint8`` of cells that have two or more.

        ``values``: ``(C, 4, cells)``.
        """
        cells = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts > 1)]
        counts = counts[cells]
        ids = ids[: counts.max(initial=0), cells]
        chosen = values[ids, :, cells]
        differences = (chosen - chosen[:1]).reshape(*ids.shape, 2, 2)
        return cls(cells, counts, ids, differences)

    def __getitem__(self, batch: slice) -> Self:
        """Some of the cells."""
        counts = self.counts[batch]
        most = counts[0]
        return type(self)(
            self.cells[batch], counts, self.ids[:most, batch], self.differences[:most, batch]
        )


def _excess(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each class's largest lead over one reference class of its cell: ``(C, cells)``.

    ``values``: ``(C, 4, cells)``. The reference is the class that leads at the cell's centre. Any
    other would be correct too, but this one rules out the most classes.
    """
    leader = values.sum(axis=1).argmax(axis=0)
    leading = values[leader, :, np.arange(len(leader))].T
    excess: npt.NDArray[np.float32] = (values - leading).max(axis=1)
    return excess


def _possible_winners(values: npt.NDArray[np.float32]) -> _Candidates:
    """The classes that may win in a cell, ascending; ``values``: ``(C, 4, cells)``."""
    possible = _excess(values) >= 0
    every = np.arange(len(values), dtype=np.uint8)[:, None]
    ids = np.sort(np.where(possible, every, every[-1]), axis=0)
    return _Candidates.of(values, ids, possible.sum(axis=0))


def _contributors(values: npt.NDArray[np.float32]) -> _Candidates:
    """The classes that matter in a cell's softmax, highest first; ``values``: ``(C, 4, cells)``.

    A class's share is at most the exponential of its excess. The smallest shares are skipped while
    their sum is below 0.49 / 255; with rounding, the error stays within 1 / 255.
    """
    excess = _excess(values)
    ids = np.argsort(-excess, axis=0).astype(np.uint8)
    shares = np.exp(np.sort(excess, axis=0)).cumsum(axis=0)
    return _Candidates.of(values, ids, (~(shares < 0.49 / 255)).sum(axis=0))


def _winners(
    some: _Candidates, rows: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """Class ids of cells: ``(M, T, U) uint8``, from weights ``(M, T, 2)`` and ``(M, 2, U)``."""
    ids = np.empty((len(rows), rows.shape[1], columns.shape[2]), dtype=np.uint8)
    ids[:] = some.ids[0, :, None, None]
    best = np.zeros(ids.shape, dtype=np.float32)
    # Reused: page faults of new arrays would cost more than the arithmetic.
    buffer, higher = np.empty_like(best), np.empty_like(ids)
    for nth in range(1, len(some.ids)):
        n = int(np.count_nonzero(some.counts > nth))
        plane = np.matmul(rows[:n], some.differences[nth, :n] @ columns[:n], out=buffer[:n])
        np.greater(plane, best[:n], out=higher[:n].view(np.bool_))
        # Ids ascend, so the last class that is higher has the largest id.
        np.multiply(higher[:n], some.ids[nth, :n, None, None], out=higher[:n])
        np.maximum(ids[:n], higher[:n], out=ids[:n])
        np.maximum(best[:n], plane, out=best[:n])
    return ids


def _confidences(
    some: _Candidates, rows: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """The winner's softmax in 255ths: ``(M, T, U) uint8``; arguments as `_winners` takes them."""
    best = np.zeros((len(rows), rows.shape[1], columns.shape[2]), dtype=np.float32)
    # Only a class that is above the first candidate at a corner can be above it at a pixel.
    higher = (some.differences > 0).any(axis=(2, 3)) & (
        np.arange(len(some.ids))[:, None] < some.counts
    )
    for differences, cells in zip(some.differences, higher, strict=True):
        where = np.flatnonzero(cells)
        plane = rows[where] @ (differences[where] @ columns[where])
        best[where] = np.maximum(best[where], plane)
    total = np.exp(-best)
    buffer = np.empty_like(best)
    for nth in range(1, len(some.ids)):
        n = int(np.count_nonzero(some.counts > nth))
        plane = np.matmul(rows[:n], some.differences[nth, :n] @ columns[:n], out=buffer[:n])
        np.subtract(plane, best[:n], out=plane)
        np.exp(plane, out=plane)
        np.add(total[:n], plane, out=total[:n])
    return (255 / total + 0.5).astype(np.uint8)


def _paint(
    image: npt.NDArray[np.uint8],
    patches_of: Callable[..., npt.NDArray[np.uint8]],
    found: _Candidates,
    cells: npt.NDArray[np.intp],
    rows: _Axis,
    columns: _Axis,
    batch_pixels: int,
) -> None:
    """Paint the patches of cells into ``image``: ``(H, W) uint8``, a batch at a time."""
    row, column = np.divmod(cells[found.cells], len(columns.size))
    boxes = np.stack(
        (rows.start[row], rows.stop[row], columns.start[column], columns.stop[column]), axis=1
    )
    step = max(1, batch_pixels // int(rows.size.max() * columns.size.max()))
    for start in range(0, len(row), step):
        batch = slice(start, start + step)
        patches = patches_of(
            found[batch], rows.weights(row[batch]), columns.weights(column[batch]).swapaxes(1, 2)
        )
        for (top, bottom, left, right), patch in zip(boxes[batch].tolist(), patches, strict=True):
            image[top:bottom, left:right] = patch[: bottom - top, : right - left]
