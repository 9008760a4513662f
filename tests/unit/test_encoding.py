"""Palette PNG, overlay, run lengths and statistics."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco  # type: ignore[import-untyped]

from service import voc
from service.encoding import (
    Runs,
    compress_counts,
    encode_image,
    encode_mask,
    limit_classes,
    overlay,
)

MASKS = arrays(
    np.uint8,
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    elements=st.sampled_from([0, 8, 15]),
)


def test_mask_png_is_vocs_format() -> None:
    """8-bit, colour type 3, values are class ids, colours are VOC's 256."""
    mask = np.arange(21, dtype=np.uint8).reshape(3, 7)
    data = encode_mask(mask)
    bit_depth, color_type = data[24], data[25]
    assert (bit_depth, color_type) == (8, 3)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), mask)
        assert image.getpalette() == voc.FULL_PALETTE.ravel().tolist()


def test_mask_of_background_alone_is_8_bit_too() -> None:
    """One class does not shrink the format."""
    data = encode_mask(np.zeros((2, 2), dtype=np.uint8))
    assert (data[24], data[25]) == (8, 3)


def test_overlay_blends_all_but_background() -> None:
    """Background keeps the photo; a class is half photo, half colour."""
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    mask = np.array([[0, 15], [8, 0]], dtype=np.uint8)
    blended = overlay(image, mask, 0.5)
    assert blended.tolist() == [
        [[100, 100, 100], [146, 114, 114]],
        [[82, 50, 50], [100, 100, 100]],
    ]
    assert (image == 100).all()


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, (7, 8, 9)), (1.0, (192, 128, 128))])
def test_overlay_at_its_ends(alpha: float, expected: tuple[int, int, int]) -> None:
    """Alpha 0 is the photo, alpha 1 the colour, exactly."""
    image = np.array([[[7, 8, 9]]], dtype=np.uint8)
    mask = np.array([[15]], dtype=np.uint8)
    assert tuple(overlay(image, mask, alpha)[0, 0].tolist()) == expected


def test_overlay_of_many_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stripes do not show."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    mask = rng.integers(0, 21, (13, 17), dtype=np.uint8)
    whole = overlay(image, mask, 0.3)
    monkeypatch.setattr("service.encoding.STRIPE_PIXELS", 10)
    assert np.array_equal(overlay(image, mask, 0.3), whole)
    exact = np.where((mask == 0)[..., None], image, image * 0.7 + voc.PALETTE[mask] * 0.3)
    assert np.abs(whole - exact).max() <= 1.5


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_encode_image(image_format: str) -> None:
    """The file is of the format asked for and of the photo's size."""
    image = np.full((10, 20, 3), 128, dtype=np.uint8)
    data = encode_image(image, image_format)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(data)) as decoded:
        assert decoded.format == image_format
        assert np.abs(np.asarray(decoded).astype(int) - image).max() <= 2


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
    counts = [0, 70_000, 3, 1, 5, 40_000, 2, 99_989]
    pixels = np.repeat([i % 2 for i in range(len(counts))], counts).astype(np.uint8)
    expected = coco.encode(np.asfortranarray(pixels[:, None]))
    assert compress_counts(counts) == expected["counts"].decode()


def test_limit_classes_makes_the_others_background() -> None:
    """Only the classes that were asked for are left."""
    mask = np.array([[0, 8, 15, 255]], dtype=np.uint8)
    assert limit_classes(mask, {15}).tolist() == [[0, 0, 15, 0]]
