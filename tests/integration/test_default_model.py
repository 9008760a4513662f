"""The committed model on real photos over a real socket, as with `make serve`.

The photos are ``chelsea`` (CC0, Stefan van der Walt) and ``astronaut`` (public domain, NASA) from
scikit-image's wheel.
"""

import io
from collections.abc import Iterator

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools import mask as coco  # type: ignore[import-untyped]
from skimage import data

from service.artefact import voc
from service.settings import DEFAULT_MODEL
from tests.artefacts import encode
from tests.clients import Server, mask_of, serving

CHELSEA: npt.NDArray[np.uint8] = data.chelsea()  # type: ignore[no-untyped-call]
ASTRONAUT: npt.NDArray[np.uint8] = data.astronaut()  # type: ignore[no-untyped-call]
PHOTOS = {"cat": CHELSEA, "person": ASTRONAUT}
JPEGS = {name: encode(photo, "JPEG", quality=90) for name, photo in PHOTOS.items()}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The default model on two threads."""
    with serving(DEFAULT_MODEL, threads=2, deadline_s=300) as running:
        yield running


def post(server: Server, name: str, **options: str) -> httpx.Response:
    """Segment a photo; ``accept`` is a header, other options are parameters."""
    accept = options.pop("accept", "*/*")
    response = httpx.post(
        f"{server.url}/segment",
        files={"image": (f"{name}.jpg", JPEGS[name], "image/jpeg")},
        params=options,
        headers={"Accept": accept},
        timeout=300,
    )
    assert response.status_code == 200
    return response


@pytest.mark.parametrize("name", PHOTOS)
def test_the_mask_finds_what_is_in_the_photo(server: Server, name: str) -> None:
    """The largest class except background is the photo's, with over 15 % of the pixels."""
    mask = mask_of(post(server, name))
    assert mask.shape == PHOTOS[name].shape[:2]
    pixels = np.bincount(mask.ravel(), minlength=21)
    assert len(pixels) == 21
    assert voc.CLASSES[1 + pixels[1:].argmax()] == name
    assert pixels[voc.CLASSES.index(name)] > 0.15 * mask.size


@pytest.mark.parametrize("name", PHOTOS)
def test_json_agrees_with_the_mask(server: Server, name: str) -> None:
    """JSON has the mask's pixel counts; fractions sum to one."""
    mask = mask_of(post(server, name))
    body = post(server, name, accept="application/json").json()
    counted = {one["id"]: one["pixels"] for one in body["classes"]}
    ids, pixels = np.unique(mask, return_counts=True)
    assert counted == dict(zip(ids.tolist(), pixels.tolist(), strict=True))
    assert sum(one["fraction"] for one in body["classes"]) == pytest.approx(1)
    (found,) = (one for one in body["classes"] if one["name"] == name)
    assert found["confidence"] > 0.5


def test_the_overlay_is_the_photo_under_colors(server: Server) -> None:
    """Background pixels are the photo's; the cat's are half photo, half VOC's colour."""
    mask = mask_of(post(server, "cat"))
    with Image.open(io.BytesIO(post(server, "cat", view="overlay").content)) as image:
        overlay = np.asarray(image).astype(int)
    with Image.open(io.BytesIO(JPEGS["cat"])) as image:
        photo = np.asarray(image).astype(int)
    assert np.array_equal(overlay[mask == 0], photo[mask == 0])
    cat = mask == voc.CLASSES.index("cat")
    expected = (photo[cat] + voc.PALETTE[voc.CLASSES.index("cat")]) / 2
    assert np.abs(overlay[cat] - expected).max() <= 1


@pytest.mark.parametrize("name", PHOTOS)
def test_polygons_and_run_lengths_are_the_mask(server: Server, name: str) -> None:
    """Decoded by pycocotools, run lengths equal the mask and polygons have 98 % IoU or more."""
    mask = mask_of(post(server, name))
    lengths = post(server, name, accept="application/json").json()
    outlines = post(server, name, accept="application/json", mask="polygons").json()
    for one, other in zip(lengths["classes"], outlines["classes"], strict=True):
        region = mask == one["id"]
        assert np.array_equal(coco.decode(one["rle"]) == 1, region)
        filled = coco.decode(coco.merge(coco.frPyObjects(other["polygons"], *mask.shape))) == 1
        assert (filled & region).sum() / (filled | region).sum() >= 0.98


def test_the_cutout_is_the_cat_alone(server: Server) -> None:
    """The cat's pixels are the photo's; all others are transparent."""
    cat = mask_of(post(server, "cat")) == voc.CLASSES.index("cat")
    with Image.open(io.BytesIO(post(server, "cat", view="cutout", classes="cat").content)) as image:
        cutout = np.asarray(image)
    with Image.open(io.BytesIO(JPEGS["cat"])) as image:
        assert np.array_equal(cutout[cat][:, :3], np.asarray(image)[cat])
    assert np.array_equal(cutout[..., 3] == 255, cat)


def test_the_overlay_as_jpeg(server: Server) -> None:
    """Accept selects a JPEG of the photo's size."""
    response = post(server, "person", view="overlay", accept="image/jpeg")
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == ("JPEG", (512, 512))


def test_max_side_changes_the_mask_little(server: Server) -> None:
    """With half the resolution the cat's mask has the same size and mostly agrees."""
    fine, coarse = mask_of(post(server, "cat")), mask_of(post(server, "cat", max_side="256"))
    assert coarse.shape == fine.shape
    assert (coarse == fine).mean() > 0.6


def test_the_model_reports_its_accuracy(server: Server) -> None:
    """/model has the name, the accuracy and the licences of code, data and weights."""
    body = httpx.get(f"{server.url}/model").json()
    assert body["name"] == DEFAULT_MODEL.name
    assert body["accuracy"]["miou"] >= 0.5
    assert body["accuracy"]["pixel_accuracy"] >= 0.85
    assert set(body["accuracy"]["per_class_iou"]) == set(voc.CLASSES)
    assert {"code", "data", "starting_weights"} <= set(body["licences"])
