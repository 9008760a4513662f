"""Outlines as COCO polygons, judged by pycocotools' rasteriser."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco  # type: ignore[import-untyped]
from scipy.ndimage import uniform_filter  # type: ignore[import-untyped]
from skimage import data
from skimage.measure import label

from service.artefact.preprocessing import Geometry
from service.images.polygons import TOLERANCE, trace_polygons
from service.images.runs import Runs
from service.inference.upsampling import upsample

Mask = npt.NDArray[np.uint8]
Rings = list[list[float]]

NOISE = arrays(
    np.uint8,
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    elements=st.sampled_from([0, 8, 15]),
)


def trace(mask: Mask, tolerance: float = TOLERANCE) -> dict[int, Rings]:
    """Trace the rings of all classes that are present."""
    return trace_polygons(mask, Runs.of(mask), np.unique(mask).tolist(), tolerance)


def fill(rings: Rings, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Fill a class's rings with COCO's own rasteriser."""
    filled: npt.NDArray[np.uint8] = coco.decode(coco.merge(coco.frPyObjects(rings, *shape)))
    return filled.astype(np.bool_)


def iou(rings: Rings, region: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of a region and its filled rings."""
    filled = fill(rings, region.shape)
    return float((filled & region).sum() / (filled | region).sum())


def blobs(seed: int, height: int, width: int, grid: int = 8, classes: int = 4) -> Mask:
    """Make a mask like a network's: the argmax of a few smooth fields."""
    logits = np.random.default_rng(seed).normal(size=(classes, grid, grid)).astype(np.float32)
    geometry = Geometry.plan((height, width), grid * 16, ((grid * 16, grid * 16),))
    return upsample(logits, geometry).mask


@settings(deadline=None, max_examples=200)
@given(NOISE)
def test_exact_outlines_are_the_mask(mask: Mask) -> None:
    """Every pixel of every class, with holes in holes and pixels that touch at corners."""
    for class_id, rings in trace(mask, 0).items():
        assert np.array_equal(fill(rings, mask.shape), mask == class_id)


@settings(deadline=None, max_examples=200)
@given(NOISE)
def test_simplified_outlines_of_noise(mask: Mask) -> None:
    """At least 98 % IoU for each class, however small and ragged."""
    for class_id, rings in trace(mask).items():
        assert iou(rings, mask == class_id) >= 0.98


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300), st.integers(2, 12))
def test_simplified_outlines_of_blobs(seed: int, height: int, width: int, grid: int) -> None:
    """At least 98 % IoU for masks like a network's, at any size."""
    mask = blobs(seed, height, width, grid)
    for class_id, rings in trace(mask).items():
        assert iou(rings, mask == class_id) >= 0.98
        for ring in rings:
            assert len(ring) >= 6
            x, y = np.array(ring).reshape(-1, 2).T
            assert min(x.min(), y.min()) >= 0
            assert x.max() <= width
            assert y.max() <= height


@settings(deadline=None, max_examples=150)
@given(
    st.floats(0, np.pi),
    st.floats(0.6, 25),
    st.floats(1, 80),
    st.sampled_from(["box", "ellipse"]),
    st.integers(0, 119),
    st.integers(0, 119),
)
def test_simplified_outlines_of_slanted_shapes(
    angle: float, height: float, width: float, shape: str, top: int, left: int
) -> None:
    """At least 98 % IoU for boxes and ellipses at any angle, thin ones included."""
    y, x = np.mgrid[:120, :120]
    across = ((y - top) * np.cos(angle) + (x - left) * np.sin(angle)) / height
    along = ((x - left) * np.cos(angle) - (y - top) * np.sin(angle)) / width
    inside = np.maximum(abs(across), abs(along)) < 1 if shape == "box" else across**2 + along**2 < 1
    mask = inside.astype(np.uint8)
    for class_id, rings in trace(mask).items():
        assert iou(rings, mask == class_id) >= 0.98


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 9), st.floats(0.4, 0.6))
def test_simplified_outlines_of_ragged_shapes(seed: int, smoothing: int, level: float) -> None:
    """At least 98 % IoU for noise at any scale."""
    noise = uniform_filter(np.random.default_rng(seed).random((80, 100)), smoothing)
    mask = (noise > level).astype(np.uint8)
    for class_id, rings in trace(mask).items():
        assert iou(rings, mask == class_id) >= 0.98


@pytest.mark.parametrize("period", [2, 3, 5, 9])
@pytest.mark.parametrize("side", [10, 20, 40, 90])
def test_simplified_outlines_of_teeth(period: int, side: int) -> None:
    """At least 98 % IoU where every line replaces a row of teeth one pixel high."""
    mask = np.zeros((side + 4, side + 4), dtype=np.uint8)
    mask[2:-2, 2:-2] = 7
    for start in range(2, side + 2, period):
        tooth = slice(start, start + max(1, period // 2))
        mask[1, tooth] = mask[-2, tooth] = mask[tooth, 1] = mask[tooth, -2] = 7
    for class_id, rings in trace(mask).items():
        assert iou(rings, mask == class_id) >= 0.98


def test_simplified_outlines_are_short() -> None:
    """At VOC's size, fewer than a quarter of the exact outlines' corners."""
    mask = blobs(0, 375, 500)
    assert _corners(trace(mask)) < _corners(trace(mask, 0)) / 4


def test_a_silhouette() -> None:
    """scikit-image's horse, a real outline (CC0), takes fewer than a fifth of the corners."""
    mask: Mask = np.where(data.horse(), 0, 13).astype(np.uint8)  # type: ignore[no-untyped-call]
    simple = trace(mask)
    assert iou(simple[13], mask == 13) > 0.98
    assert _corners(simple) < _corners(trace(mask, 0)) / 5


def _corners(traced: dict[int, Rings]) -> int:
    return sum(len(ring) for rings in traced.values() for ring in rings) // 2


def test_what_is_left_out_is_near_to_what_stays() -> None:
    """No corner of the exact outline is farther than the tolerance and half a stair away."""
    mask = blobs(3, 120, 160)
    for class_id, rings in trace(mask, 0).items():
        start = np.concatenate([_points(ring) for ring in trace(mask)[class_id]])
        end = np.concatenate([np.roll(_points(ring), -1, 0) for ring in trace(mask)[class_id]])
        chord = end - start
        for point in np.concatenate([_points(ring) for ring in rings]):
            length = np.maximum((chord**2).sum(axis=1), 1e-9)
            along = (((point - start) * chord).sum(axis=1) / length).clip(0, 1)
            apart = np.hypot(*(point - start - along[:, None] * chord).T).min()
            assert apart <= TOLERANCE + 0.5


def _points(ring: list[float]) -> npt.NDArray[np.float64]:
    return np.array(ring).reshape(-1, 2)


@settings(deadline=None)
@given(NOISE)
def test_one_ring_for_each_region(mask: Mask) -> None:
    """4-connected ones, the largest first; holes belong to theirs."""
    for class_id, rings in trace(mask, 0).items():
        regions = label(mask == class_id, connectivity=1)  # type: ignore[no-untyped-call]
        sizes = np.sort(np.bincount(regions.ravel())[1:])[::-1]
        assert len(rings) == len(sizes)
        filled = [int(fill([ring], mask.shape).sum()) for ring in rings]
        assert sorted(filled, reverse=True) == sizes.tolist()


def test_a_hole_is_cut_to_the_outline() -> None:
    """By a bridge that is walked there and back; the region in the hole has its own ring."""
    mask = np.full((9, 9), 8, dtype=np.uint8)
    mask[2:7, 2:7] = 0
    mask[4, 4] = 8
    rings = trace(mask, 0)[8]
    outer, inner = (list(zip(ring[0::2], ring[1::2], strict=True)) for ring in rings)
    assert inner == [(4, 4), (5, 4), (5, 5), (4, 5)]
    bridge = outer.index((2, 0))
    assert outer[bridge : bridge + 7] == [
        *[(2, 0), (2, 2), (2, 7)],
        *[(7, 7), (7, 2), (2, 2)],
        (2, 0),
    ]
    assert fill(rings, mask.shape).sum() == 81 - 25 + 1


def test_rectangles_are_rectangles() -> None:
    """Four corners at whole numbers, on the borders of the pixels."""
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:, 3:7] = 15
    assert trace(mask)[15] == [[3, 5, 7, 5, 7, 20, 3, 20]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1)])
def test_thin_masks(shape: tuple[int, int]) -> None:
    """One class, to the borders."""
    (ring,) = trace(np.full(shape, 7, dtype=np.uint8))[7]
    height, width = shape
    assert ring == [0, 0, width, 0, width, height, 0, height]


def test_stripes_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rings do not depend on where stripes begin."""
    mask = blobs(1, 90, 70)
    whole = trace(mask)
    monkeypatch.setattr("service.images.stripes.STRIPE_BYTES", 1)
    assert trace(mask) == whole


def test_only_the_classes_that_are_asked_for() -> None:
    """A class without pixels has no rings."""
    mask = np.zeros((4, 4), dtype=np.uint8)
    assert trace_polygons(mask, Runs.of(mask), [15]) == {15: []}
    assert list(trace_polygons(mask, Runs.of(mask), [15, 0])) == [15, 0]
    assert trace_polygons(mask, Runs.of(mask), []) == {}


@pytest.mark.parametrize("most", [1, 7, 60])
@settings(deadline=None, max_examples=50)
@given(mask=NOISE)
def test_of_too_many_outlines_the_largest_are_kept(most: int, mask: Mask) -> None:
    """Regions and holes; no kept ring runs into a dropped one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.images.outlines.MAX_RINGS", most)
        kept = trace(mask, 0)
    for class_id, rings in trace(mask, 0).items():
        assert 1 <= len(kept[class_id]) <= min(most, len(rings))
        mine, all_of_it = (
            max(_filled_areas(found, mask.shape)) for found in (kept[class_id], rings)
        )
        # Dropped holes are filled.
        assert mine >= all_of_it


def _filled_areas(rings: Rings, shape: tuple[int, ...]) -> Iterable[int]:
    return [int(fill([ring], shape).sum()) for ring in rings]


def test_noise_is_bounded() -> None:
    """A class of nothing but speckles has MAX_RINGS outlines."""
    mask = np.random.default_rng(0).integers(0, 21, (200, 300), dtype=np.uint8)
    assert max(len(rings) for rings in trace(mask).values()) == 1000
