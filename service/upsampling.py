"""Logits to class ids at the photo's own size, exact and in bounded memory.

One bilinear interpolation with half-pixel centres (``align_corners=False``) takes the valid
region of the logits straight to the photo's pixels; the argmax comes after it, so labels are
never resized. Interpolation is separable: photo = rows @ logits @ columns, with two weights in
each row of either matrix. It runs in stripes of rows, so that a 50-megapixel photo needs no
more memory than its mask and one stripe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from service.preprocessing import Geometry

STRIPE_BYTES: Final = 16 * 2**20
"""About the size of the largest array that a stripe makes: (C, rows, tile) float32."""

TILE_WIDTH: Final = 4096
"""Columns worked on at once, for photos that are one pixel high and millions wide."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What upsampling gives.

    ``mask``: ``(H, W) uint8`` class ids. ``confidence``: ``(C,) float64``, for each class the mean
    over its pixels of the softmax probability of the winner, in [0, 1], and 0 for classes without
    pixels; None where it was not asked for.
    """

    mask: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.float64] | None


def upsample(
    logits: npt.NDArray[np.float32],
    geometry: Geometry,
    *,
    with_confidence: bool = False,
    stripe_bytes: int = STRIPE_BYTES,
    tile_width: int = TILE_WIDTH,
) -> Labels:
    """Upsample one photo's logits and take the argmax; ties go to the lower class id.

    ``logits``: ``(C, h, w) float32`` of the padded input, C at most 256. Returns `Labels` of size
    ``geometry.photo``.
    """
    height, width = geometry.photo
    classes, logits_height, logits_width = logits.shape
    vertical = _Axis(height, geometry.resized[0], geometry.padded[0], logits_height)
    horizontal = _Axis(width, geometry.resized[1], geometry.padded[1], logits_width)

    mask = np.empty((height, width), dtype=np.uint8)
    sums = np.zeros(classes) if with_confidence else None
    for left in range(0, width, tile_width):
        right = min(left + tile_width, width)
        columns = np.ascontiguousarray(horizontal.weights(left, right).T)  # (w, tile)
        # A photo narrower than its logits goes the other way round, which then is less work.
        narrow = right - left < logits_width
        source = np.matmul(logits, columns) if narrow else logits
        step = max(1, stripe_bytes // (4 * classes * (right - left)))
        for top in range(0, height, step):
            bottom = min(top + step, height)
            stripe = np.matmul(vertical.weights(top, bottom), source)  # (C, rows, w or tile)
            if not narrow:
                flat = stripe.reshape(-1, logits_width) @ columns
                stripe = flat.reshape(classes, bottom - top, right - left)
            ids, best = _argmax(stripe)
            mask[top:bottom, left:right] = ids
            if sums is not None:
                sums += _winner_sums(stripe, ids, best)
    if sums is None:
        return Labels(mask, None)
    pixels = np.bincount(mask.ravel(), minlength=classes)
    return Labels(mask, sums / np.maximum(pixels, 1))


def _argmax(
    stripe: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Class ids ``(rows, W) uint8`` and their values of ``(C, rows, W)`` logits.

    A running maximum over the classes walks whole planes in order, which `np.argmax` over the
    first axis does not.
    """
    best = stripe[0].copy()
    ids = np.zeros(best.shape, dtype=np.uint8)
    for index, plane in enumerate(stripe[1:], start=1):
        np.copyto(ids, np.uint8(index), where=plane > best)
        np.maximum(best, plane, out=best)
    return ids, best


def _winner_sums(
    stripe: npt.NDArray[np.float32],
    ids: npt.NDArray[np.uint8],
    best: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """For each class ``(C,)`` the summed softmax probabilities of its pixels; eats ``stripe``."""
    stripe -= best
    np.exp(stripe, out=stripe)
    # The winner's own exponential is exp(0) = 1.
    winner = 1.0 / stripe.sum(axis=0)
    sums = np.bincount(ids.ravel(), weights=winner.ravel(), minlength=len(stripe))
    return sums.astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis in pixels: of the photo, resized, padded; and in logits."""

    photo: int
    resized: int
    padded: int
    logits: int

    def weights(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Bilinear weights of photo pixels ``start`` to ``stop``: ``(stop - start, logits)``.

        Pixel ``y`` samples logits coordinate ``(y + 0.5) * resized / (photo * stride) - 0.5``,
        clamped to the logits, where the stride is ``padded / logits``.
        """
        stride = self.padded / self.logits
        position = (np.arange(start, stop) + 0.5) * (self.resized / (self.photo * stride)) - 0.5
        position = position.clip(0, self.logits - 1)
        low = np.floor(position).astype(np.intp)
        high = np.minimum(low + 1, self.logits - 1)
        fraction = (position - low).astype(np.float32)
        weights = np.zeros((stop - start, self.logits), dtype=np.float32)
        pixel = np.arange(stop - start)
        weights[pixel, low] = 1 - fraction
        weights[pixel, high] += fraction
        return weights
