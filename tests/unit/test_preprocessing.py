"""Geometry and resizing."""

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
        ((400, 500), 512, (410, 512), (512, 512)),  # past the flat shape
        ((300, 300), 256, (256, 256), (384, 512)),  # smaller than all: the smallest
        ((750, 1000), 1000, (750, 1000), (768, 1024)),  # larger than all: multiples of 32
        ((1, 5000), 512, (1, 512), (384, 512)),  # never less than one pixel
        ((5000, 1), 512, (512, 1), (512, 384)),
    ],
)
def test_plan(
    photo: tuple[int, int], max_side: int, resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    """The longest side becomes max_side, up or down; the smallest shape that contains it wins."""
    assert Geometry.plan(photo, max_side, SHAPES) == Geometry(photo, resized, padded)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(32, 2048))
def test_every_plan_holds_its_photo(height: int, width: int, max_side: int) -> None:
    """Whatever the photo: its longest side is max_side, it fits, and the input is of 32s."""
    geometry = Geometry.plan((height, width), max_side, SHAPES)
    assert max(geometry.resized) == max_side
    assert min(geometry.resized) >= 1
    for inside, outside in zip(geometry.resized, geometry.padded, strict=True):
        assert inside <= outside
        assert outside % 32 == 0


def test_preprocess_resizes_as_pillow_and_pads_with_the_mean() -> None:
    """The top left holds Pillow's bilinear resize to a level, the rest the padding colour."""
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
    """No resampling where none is needed."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    geometry = Geometry((64, 96), (64, 96), (64, 96))
    assert np.array_equal(preprocess(image, geometry, (0, 0, 0)), image)


def test_only_the_box_is_seen() -> None:
    """A smaller copy of the photo, whose last row and column the photo covers only in part."""
    image = np.random.default_rng(0).integers(0, 256, (46, 61, 3), dtype=np.uint8)
    geometry = Geometry((361, 481), (48, 64), (64, 64))
    box = (0.0, 0.875, 60.125, 46.0)
    expected = Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR, box)
    seen = preprocess(image, geometry, (0, 0, 0), box)
    assert levels_apart(seen[:48], np.asarray(expected)) <= 1
    assert levels_apart(seen, preprocess(image, geometry, (0, 0, 0))) > 10


def test_pillow_resizes_where_the_faster_resizer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its very pixels, boxes included; the fast resizer has no wheel for Linux on ARM."""
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
    """Up, down, both at once and from single pixels, as Pillow does it."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    geometry = Geometry((height, width), (new_h, new_w), (new_h, new_w))
    expected = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BILINEAR)
    # Either of its two passes rounds to the level beside now and then.
    assert levels_apart(preprocess(image, geometry, (0, 0, 0)), np.asarray(expected)) <= 2


def levels_apart(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> int:
    """The greatest difference of any pixel's value."""
    return int(np.abs(ours.astype(int) - theirs).max())
