"""The metrics compared with figures computed by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from models.metrics import (
    BAND_WIDTHS,
    ConfusionMatrix,
    bootstrap_intervals,
    boundary_rings,
    confusion_by_ring,
    mean_iou,
)
from service.artefact.voc import CLASSES, IGNORE_INDEX, NUM_CLASSES

MASKS = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 6), st.integers(1, 40)),
    elements=st.sampled_from([0, 8, IGNORE_INDEX]),
    fill=st.just(0),
)
"""Mostly background, so that bands of every width occur."""


def matrix_of(truth: list[int], prediction: list[int]) -> ConfusionMatrix:
    """One image of one row."""
    matrix = ConfusionMatrix()
    matrix.update(np.array([truth], np.uint8), np.array([prediction], np.uint8))
    return matrix


def test_metrics_of_a_small_example() -> None:
    """Truth 0,0,0,8,8; two background pixels and one cat pixel correct."""
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
    """Pixels are summed over images; it is not a mean of per-image figures."""
    matrix = matrix_of([0, 8], [0, 8])
    matrix.update(np.full((1, 8), 8, np.uint8), np.zeros((1, 8), np.uint8))
    assert matrix.iou()[8] == pytest.approx(1 / 9)


def test_a_class_only_predicted_counts_as_zero() -> None:
    """A hallucinated class pulls the mean down."""
    matrix = matrix_of([0, 0], [0, 8])
    assert matrix.iou()[8] == 0
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 0) / 2)


def test_shapes_and_ids_are_checked() -> None:
    """A mask of another size, or with void, is the caller's error."""
    with pytest.raises(ValueError, match="truth is"):
        ConfusionMatrix().update(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="not a class id"):
        matrix_of([0], [len(CLASSES)])


def image_of(right: int, as_cat: int) -> NDArray[np.int64]:
    """(21, 21): the confusion matrix of a background image, part of it predicted as cat."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    counts[0, 0], counts[0, 8] = right, as_cat
    return counts


def test_equal_images_leave_nothing_to_chance() -> None:
    """Every resample has the same IoU: intervals of zero width, NaN for absent classes."""
    mean, per_class = bootstrap_intervals(np.stack([image_of(3, 1)] * 5))
    assert mean == pytest.approx(3 / 8)
    assert per_class[:, 0] == pytest.approx(3 / 4)
    assert per_class[:, 8] == pytest.approx(0)
    assert np.isnan(np.delete(per_class, [0, 8], axis=1)).all()


def test_the_interval_is_that_of_the_draws() -> None:
    """60 of 100 one-pixel images are correct: the sum is binomial, 60 +- 1.96 * sqrt(24)."""
    images = np.stack([image_of(1, 0)] * 60 + [image_of(0, 1)] * 40)
    mean, per_class = bootstrap_intervals(images)
    expected = (60 + np.array([-1, 1]) * 1.96 * np.sqrt(24)) / 100
    assert per_class[:, 0] == pytest.approx(expected, abs=0.015)
    assert mean == pytest.approx(expected / 2, abs=0.0075)


def test_the_interval_holds_the_estimate_and_stays_the_same() -> None:
    """The seed is fixed: a report is reproducible to the bit."""
    images = np.random.default_rng(0).integers(0, 100, (30, len(CLASSES), len(CLASSES)))
    (low, high), _ = bootstrap_intervals(images)
    assert low < mean_iou(images.sum(axis=0)) < high
    assert bootstrap_intervals(images)[0].tolist() == [low, high]


@settings(deadline=None)
@given(MASKS)
def test_rings_as_by_the_distance_to_another_label(truth: NDArray[np.uint8]) -> None:
    """The Chebyshev distance to the nearest pixel of another label, void included."""
    rows, columns = np.indices(truth.shape).reshape(2, -1, 1)
    distance = np.maximum(abs(rows - rows.T), abs(columns - columns.T)).astype(float)
    distance[truth.reshape(-1, 1) == truth.reshape(-1)] = np.inf
    expected = np.searchsorted(BAND_WIDTHS, distance.min(axis=1)).reshape(truth.shape)
    assert np.array_equal(boundary_rings(truth), expected)
    assert np.array_equal(boundary_rings(truth.T), expected.T)


@settings(deadline=None)
@given(MASKS, st.integers(0, len(CLASSES) - 1))
def test_rings_add_up_to_the_image(truth: NDArray[np.uint8], predicted: int) -> None:
    """Every pixel counts once, except void."""
    prediction = np.full_like(truth, predicted)
    matrix = ConfusionMatrix()
    matrix.update(truth, prediction)
    assert np.array_equal(
        confusion_by_ring(truth, prediction, NUM_CLASSES).sum(axis=0), matrix.counts
    )


def test_bands_of_a_straight_edge() -> None:
    """Cat beside a void line of 2: a band of w columns on either side, without void."""
    truth = np.full((50, 102), 8, dtype=np.uint8)
    truth[:, :50], truth[:, 50:52] = 0, IGNORE_INDEX
    # Wrong in the 4 columns left of the line.
    prediction = np.where(np.arange(102) < 46, 0, 8)[None].repeat(50, axis=0).astype(np.uint8)
    bands = confusion_by_ring(truth, prediction, NUM_CLASSES).cumsum(axis=0)
    for band, width in zip(bands, (*BAND_WIDTHS, 50), strict=True):
        wrong = min(4, width)
        assert band.sum() == 50 * 2 * width
        iou = ((width - wrong) / width, width / (width + wrong))
        assert mean_iou(band) == pytest.approx(np.mean(iou))


def test_shapes_and_ids_are_checked_by_ring_too() -> None:
    """As for the whole image."""
    with pytest.raises(ValueError, match="truth is"):
        confusion_by_ring(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), NUM_CLASSES)
    with pytest.raises(ValueError, match="not a class id"):
        confusion_by_ring(np.zeros((1, 1), np.uint8), np.full((1, 1), 255, np.uint8), NUM_CLASSES)


def test_a_matrix_has_its_label_sets_classes() -> None:
    """Whole and by ring: class 4 of five counts, 5 is not a class id."""
    truth, prediction = np.array([[0, 4, 255]], np.uint8), np.array([[0, 4, 1]], np.uint8)
    matrix = ConfusionMatrix.empty(5)
    matrix.update(truth, prediction)
    assert matrix.counts.shape == (5, 5)
    assert matrix.mean_iou() == 1
    assert np.array_equal(confusion_by_ring(truth, prediction, 5).sum(axis=0), matrix.counts)
    with pytest.raises(ValueError, match="5, which is not a class id"):
        matrix.update(truth, np.full_like(truth, 5))
    with pytest.raises(ValueError, match="5, which is not a class id"):
        confusion_by_ring(truth, np.full_like(truth, 5), 5)
