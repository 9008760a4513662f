"""The Python client against a running service."""

import asyncio
import io
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco  # type: ignore[import-untyped]
from skimage import data

from service.artefact import voc
from service.client import AsyncClient, Client, RequestRefused
from service.schemas import LabelMap, ModelList, Segmentation, ViewList
from service.views import VIEWS
from tests.artefacts import encode, two_class_photo
from tests.clients import Server

PHOTO = two_class_photo()
CAT, PERSON = voc.CLASSES.index("cat"), voc.CLASSES.index("person")


def test_one_photo_in_every_form(protocol_server: Server, tmp_path: Path) -> None:
    """Mask, classes, overlay, cut-out and confidence agree with each other."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(data.astronaut(), "JPEG"))  # type: ignore[no-untyped-call]
    with Client(protocol_server.url) as client:
        mask = client.mask(path)
        assert mask.shape == (512, 512)
        found = assert_type(client.segment(path), Segmentation)
        assert found.model.name == "tiny"
        for one in found.classes:
            assert one.rle is not None
            decoded = coco.decode({"size": one.rle.size, "counts": one.rle.counts})
            assert np.array_equal(decoded == 1, mask == one.id)
        confidence = client.confidence(path)
        assert confidence.shape == mask.shape
        largest = found.classes[0]
        assert confidence[mask == largest.id].mean() / 255 == pytest.approx(largest.confidence)
        cut = np.asarray(Image.open(io.BytesIO(client.cutout(path, classes=largest.name))))
        assert np.array_equal(cut[..., 3] == 255, mask == largest.id)
        with Image.open(io.BytesIO(client.overlay(path, media_type="image/webp"))) as overlay:
            assert (overlay.format, overlay.size) == ("WEBP", (512, 512))


def test_parameters_reach_the_service(protocol_server: Server) -> None:
    """The service applies classes, mask format and model; a bad value raises its problem."""
    with Client(protocol_server.url) as client:
        found = client.segment(PHOTO, mask="polygons", classes="person", model="second")
        assert found.model.name == "second"
        (person,) = found.classes
        assert (person.name, person.rle) == ("person", None)
        assert person.polygons
        with pytest.raises(RequestRefused, match="no class 'unicorn'") as caught:
            client.segment(PHOTO, classes="unicorn")
        assert caught.value.problem.status == 422
        with pytest.raises(RequestRefused, match="not an image"):
            client.mask(b"hello")


def test_the_catalogue(protocol_server: Server) -> None:
    """The client lists the classes, the models and the views, and fetches any view."""
    with Client(protocol_server.url) as client:
        label_map = assert_type(client.classes(), LabelMap)
        assert [one.name for one in label_map.classes] == list(voc.CLASSES)
        catalogue = assert_type(client.models(), ModelList)
        assert [one.name for one in catalogue.models] == ["tiny", "second"]
        listed = {one.name: one for one in assert_type(client.views(), ViewList).views}
        assert listed.keys() == VIEWS.keys()
        media_type = listed["confidence"].media_types[0]
        content = client.fetch(PHOTO, media_type, {"view": "confidence"})
        with Image.open(io.BytesIO(content)) as image:
            np.testing.assert_array_equal(np.asarray(image), client.confidence(PHOTO))


def test_a_batch(protocol_server: Server, tmp_path: Path) -> None:
    """A batch larger than one request keeps its order; a bad image gets a problem in its place."""
    path = tmp_path / "named.png"
    path.write_bytes(encode(PHOTO))
    with Client(protocol_server.url) as client:
        items = client.batch([path, b"hello", *[PHOTO] * 17], mask="none")
    assert [item.index for item in items] == list(range(19))
    assert [item.name for item in items[:3]] == ["named.png", "1", "2"]
    assert items[1].problem is not None
    assert items[1].problem.status == 415
    for item in items[:1] + items[2:]:
        assert item.segmentation is not None
        assert {CAT, PERSON} <= {one.id for one in item.segmentation.classes}


def test_asyncio_gives_the_same(protocol_server: Server) -> None:
    """Concurrent calls on `AsyncClient` return the same results as `Client`."""

    async def run() -> list[Any]:
        async with AsyncClient(protocol_server.url) as client:
            pending: list[Awaitable[Any]] = [
                client.mask(PHOTO),
                client.cutout(PHOTO),
                client.overlay(PHOTO, alpha=1),
                client.confidence(PHOTO),
                client.models(),
                client.batch([PHOTO] * 3, mask="none"),
            ]
            return await asyncio.gather(*pending)

    mask, cutout, overlay, confidence, models, batch = asyncio.run(run())
    with Client(protocol_server.url) as client:
        assert np.array_equal(mask, client.mask(PHOTO))
        assert cutout == client.cutout(PHOTO)
        assert overlay == client.overlay(PHOTO, alpha=1)
        assert np.array_equal(confidence, client.confidence(PHOTO))
        assert models.models[0].name == client.models().models[0].name
    assert [item.index for item in batch] == [0, 1, 2]
