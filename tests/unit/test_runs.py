"""Run lengths and statistics, compared with pycocotools and with plain counting."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco  # type: ignore[import-untyped]

from service.images.runs import Runs, compress_counts

MASKS = arrays(
    np.uint8,
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    elements=st.sampled_from([0, 8, 15]),
)


@settings(deadline=None)
@given(MASKS)
def test_rle_is_pycocotools(mask: npt.NDArray[np.uint8]) -> None:
    """For every class, present or not, the counts are those pycocotools writes."""
    runs = Runs.of(mask)
    for class_id in (0, 8, 15, 20):
        expected = coco.encode(np.asfortranarray(mask == class_id))
        assert runs.rle(class_id) == expected["counts"].decode()


@settings(deadline=None)
@given(MASKS)
def test_statistics_are_those_of_the_pixels(mask: npt.NDArray[np.uint8]) -> None:
    """Pixels and bounding boxes, counted the plain way; most pixels first."""
    found = Runs.of(mask).statistics()
    assert [one.pixels for one in found] == sorted((one.pixels for one in found), reverse=True)
    assert {one.class_id for one in found} == set(np.unique(mask).tolist())
    for one in found:
        y, x = np.nonzero(mask == one.class_id)
        box = (x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1)
        assert (one.pixels, one.bbox) == (len(x), box)


def test_compressed_counts_of_large_runs() -> None:
    """Several groups per number, and negative differences, are written as pycocotools does."""
    counts = np.array([0, 70_000, 3, 1, 5, 40_000, 2, 99_989])
    pixels = np.repeat([i % 2 for i in range(len(counts))], counts).astype(np.uint8)
    expected = coco.encode(np.asfortranarray(pixels[:, None]))
    assert compress_counts(counts) == expected["counts"].decode()
