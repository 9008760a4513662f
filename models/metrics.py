"""The standard segmentation metrics, computed from confusion matrices over a whole set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from service.artefact.voc import IGNORE_INDEX, NUM_CLASSES

BAND_WIDTHS: Final = (1, 2, 4, 8, 16, 32)
"""Pixels. Each width is twice the previous one, which `boundary_rings` requires."""

RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95
BOOTSTRAP_SEED: Final = 0


@dataclass
class ConfusionMatrix:
    """Pixels counted by (truth, prediction) over a set; void pixels of the truth are skipped.

    ``counts`` is ``(C, C)``, C the number of classes: by default VOC's. The metrics follow Long,
    Shelhamer, Darrell (2015), section 5. All are in [0, 1].
    """

    counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=np.int64)
    )

    @classmethod
    def empty(cls, classes: int) -> Self:
        """Return a matrix for that many classes, without pixels."""
        return cls(np.zeros((classes, classes), dtype=np.int64))

    def update(self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> None:
        """Count one image. Both are (H, W) uint8 class ids; the truth may contain 255.

        Raises:
            ValueError: the shapes differ, or the prediction has a value that is not a class id.
        """
        known = _known_pixels(truth, prediction, len(self.counts))
        self.counts += _histogram(self.counts.shape, truth[known], prediction[known])

    def iou(self) -> NDArray[np.float64]:
        """Per-class intersection over union, (C,); NaN where neither side has a pixel."""
        return iou(self.counts)

    def mean_iou(self) -> float:
        """Mean of the per-class IoU over the classes that occur."""
        return float(mean_iou(self.counts))

    def pixel_accuracy(self) -> float:
        """Share of the pixels that are correct."""
        return float(np.diag(self.counts).sum() / self.counts.sum())

    def mean_accuracy(self) -> float:
        """Share of correct pixels of each class in the truth, averaged over these classes."""
        with np.errstate(invalid="ignore"):
            return float(np.nanmean(np.diag(self.counts) / self.counts.sum(axis=1)))

    def frequency_weighted_iou(self) -> float:
        """Per-class IoU weighted by the share of the truth's pixels."""
        share = self.counts.sum(axis=1) / self.counts.sum()
        return float((share * np.nan_to_num(self.iou())).sum())


def iou(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Per-class intersection over union of each confusion matrix.

    Args:
        counts: ``(..., C, C)``, pixels by (truth, prediction).

    Returns:
        ``(..., C)`` float64 in [0, 1]; NaN where neither side has a pixel.
    """
    return _ratio(*_overlap(counts))


def mean_iou(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Mean of the per-class IoU over the classes that occur in truth or prediction.

    Args:
        counts: ``(..., C, C)``, pixels by (truth, prediction).

    Returns:
        ``(...)`` float64 in [0, 1]; NaN where a matrix is empty.
    """
    return _mean(iou(counts))


def _overlap(counts: NDArray[np.number]) -> tuple[NDArray[np.number], NDArray[np.number]]:
    """Each class's pixels in both truth and prediction, and in either: ``(..., C)`` each."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return hits, counts.sum(axis=-2) + counts.sum(axis=-1) - hits


def _ratio(hits: NDArray[np.number], union: NDArray[np.number]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(hits / union, dtype=np.float64)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the last axis without NaN; NaN where there is nothing else."""
    return _ratio(np.nansum(values, axis=-1), np.count_nonzero(~np.isnan(values), axis=-1))


def boundary_rings(truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the narrowest of `BAND_WIDTHS` that contains each pixel: its distance to a boundary.

    A pixel is in the band of width w if the square of ``2 * w + 1`` pixels around it contains
    another label than its own. Void is a label; pixels outside the image are not.
    Where VOC draws void between regions, this is the trimap of Chen et al., "DeepLab" (2015),
    as their ``MyVOCevalsegBoundary.m`` dilates void. Where regions touch, as in SBD's masks, it is
    the band around their edge (Kohli, Ladicky, Torr 2009).

    Args:
        truth: (H, W) uint8 class ids or 255.

    Returns:
        (H, W) uint8 indices into `BAND_WIDTHS`; its length for pixels farther from a boundary.
    """
    rings = np.full(truth.shape, len(BAND_WIDTHS), dtype=np.uint8)
    lowest = highest = truth
    reach = 0
    for width in BAND_WIDTHS:
        # Overlapping squares cover the larger one, so that a few shifts suffice for any width.
        lowest = _spread(lowest, width - reach, np.minimum)
        highest = _spread(highest, width - reach, np.maximum)
        rings -= lowest != highest
        reach = width
    return rings


def confusion_by_ring(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], classes: int
) -> NDArray[np.int64]:
    """Count one image's pixels per ring of `boundary_rings`; void in the truth is skipped.

    Args:
        truth: (H, W) uint8 class ids or 255.
        prediction: (H, W) uint8 class ids.
        classes: their number, C.

    Returns:
        ``(len(BAND_WIDTHS) + 1, C, C)`` int64, pixels by (ring, truth, prediction). Their sum is
        the whole image; the sum of the first k is the band of the k-th width.

    Raises:
        ValueError: the shapes differ, or the prediction has a value that is not a class id.
    """
    known = _known_pixels(truth, prediction, classes)
    shape = (len(BAND_WIDTHS) + 1, classes, classes)
    return _histogram(shape, boundary_rings(truth)[known], truth[known], prediction[known])


def bootstrap_intervals(
    images: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return confidence intervals of mean and per-class IoU over the choice of images.

    Percentile bootstrap (Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13):
    the images are resampled with replacement `RESAMPLES` times with a fixed seed, and the IoU of
    the summed matrices is computed each time.

    Args:
        images: ``(N, C, C)``, the confusion matrix of each image.

    Returns:
        ``(2,)`` and ``(2, C)`` float64: lower and upper end for the mean IoU and for each class
        at `CONFIDENCE`; NaN for a class that does not occur.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    # A sum depends only on how often each image is drawn.
    draws = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), size=RESAMPLES)
    # Not whole matrices: two thousand of 150 classes would need 360 MB.
    resampled = _ratio(*(draws.astype(np.float64) @ part for part in _overlap(images)))
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    occurring = ~np.isnan(iou(images.sum(axis=0)))
    per_class = np.full((2, len(occurring)), np.nan)
    per_class[:, occurring] = np.nanquantile(resampled[:, occurring], ends, axis=0)
    return np.quantile(_mean(resampled), ends), per_class


def _known_pixels(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], classes: int
) -> NDArray[np.bool_]:
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}")
    if prediction.max(initial=0) >= classes:
        raise ValueError(f"prediction contains {int(prediction.max())}, which is not a class id")
    known: NDArray[np.bool_] = truth != IGNORE_INDEX
    return known


def _histogram(shape: tuple[int, ...], *indices: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count each combination of indices in an array of that shape."""
    flat = np.ravel_multi_index(indices, shape)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)


def _spread(labels: NDArray[np.uint8], by: int, extreme: np.ufunc) -> NDArray[np.uint8]:
    """Each pixel's extreme over itself and the pixels ``by`` rows and columns around it."""
    for axis in (0, 1):
        lines = np.moveaxis(labels, axis, 0)
        spread = lines.copy(order="K")
        extreme(spread[by:], lines[:-by], out=spread[by:])
        extreme(spread[:-by], lines[by:], out=spread[:-by])
        labels = np.moveaxis(spread, 0, axis)
    return labels
