"""The API over ASGI, with a tiny network that labels VOC's colours."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
import pytest
from fastapi import FastAPI, Query
from PIL import Image
from pycocotools import mask as coco  # type: ignore[import-untyped]

from service.artefact import voc
from service.views import VIEWS, Options
from tests.artefacts import encode, paint, two_class_photo
from tests.clients import InProcess, assert_problem, mask_of

pytestmark = pytest.mark.anyio

PHOTO = encode(two_class_photo())
JPEG = encode(np.asarray(Image.fromarray(two_class_photo()).resize((300, 200))), "JPEG")
CAT, PERSON = voc.CLASSES.index("cat"), voc.CLASSES.index("person")
JSON = {"Accept": "application/json"}


async def test_a_raw_body_gives_vocs_mask(client: InProcess) -> None:
    """The default is a palette PNG of the photo's size with the right class in each area."""
    response = await client.http.post("/segment", content=PHOTO)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "image/png"
    mask = mask_of(response)
    assert mask.shape == (64, 96)
    assert mask[40, 8] == CAT
    assert mask[30, 80] == PERSON
    assert mask[4, 8] == 0


@pytest.mark.parametrize("field", ["image", "file", "image[]"])
async def test_a_form_gives_the_same(client: InProcess, field: str) -> None:
    """A form's file gives the raw body's answer, with parameters in the query or in the form."""
    wanted = {"view": "overlay", "alpha": "0.25", "classes": "person"}
    raw = await client.http.post("/segment", content=PHOTO, params=wanted)
    photo = {field: ("x.png", PHOTO)}
    for given in (
        {"params": wanted},
        {"data": {**wanted, "_charset_": "utf-8"}},
        {"params": {"view": "overlay"}, "data": {"alpha": "0.25", "classes": "person"}},
    ):
        form = await client.http.post("/segment", files=photo, **given)  # type: ignore[arg-type]
        assert form.status_code == 200
        assert form.content == raw.content


async def test_repeated_classes_are_one_list(client: InProcess) -> None:
    """In the query, in the form, and in both."""
    photo = {"image": ("x.png", PHOTO)}
    wanted = await client.http.post("/segment", content=PHOTO, params={"classes": "person,cat"})
    for given in (
        {"params": {"classes": ["person", "cat"]}},
        {"data": {"classes": ["person", "cat"]}},
        {"params": {"classes": "person"}, "data": {"classes": "cat"}},
    ):
        response = await client.http.post("/segment", files=photo, **given)
        assert response.content == wanted.content


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "image/gif", "nonsense"]
)
async def test_the_content_type_of_a_raw_body_is_ignored(
    client: InProcess, content_type: str
) -> None:
    """The bytes decide; curl's --data-binary sends a form's type."""
    response = await client.http.post(
        "/segment", content=PHOTO, headers={"Content-Type": content_type}
    )
    assert response.status_code == 200


async def test_a_chunked_body(client: InProcess) -> None:
    """A body without a Content-Length is accepted."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(PHOTO), 100):
            yield PHOTO[start : start + 100]

    response = await client.http.post("/segment", content=chunks())
    assert response.status_code == 200


async def test_the_headers(client: InProcess) -> None:
    """The headers are the model, the request id and each stage's milliseconds."""
    response = await client.http.post("/segment", content=JPEG, headers={"X-Request-ID": "mine-1"})
    assert response.headers["X-Model"] == "tiny/1"
    assert response.headers["X-Request-ID"] == "mine-1"
    stages = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
    assert list(stages) == ["decode", "preprocess", "queue", "infer", "upsample", "encode"]
    assert all(float(value) >= 0 for value in stages.values())


async def test_the_mask_has_the_photos_upright_size(client: InProcess) -> None:
    """EXIF orientation is applied: a photo stored in landscape gets a portrait mask."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(two_class_photo(), "JPEG", exif=exif, quality=95)
    mask = mask_of(await client.http.post("/segment", content=data))
    assert mask.shape == (96, 64)
    assert mask[80, 30] == PERSON


@pytest.mark.parametrize("max_side", [64, 100, 512])
async def test_max_side_does_not_change_the_size_of_the_mask(
    client: InProcess, max_side: int
) -> None:
    """The mask has the photo's size for any size that the network sees."""
    response = await client.http.post("/segment", content=JPEG, params={"max_side": max_side})
    assert mask_of(response).shape == (200, 300)


async def test_an_overlay_is_a_png_by_default(client: InProcess) -> None:
    """The overlay is half photo, half colour; the background is unchanged."""
    response = await client.http.post("/segment", content=PHOTO, params={"view": "overlay"})
    assert response.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.mode == "RGB"
        pixels = np.asarray(image)
    assert pixels[4, 8].tolist() == [0, 0, 0]
    assert pixels[30, 80].tolist() == [192, 128, 128]


async def test_an_overlay_on_another_photo(client: InProcess) -> None:
    """A pixel of a class is (1 - alpha) * photo + alpha * colour."""
    photo = np.full((64, 96, 3), (190, 130, 120), dtype=np.uint8)  # nearest: person
    response = await client.http.post(
        "/segment", content=encode(photo), params={"view": "overlay", "alpha": 0.25}
    )
    with Image.open(io.BytesIO(response.content)) as image:
        pixel = np.asarray(image)[10, 10]
    expected = 0.75 * photo[10, 10] + 0.25 * np.array([192, 128, 128])
    assert np.abs(pixel - expected).max() <= 1


async def test_an_overlay_as_jpeg(client: InProcess) -> None:
    """Accept selects JPEG."""
    response = await client.http.post(
        "/segment",
        content=JPEG,
        params={"view": "overlay"},
        headers={"Accept": "image/png;q=0.5, image/jpeg"},
    )
    assert response.headers["Content-Type"] == "image/jpeg"
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == ("JPEG", (300, 200))


async def test_an_overlay_as_webp(client: InProcess) -> None:
    """Accept selects WebP; a view without WebP lists its media types."""
    webp = {"Accept": "image/webp"}
    response = await client.http.post(
        "/segment", content=JPEG, params={"view": "overlay"}, headers=webp
    )
    assert response.headers["Content-Type"] == "image/webp"
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (300, 200))
    refused = await client.http.post("/segment", content=JPEG, headers=webp)
    problem = assert_problem(refused, 406, "not-acceptable")
    assert problem["available"] == ["image/png", "application/json"]


@pytest.mark.parametrize(
    ("classes", "kept"), [(None, {*range(1, 21)}), ("cat,background", {0, CAT}), ("dog", {12})]
)
async def test_a_cutout(client: InProcess, classes: str | None, kept: set[int]) -> None:
    """The pixels of the chosen classes are opaque, by default all except background."""
    mask = mask_of(await client.http.post("/segment", content=PHOTO))
    params = {"view": "cutout"} | ({} if classes is None else {"classes": classes})
    response = await client.http.post("/segment", content=PHOTO, params=params)
    assert response.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.mode == "RGBA"
        pixels = np.asarray(image)
    opaque = np.isin(mask, list(kept))
    assert np.array_equal(pixels[..., 3], np.where(opaque, 255, 0))
    assert np.array_equal(pixels[opaque][:, :3], two_class_photo()[opaque])
    assert not pixels[~opaque].any()


async def test_a_cutout_as_webp(client: InProcess) -> None:
    """Accept selects WebP, with transparency."""
    response = await client.http.post(
        "/segment", content=JPEG, params={"view": "cutout"}, headers={"Accept": "image/webp"}
    )
    assert response.headers["Content-Type"] == "image/webp"
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.mode, image.size) == ("WEBP", "RGBA", (300, 200))


async def test_confidence(client: InProcess) -> None:
    """Greyscale, high inside areas and low between them; JSON has its mean per class."""
    params = {"view": "confidence"}
    response = await client.http.post("/segment", content=PHOTO, params=params)
    assert response.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.mode == "L"
        confidence = np.asarray(image)
    assert confidence.shape == (64, 96)
    assert confidence[40, 8] > 1.5 * confidence[40, 40:52].min()
    mask = mask_of(await client.http.post("/segment", content=PHOTO))
    body = (await client.http.post("/segment", content=PHOTO, params=params, headers=JSON)).json()
    for one in body["classes"]:
        mean = confidence[mask == one["id"]].mean() / 255
        assert one["confidence"] == pytest.approx(mean)
    only = await client.http.post("/segment", content=PHOTO, params={**params, "classes": "cat"})
    with Image.open(io.BytesIO(only.content)) as image:
        assert np.array_equal(np.asarray(image), np.where(mask == CAT, confidence, 0))


async def test_json_describes_the_mask(client: InProcess) -> None:
    """JSON has the size, the model and the statistics of each class present, largest first."""
    mask = mask_of(await client.http.post("/segment", content=PHOTO))
    body = (await client.http.post("/segment", content=PHOTO, headers=JSON)).json()
    assert (body["width"], body["height"]) == (96, 64)
    assert body["model"] == {"name": "tiny", "version": "1"}
    assert body["mask"] is None
    assert list(body["timing_ms"])[-1] == "encode"
    classes = body["classes"]
    assert {one["id"] for one in classes} == set(np.unique(mask).tolist())
    assert {one["id"] for one in classes} >= {0, CAT, PERSON}
    assert [one["pixels"] for one in classes] == sorted(
        (one["pixels"] for one in classes), reverse=True
    )
    for one in classes:
        y, x = np.nonzero(mask == one["id"])
        assert one["name"] == voc.CLASSES[one["id"]]
        assert one["color"] == voc.PALETTE[one["id"]].tolist()
        assert one["pixels"] == len(x)
        assert one["fraction"] == pytest.approx(len(x) / mask.size)
        assert one["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert 1 / 21 < one["confidence"] <= 1
        assert one["rle"]["size"] == [64, 96]
        assert one["rle"]["counts"]


async def test_json_with_the_mask_as_polygons(client: InProcess) -> None:
    """The polygons of each class cover its mask, also if `classes` limits them."""
    mask = mask_of(await client.http.post("/segment", content=JPEG))
    for only in ({}, {"classes": "person"}):
        params = {"mask": "polygons", **only}
        answer = await client.http.post("/segment", content=JPEG, params=params, headers=JSON)
        body = answer.json()
        assert body["mask"] is None
        assert [one["name"] for one in body["classes"]] == ["person"] or not only
        for one in body["classes"]:
            assert "rle" not in one
            filled = coco.decode(coco.merge(coco.frPyObjects(one["polygons"], 200, 300))) == 1
            region = mask == one["id"]
            assert (filled & region).sum() / (filled | region).sum() >= 0.98


async def test_json_with_the_mask_as_png(client: InProcess) -> None:
    """The mask is base64 of the same file as the view `mask`."""
    png = await client.http.post("/segment", content=PHOTO)
    body = (
        await client.http.post("/segment", content=PHOTO, params={"mask": "png"}, headers=JSON)
    ).json()
    assert base64.b64decode(body["mask"]) == png.content
    assert all({"rle", "polygons"}.isdisjoint(one) for one in body["classes"])


async def test_json_without_a_mask(client: InProcess) -> None:
    """mask=none leaves only the statistics."""
    body = (
        await client.http.post("/segment", content=PHOTO, params={"mask": "none"}, headers=JSON)
    ).json()
    assert body["mask"] is None
    assert all("rle" not in one for one in body["classes"])


async def test_classes_limit_any_view(client: InProcess) -> None:
    """Other classes are background in the mask, photo in the overlay, absent in JSON."""
    only = {"classes": "person, dog"}
    mask = mask_of(await client.http.post("/segment", content=PHOTO, params=only))
    assert set(np.unique(mask)) == {0, PERSON}
    body = (await client.http.post("/segment", content=PHOTO, params=only, headers=JSON)).json()
    assert [one["name"] for one in body["classes"]] == ["person"]
    overlay = await client.http.post(
        "/segment", content=PHOTO, params={**only, "view": "overlay", "alpha": 1}
    )
    with Image.open(io.BytesIO(overlay.content)) as image:
        assert np.asarray(image)[40, 8].tolist() == voc.FULL_PALETTE[CAT].tolist()


async def test_many_at_once(client: InProcess) -> None:
    """Concurrent photos of several shapes each get their own mask."""
    ids = [CAT, PERSON, 1, 2, 3, 4]
    shapes = [(4, 6), (6, 4), (6, 6)] * 2
    photos = [
        encode(paint(np.full(shape, index, dtype=np.uint8)))
        for index, shape in zip(ids, shapes, strict=True)
    ]
    responses = await asyncio.gather(
        *(client.http.post("/segment", content=photo) for photo in photos)
    )
    for response, index, (height, width) in zip(responses, ids, shapes, strict=True):
        mask = mask_of(response)
        assert mask.shape == (height * 16, width * 16)
        assert (mask == index).all()


async def test_the_label_map(client: InProcess) -> None:
    """The label map has 21 classes with VOC's colours, and the ignore index."""
    body = (await client.http.get("/classes")).json()
    assert body["ignore_index"] == 255
    assert [one["name"] for one in body["classes"]] == list(voc.CLASSES)
    assert body["classes"][15] == {"id": 15, "name": "person", "color": [192, 128, 128]}


async def test_the_views(client: InProcess) -> None:
    """/views is the table: names, descriptions, media types, and the parameters they read."""
    body = (await client.http.get("/views")).json()
    assert body == {
        "views": [
            {
                "name": view.name,
                "description": view.description,
                "media_types": list(view.media_types),
                "parameters": ["classes", "max_side", "model", *view.parameters],
            }
            for view in VIEWS.values()
        ]
    }
    document = (await client.http.get("/openapi.json")).json()
    described = {one["name"] for one in document["paths"]["/segment"]["post"]["parameters"]}
    listed = {name for view in body["views"] for name in view["parameters"]}
    assert described == {"view"} | listed


async def test_the_model(client: InProcess) -> None:
    """The description has the file's sha256 and the provider."""
    body = (await client.http.get("/model")).json()
    assert (body["name"], body["version"], body["precision"]) == ("tiny", "1", "fp32")
    manifest = client.service.engines.default.model.manifest
    assert body["sha256"] == manifest.files[body["file"]].sha256
    assert body["provider"] == "CPUExecutionProvider"
    assert body["licences"] == {"code": "Apache-2.0"}


async def test_alive_and_ready(client: InProcess) -> None:
    """Both are 200 once the lifespan has started."""
    assert (await client.http.get("/healthz")).json() == {"status": "alive"}
    assert (await client.http.get("/readyz")).json() == {"status": "ready"}


async def test_draining(client: InProcess) -> None:
    """A draining service is alive, not ready, and refuses photos with Retry-After."""
    client.service.begin_draining()
    assert (await client.http.get("/healthz")).status_code == 200
    assert_problem(await client.http.get("/readyz"), 503, "not-ready")
    refused = await client.http.post("/segment", content=PHOTO)
    assert_problem(refused, 503, "not-ready")
    assert refused.headers["Retry-After"] == "1"


async def test_openapi_describes_the_body_and_every_response(client: InProcess) -> None:
    """It has the request's and responses' media types; every reference resolves."""
    document = (await client.http.get("/openapi.json")).json()
    post = document["paths"]["/segment"]["post"]
    assert set(post["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/octet-stream",
    }
    assert set(post["responses"]["200"]["content"]) == {
        "image/png",
        "image/jpeg",
        "image/webp",
        "application/json",
    }
    parameters = {one["name"]: one["schema"] for one in post["parameters"]}
    assert parameters["view"]["enum"] == ["mask", "overlay", "cutout", "confidence", "json"]
    assert parameters["mask"]["enum"] == ["rle", "png", "polygons", "none"]
    batch = document["paths"]["/segment/batch"]["post"]
    assert batch["responses"]["200"]["content"] == {
        "application/x-ndjson": {"schema": {"$ref": "#/components/schemas/BatchItem"}},
        "application/zip": {"schema": {"type": "string", "format": "binary"}},
    }
    for status in ("400", "406", "413", "415", "422", "503", "504"):
        assert list(post["responses"][status]["content"]) == ["application/problem+json"]
    assert batch["parameters"] == post["parameters"] == _as_fastapi_describes(Options)
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas


def _as_fastapi_describes(options: type[Options]) -> list[dict[str, Any]]:
    """The parameters of an endpoint that takes them as FastAPI's query model."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(options: Annotated[options, Query()]) -> None:  # type: ignore[valid-type]
        """Take them."""

    parameters: list[dict[str, Any]] = app.openapi()["paths"]["/"]["get"]["parameters"]
    for one in parameters:
        if one["name"] == "max_side":  # the setting's range
            one["schema"] = {"type": "integer", "minimum": 64, "maximum": 1280}
    return parameters


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in _references(value)]
    if isinstance(node, list):
        return [found for value in node for found in _references(value)]
    return []


async def test_openapi_behind_a_prefix(client: InProcess) -> None:
    """Its server is relative to the document, wherever a proxy serves it."""
    document = (await client.http.get("/openapi.json")).json()
    assert document["servers"] == [{"url": "."}]


async def test_the_docs_page(client: InProcess) -> None:
    """/docs loads the API's description."""
    response = await client.http.get("/docs")
    assert response.status_code == 200
    assert "/openapi.json" in response.text
