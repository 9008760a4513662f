"""Image and mask have the same geometry; labels are never blended."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from models.transforms import (
    PADDING_COLOR,
    Augmentation,
    Example,
    adjust_colors,
    fit,
    upsample,
)
from service.artefact.preprocessing import Geometry
from service.artefact.voc import FULL_PALETTE, PALETTE


def painted(labels: NDArray[np.uint8]) -> Example:
    """A photo in which every pixel has the colour of its label."""
    image = torch.from_numpy(FULL_PALETTE[labels].transpose(2, 0, 1).copy())
    return Example(image, torch.from_numpy(labels))


def cat(height: int, width: int) -> NDArray[np.uint8]:
    """Labels: 0 outside, 8 inside."""
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[height // 4 : height // 2, width // 4 : width // 2] = 8
    return labels


@given(seed=st.integers(0, 10_000), height=st.integers(60, 300), width=st.integers(60, 300))
@settings(max_examples=40, deadline=None)
def test_image_and_mask_stay_paired(seed: int, height: int, width: int) -> None:
    """In every crop, each label is on its own colour, and padding is void."""
    augmentation = Augmentation(64, 128, (0.5, 2.0), jitter=0.0)
    labels = cat(height, width)
    crop = augmentation(painted(labels), np.random.default_rng(seed))
    assert crop.image.shape == (3, 64, 64)
    assert set(crop.target.flatten().tolist()) <= {0, 8, 255}
    padding = crop.target == 255
    assert (crop.image.permute(1, 2, 0)[padding] == torch.tensor(PADDING_COLOR)).all()
    # Both are resampled about the same centres: the blend passes its half where labels change.
    nearer_to_cat = crop.image[0] > PALETTE[8, 0] / 2
    assert ((crop.target == 8) == nearer_to_cat)[~padding].float().mean() > 0.9


def test_jitter_changes_colors_and_not_labels() -> None:
    """Photometric changes do not touch the mask."""
    photo = painted(cat(64, 64))
    plain = Augmentation(64, 64, (1.0, 1.0), 0.0)(photo, np.random.default_rng(1))
    vivid = Augmentation(64, 64, (1.0, 1.0), 0.5)(photo, np.random.default_rng(1))
    assert set(plain.image.flatten().tolist()) == {0.0, 64.0}
    assert 64.0 not in vivid.image
    assert vivid.image.min() >= 0
    assert (plain.target == 8).sum() == (vivid.target == 8).sum() == 256


def test_a_factor_of_one_changes_no_color() -> None:
    """Brightness, contrast and saturation equal Pillow's."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float()
    torch.testing.assert_close(adjust_colors(image, 1, 1, 1), image, atol=1e-3, rtol=0)
    theirs = Image.fromarray(pixels)
    for enhancer, factor in (
        (ImageEnhance.Brightness, 1.2),
        (ImageEnhance.Contrast, 0.7),
        (ImageEnhance.Color, 1.4),
    ):
        theirs = enhancer(theirs).enhance(factor)
    ours = adjust_colors(image, 1.2, 0.7, 1.4).permute(1, 2, 0).numpy()
    # Pillow rounds to whole values three times.
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=3)


def test_flips_happen_for_both() -> None:
    """Among ten draws both orientations occur, image and mask together."""
    labels = np.zeros((32, 32), dtype=np.uint8)
    labels[:, :16] = 12
    photo = painted(labels)
    augmentation = Augmentation(32, 32, (1.0, 1.0), 0.0)
    left = set()
    for seed in range(10):
        crop = augmentation(photo, np.random.default_rng(seed))
        assert np.array_equal(crop.image.permute(1, 2, 0).numpy(), PALETTE[crop.target.numpy()])
        left.add(int(crop.target[0, 0]))
    assert left == {0, 12}


@pytest.mark.parametrize(
    ("photo", "resized", "shape"),
    [
        ((375, 500), (384, 512), (384, 512)),
        ((500, 375), (512, 384), (512, 384)),
        ((400, 400), (512, 512), (512, 512)),
        ((1000, 3000), (171, 512), (384, 512)),
        ((3, 1000), (2, 512), (384, 512)),
    ],
)
def test_fit_takes_the_smallest_listed_shape(
    photo: tuple[int, int], resized: tuple[int, int], shape: tuple[int, int]
) -> None:
    """Longest side to 512, padded with the mean colour at the bottom and right."""
    image = Image.new("RGB", photo[::-1], (255, 0, 0))
    padded, geometry = fit(image, 512, ((384, 512), (512, 384), (512, 512)))
    assert padded.shape == (*shape, 3)
    assert geometry == Geometry(photo, resized, shape)
    assert (padded[: resized[0], : resized[1]] == (255, 0, 0)).all()
    assert (padded[resized[0] :] == PADDING_COLOR).all()
    assert (padded[:, resized[1] :] == PADDING_COLOR).all()


def test_fit_falls_back_to_multiples_of_32() -> None:
    """Larger than any listed shape."""
    padded, _ = fit(Image.new("RGB", (500, 375)), 640, ((384, 512),))
    assert padded.shape == (480, 640, 3)


@pytest.mark.parametrize("size", [(96, 128), (40, 300), (384, 512)])
def test_upsample_is_interpolate_where_nothing_is_padded(size: tuple[int, int]) -> None:
    """The same as F.interpolate(mode="bilinear", align_corners=False)."""
    logits = torch.randn(21, 6, 8, generator=torch.Generator().manual_seed(0))
    ours = upsample(logits, Geometry(size, (96, 128), (96, 128)), stride=16)
    theirs = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_upsample_reads_the_valid_region_only() -> None:
    """With a half-padded input, the photo's last column comes from the middle of the logits."""
    logits = torch.arange(8.0).expand(1, 4, 8)
    out = upsample(logits, Geometry((64, 64), (64, 64), (64, 128)), stride=16)
    assert out[0, 0, -1].item() == pytest.approx(63.5 / 16 - 0.5)
