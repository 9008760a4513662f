"""The field's segmentation metrics, all from one confusion matrix over a whole set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.voc import CLASSES, IGNORE_INDEX


@dataclass
class ConfusionMatrix:
    """Pixels counted by (truth, prediction) over a set; void pixels of the truth are skipped.

    The metrics are those of Long, Shelhamer, Darrell (2015), section 5. All are in [0, 1].
    """

    counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    )

    def update(self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> None:
        """Count one image. Both are (H, W) uint8 class ids; the truth may hold 255.

        Raises:
            ValueError: the shapes differ, or the prediction holds anything but class ids.
        """
        if truth.shape != prediction.shape:
            raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}")
        if prediction.max(initial=0) >= len(CLASSES):
            raise ValueError(f"prediction holds {int(prediction.max())}, which is no class id")
        known = truth != IGNORE_INDEX
        pairs = truth[known].astype(np.int64) * len(CLASSES) + prediction[known]
        self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)

    def iou(self) -> NDArray[np.float64]:
        """Per-class intersection over union, (21,); NaN where neither side has a pixel."""
        hits = np.diag(self.counts)
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - hits
        with np.errstate(invalid="ignore"):
            return np.asarray(hits / union, dtype=np.float64)

    def mean_iou(self) -> float:
        """Mean of the per-class IoU over the classes that occur."""
        return float(np.nanmean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Share of the pixels that are right."""
        return float(np.diag(self.counts).sum() / self.counts.sum())

    def mean_accuracy(self) -> float:
        """Mean over the classes of the truth of the share of their pixels that are right."""
        with np.errstate(invalid="ignore"):
            return float(np.nanmean(np.diag(self.counts) / self.counts.sum(axis=1)))

    def frequency_weighted_iou(self) -> float:
        """Per-class IoU weighted by the share of the truth's pixels."""
        share = self.counts.sum(axis=1) / self.counts.sum()
        return float((share * np.nan_to_num(self.iou())).sum())
