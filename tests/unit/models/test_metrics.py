"""The metrics against figures worked out by hand."""

import numpy as np
import pytest

from models.metrics import ConfusionMatrix
from service.voc import CLASSES


def matrix_of(truth: list[int], prediction: list[int]) -> ConfusionMatrix:
    """One image of one row."""
    matrix = ConfusionMatrix()
    matrix.update(np.array([truth], np.uint8), np.array([prediction], np.uint8))
    return matrix


def test_metrics_of_a_small_example() -> None:
    """Truth 0,0,0,8,8; two background and one cat right."""
    matrix = matrix_of([0, 0, 0, 8, 8], [0, 0, 8, 8, 0])
    iou = matrix.iou()
    assert iou[0] == pytest.approx(2 / 4)
    assert iou[8] == pytest.approx(1 / 3)
    assert np.isnan(np.delete(iou, [0, 8])).all()
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert matrix.pixel_accuracy() == pytest.approx(3 / 5)
    assert matrix.mean_accuracy() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert matrix.frequency_weighted_iou() == pytest.approx(3 / 5 / 2 + 2 / 5 / 3)


def test_void_pixels_do_not_count() -> None:
    """Whatever is predicted there."""
    assert matrix_of([0, 255, 255], [0, 8, 0]).counts.sum() == 1


def test_one_matrix_over_the_whole_set() -> None:
    """Images add up; it is not a mean of per-image figures."""
    matrix = matrix_of([0, 8], [0, 8])
    matrix.update(np.full((1, 8), 8, np.uint8), np.zeros((1, 8), np.uint8))
    assert matrix.iou()[8] == pytest.approx(1 / 9)


def test_a_class_only_predicted_counts_as_zero() -> None:
    """A hallucinated class pulls the mean down."""
    matrix = matrix_of([0, 0], [0, 8])
    assert matrix.iou()[8] == 0
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 0) / 2)


def test_shapes_and_ids_are_checked() -> None:
    """A mask of another size, or holding void, is a mistake of the caller."""
    with pytest.raises(ValueError, match="truth is"):
        ConfusionMatrix().update(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="no class id"):
        matrix_of([0], [len(CLASSES)])
