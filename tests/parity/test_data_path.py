"""The offline data path and the service's give the same network input and the same mask."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from models.networks.resnet import Normalize
from models.prediction import SHAPES, predict_photo
from models.transforms import PADDING_COLOR, Geometry, fit, upsample
from service import preprocessing, upsampling
from service.contract import ModelContract

CONTRACT = ModelContract(
    name="parity",
    version="1",
    network="parity",
    stride=16,
    mean=Normalize.MEAN,
    std=Normalize.STD,
    working_size=512,
    shapes=SHAPES,
    precision="fp32",
)
SIZES = [(300, 451), (375, 500), (500, 375), (512, 512), (1200, 700), (33, 900), (1, 1)]


def photo(height: int, width: int) -> Image.Image:
    """scikit-image's cat, stretched to a size."""
    cat = Image.fromarray(data.chelsea())  # type: ignore[no-untyped-call]
    return cat.resize((width, height), Image.Resampling.BICUBIC)


def plan(size: tuple[int, int], working_size: int = 512) -> preprocessing.Geometry:
    """The service's geometry for a photo's (height, width)."""
    return preprocessing.Geometry.plan(size, working_size, CONTRACT.shapes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("working_size", [256, 512, 768])
def test_the_network_sees_the_same_pixels(size: tuple[int, int], working_size: int) -> None:
    """Training's fit and the service's preprocessing: equal bytes, equal geometry."""
    image = photo(*size)
    ours, geometry = fit(image, working_size, SHAPES)
    theirs_geometry = plan(size, working_size)
    theirs = preprocessing.preprocess(np.asarray(image), theirs_geometry, CONTRACT.padding_color)
    assert np.array_equal(ours, theirs)
    assert geometry == Geometry(theirs_geometry.photo, theirs_geometry.resized)


def test_the_padding_is_the_contracts() -> None:
    """The training transform pads with what the exported contract says."""
    assert CONTRACT.padding_color == PADDING_COLOR


@pytest.mark.parametrize("size", SIZES)
def test_logits_become_the_same_mask(size: tuple[int, int]) -> None:
    """PyTorch's upsampling and the service's differ at most where two classes all but tie."""
    geometry = plan(size)
    height, width = geometry.padded
    cells = (21, height // 16, width // 16)
    logits = 3 * np.random.default_rng(0).standard_normal(cells, dtype=np.float32)
    full = upsample(torch.from_numpy(logits), Geometry(geometry.photo, geometry.resized), 16)
    mask = upsampling.upsample(logits, geometry).mask
    best, second = full.topk(2, dim=0).values
    clear = (best - second > 1e-3).numpy()
    assert mask.shape == size
    assert np.array_equal(mask[clear], full.argmax(0).numpy()[clear])
    assert clear.mean() > 0.99


def test_a_whole_prediction_agrees() -> None:
    """Photo in, mask out, through a network that answers with a picture of its own input."""
    image = photo(375, 500)
    weight = torch.randn(21, 3, generator=torch.Generator().manual_seed(0))

    def infer(batch: np.ndarray) -> torch.Tensor:
        cells = torch.from_numpy(batch).float().permute(0, 3, 1, 2)
        pooled = torch.nn.functional.avg_pool2d(cells, 16)
        return torch.einsum("kc,nchw->nkhw", weight, pooled)

    ours = predict_photo(image, infer, working_size=512, stride=16)
    geometry = plan((375, 500))
    batch = preprocessing.preprocess(np.asarray(image), geometry, CONTRACT.padding_color)[None]
    theirs = upsampling.upsample(infer(batch)[0].numpy(), geometry).mask
    assert (ours == theirs).mean() > 0.9999
