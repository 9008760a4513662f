"""Other projects' protocols, compared with a direct computation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from torch import Tensor

from models.published_protocols import predict_as_keras_fcn, predict_as_mmseg
from models.transforms import PADDING_COLOR

STRIDE = 16


class Network:
    """Keeps its input and returns noise of stride 16, the same for each shape."""

    def __init__(self) -> None:
        self.seen: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def __call__(self, batch: NDArray[np.uint8]) -> Tensor:
        """Return logits for a batch of one."""
        (self.seen,) = batch
        height, width, _ = self.seen.shape
        cells = (1, 21, height // STRIDE, width // STRIDE)
        return torch.randn(cells, generator=torch.Generator().manual_seed(0))


def photo(height: int, width: int) -> Image.Image:
    """scikit-image's cat, stretched to a size."""
    cat = Image.fromarray(data.chelsea())  # type: ignore[no-untyped-call]
    return cat.resize((width, height), Image.Resampling.BICUBIC)


def resized(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """The photo as a network sees it."""
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def interpolated(logits: Tensor, height: int, width: int) -> Tensor:
    """With half-pixel centres, to a size."""
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


@pytest.mark.parametrize(
    ("size", "inside", "padded"),
    [
        ((375, 500), (512, 683), (512, 704)),
        ((500, 334), (766, 512), (768, 512)),
        ((512, 512), (512, 512), (512, 512)),
        ((1024, 768), (683, 512), (704, 512)),
        ((100, 1000), (205, 2048), (224, 2048)),
    ],
)
def test_mmseg_fits_photos_into_2048_by_512(
    size: tuple[int, int], inside: tuple[int, int], padded: tuple[int, int]
) -> None:
    """The shorter side becomes 512, unless the longer would exceed 2048: ``mmcv.rescale_size``."""
    network, image = Network(), photo(*size)
    assert predict_as_mmseg(image, network, stride=STRIDE).shape == size
    height, width = inside
    expected = np.full((*padded, 3), PADDING_COLOR)
    expected[:height, :width] = resized(image, height, width)
    # A level apart: the reference here is Pillow's resizer.
    assert np.abs(network.seen - expected).max() <= 1


def test_mmseg_interpolates_to_the_input_and_then_to_the_photo() -> None:
    """Logits, not labels, in two steps."""
    network, image = Network(), photo(375, 500)
    labels = predict_as_mmseg(image, network, stride=STRIDE)
    at_input = interpolated(network(network.seen[None]), 512, 704)[..., :683]
    expected = interpolated(at_input, 375, 500)[0].argmax(0).numpy()
    assert labels.dtype == np.uint8
    assert (labels == expected).mean() > 0.9999


@pytest.mark.parametrize(
    ("size", "padded", "corner"),
    [
        ((375, 500), (512, 512), (68, 6)),
        ((500, 333), (512, 512), (6, 89)),
        ((512, 512), (512, 512), (0, 0)),
        ((600, 700), (608, 704), (4, 2)),
    ],
)
def test_keras_fcn_puts_photos_into_a_black_square(
    size: tuple[int, int], padded: tuple[int, int], corner: tuple[int, int]
) -> None:
    """Centred and not resized; the prediction around the photo is cut off."""
    network, image = Network(), photo(*size)
    labels = predict_as_keras_fcn(image, network, stride=STRIDE)
    inside = np.s_[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    expected = np.zeros((*padded, 3), dtype=np.uint8)
    expected[inside] = np.asarray(image)
    assert np.array_equal(network.seen, expected)
    full = interpolated(network(expected[None]), *padded)[0].argmax(0).numpy()
    assert labels.shape == size
    assert (labels == full[inside]).mean() > 0.9999
