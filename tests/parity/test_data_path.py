"""The offline data path and the service's give the same mask.

So do the service's two ways of decoding a large photo.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from models.networks.segmentation import Normalize
from models.prediction import SHAPES, predict_photo
from models.transforms import PADDING_COLOR, upsample
from service.artefact import preprocessing
from service.artefact.contract import ModelContract
from service.images.decoding import decode
from service.inference import upsampling
from service.inference.session import load_model
from service.settings import DEFAULT_MODEL

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


def plan(size: tuple[int, int]) -> preprocessing.Geometry:
    """The geometry for a photo's (height, width)."""
    return preprocessing.Geometry.plan(size, CONTRACT.working_size, CONTRACT.shapes)


def test_the_padding_is_the_contracts() -> None:
    """The training transform pads with the contract's colour."""
    assert CONTRACT.padding_color == PADDING_COLOR


@pytest.mark.parametrize("size", SIZES)
def test_logits_become_the_same_mask(size: tuple[int, int]) -> None:
    """PyTorch's upsampling and the service's differ only where two classes nearly tie."""
    geometry = plan(size)
    height, width = geometry.padded
    cells = (21, height // 16, width // 16)
    logits = 3 * np.random.default_rng(0).standard_normal(cells, dtype=np.float32)
    full = upsample(torch.from_numpy(logits), geometry, 16)
    mask = upsampling.upsample(logits, geometry).mask
    best, second = full.topk(2, dim=0).values
    clear = (best - second > 1e-3).numpy()
    assert mask.shape == size
    assert np.array_equal(mask[clear], full.argmax(0).numpy()[clear])
    assert clear.mean() > 0.99


def test_a_whole_prediction_agrees() -> None:
    """From photo to mask, through a network whose logits depend on its input."""
    image = photo(375, 500)
    weight = torch.randn(21, 3, generator=torch.Generator().manual_seed(0))

    def infer(batch: np.ndarray) -> torch.Tensor:
        cells = torch.from_numpy(batch).float().permute(0, 3, 1, 2)
        pooled = torch.nn.functional.avg_pool2d(cells, 16)
        return torch.einsum("kc,nchw->nkhw", weight, pooled)

    ours = predict_photo(image, infer, working_size=512, stride=16)
    geometry = plan((375, 500))
    batch = np.stack(
        [preprocessing.preprocess(np.asarray(image), geometry, CONTRACT.padding_color)]
    )
    theirs = upsampling.upsample(infer(batch)[0].numpy(), geometry).mask
    assert (ours == theirs).mean() > 0.999


@pytest.mark.parametrize("side", [4000, 3203])
def test_a_scaled_photo_gives_the_whole_photos_mask(side: int) -> None:
    """A phone's photo, decoded to a fraction or whole: the default model labels 99.5 % alike.

    In fp32: in int8, a difference of one level of 255 changes about as many pixels as this allows.
    """
    astronaut = Image.fromarray(data.astronaut())  # type: ignore[no-untyped-call]
    upright = astronaut.resize((side * 3 // 4, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    upright.save(file, "JPEG", quality=90)
    model = load_model(DEFAULT_MODEL, "cpu", precision="fp32")
    contract = model.contract
    masks = []
    for needed_side in (None, contract.working_size):
        taken = decode(file.getvalue(), 50_000_000, needed_side)
        assert (taken.pixels.shape[:2] == taken.size) == (needed_side is None)
        geometry = preprocessing.Geometry.plan(taken.size, contract.working_size, contract.shapes)
        image = preprocessing.preprocess(taken.pixels, geometry, contract.padding_color, taken.box)
        masks.append(upsampling.upsample(model.run(image[None])[0], geometry).mask)
    assert masks[0].shape == upright.size[::-1]
    assert (masks[0] == masks[1]).mean() >= 0.995
