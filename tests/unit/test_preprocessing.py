"""Geometry and resizing."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.artefact import preprocessing
from service.artefact.preprocessing import Geometry, preprocess

SHAPES = ((384, 512), (512, 384), (512, 512))


@pytest.mark.parametrize(
    ("photo", "max_side", "resized", "padded"),
    [
        ((375, 500), 512, (384, 512), (384, 512)),  # VOC's usual landscape, up
        ((500, 375), 512, (512, 384), (512, 384)),
        ((1000, 1000), 512, (512, 512), (512, 512)),
        ((400, 500), 512, (410, 512), (512, 512)),  # too tall for 384x512
        ((300, 300), 256, (256, 256), (384, 512)),  # smaller than all: the smallest
        ((750, 1000), 1000, (750, 1000), (768, 1024)),  # larger than all: multiples of 32
        ((1, 5000), 512, (1, 512), (384, 512)),  # at least one pixel
        ((5000, 1), 512, (512, 1), (512, 384)),
    ],
)
def test_plan(
    photo: tuple[int, int], max_side: int, resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    """The longest side becomes max_side; the smallest shape that contains the result is used."""
    assert Geometry.plan(photo, max_side, SHAPES) == Geometry(photo, resized, padded)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(32, 2048))
def test_every_plan_holds_its_photo(height: int, width: int, max_side: int) -> None:
    """For any photo: its longest side is max_side, it fits, and the input's sides are 32s."""
    geometry = Geometry.plan((height, width), max_side, SHAPES)
    assert max(geometry.resized) == max_side
    assert min(geometry.resized) >= 1
    for inside, outside in zip(geometry.resized, geometry.padded, strict=True):
        assert inside <= outside
        assert outside % 32 == 0


def test_preprocess_resizes_as_pillow_and_pads_with_the_mean() -> None:
    """The top left equals Pillow's bilinear resize to one level; the rest is the padding colour."""
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    geometry = Geometry((90, 120), (45, 60), (64, 96))
    padded = preprocess(image, geometry, (1, 2, 3))
    resized = Image.fromarray(image).resize((60, 45), Image.Resampling.BILINEAR)
    assert padded.shape == (64, 96, 3)
    assert padded.dtype == np.uint8
    assert levels_apart(padded[:45, :60], np.asarray(resized)) <= 1
    assert (padded[45:] == (1, 2, 3)).all()
    assert (padded[:, 60:] == (1, 2, 3)).all()


def test_a_photo_of_the_right_size_is_not_touched() -> None:
    """A photo that needs no scaling is not resampled."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    geometry = Geometry((64, 96), (64, 96), (64, 96))
    assert np.array_equal(preprocess(image, geometry, (0, 0, 0)), image)


def test_only_the_box_is_seen() -> None:
    """The box of a smaller copy is resized; it covers the last row and column only in part."""
    image = np.random.default_rng(0).integers(0, 256, (46, 61, 3), dtype=np.uint8)
    geometry = Geometry((361, 481), (48, 64), (64, 64))
    box = (0.0, 0.875, 60.125, 46.0)
    expected = Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR, box)
    seen = preprocess(image, geometry, (0, 0, 0), box)
    assert levels_apart(seen[:48], np.asarray(expected)) <= 1
    assert levels_apart(seen, preprocess(image, geometry, (0, 0, 0))) > 10


def test_pillow_resizes_where_the_faster_resizer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result equals Pillow's, boxes included; the fast one has no wheel for Linux on ARM."""
    image = np.random.default_rng(0).integers(0, 256, (46, 61, 3), dtype=np.uint8)
    geometry = Geometry((361, 481), (48, 64), (64, 64))
    box = (0.0, 0.875, 60.125, 46.0)
    fast = preprocess(image, geometry, (0, 0, 0), box)
    monkeypatch.setattr(preprocessing, "cykooz_resizer", None)
    plain = preprocess(image, geometry, (0, 0, 0), box)
    expected = Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR, box)
    assert np.array_equal(plain[:48], np.asarray(expected))
    assert levels_apart(plain, fast) <= 1


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
def test_every_size_becomes_every_other(height: int, width: int, new_h: int, new_w: int) -> None:
    """Up, down, both at once and from single pixels, the result is close to Pillow's."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    geometry = Geometry((height, width), (new_h, new_w), (new_h, new_w))
    expected = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BILINEAR)
    # Each of its two passes may round to the neighbouring level.
    assert levels_apart(preprocess(image, geometry, (0, 0, 0)), np.asarray(expected)) <= 2


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(*[st.floats(0, 0.45)] * 4),
    st.integers(1, 5000),
)
def test_bands_do_not_show(
    size: tuple[int, int],
    new_size: tuple[int, int],
    cut: tuple[float, float, float, float],
    band_bytes: int,
) -> None:
    """A band at a time, of the whole image or a box, gives the same to one level."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    geometry = Geometry(size, new_size, new_size)
    height, width = size
    left, top, right, bottom = cut
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    whole = preprocess(image, geometry, (0, 0, 0), box)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "BAND_BYTES", band_bytes)
        banded = preprocess(image, geometry, (0, 0, 0), box)
    assert levels_apart(banded, whole) <= 1
    assert np.count_nonzero(banded != whole) <= max(8, 0.02 * whole.size)


@pytest.mark.parametrize("size", [(3000, 4000), (500, 24_000), (24_000, 500)])
def test_the_resizer_holds_a_band_only(size: tuple[int, int]) -> None:
    """Resizing a photo of 12 megapixels copies less than a fifth of it, whatever its shape."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    geometry = Geometry.plan(size, 512, SHAPES)
    tracemalloc.start()
    try:
        preprocess(image, geometry, (0, 0, 0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < image.nbytes / 5


def levels_apart(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> int:
    """The greatest difference between two pixel values."""
    return int(np.abs(ours.astype(int) - theirs).max())
