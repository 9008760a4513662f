"""Label Studio's protocol for ML backends, with the bodies that Label Studio sends."""

import base64
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from service.artefact import voc
from service.images.brush_rle import RowRuns
from service.routes.protocols import label_studio as routes
from service.settings import Settings
from tests.artefacts import encode, two_class_photo
from tests.clients import InProcess, in_process, mask_of

pytestmark = pytest.mark.anyio

PHOTO = encode(two_class_photo())
BASE = "/label-studio"
TOKEN = "0123456789abcdef"  # noqa: S105


def jwt(token_type: str) -> str:
    """A token of Label Studio's newer kinds, with a signature that nobody checks."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256"}, {"token_type": token_type})]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (*parts, b"x"))


PERSONAL = jwt("refresh")
CONFIG = """
<View>
  <Header value="What is it?"/>
  <Image name="img" value="$picture"/>
  <BrushLabels name="tag" toName="img">
    <Label value="Person" background="#f00"/>
    <Label value="Potted plant"/>
    <Label value="Animal" predicted_values="cat,dog"/>
    <Label value="Unicorn"/>
  </BrushLabels>
  <RectangleLabels name="box" toName="img"><Label value="Person"/></RectangleLabels>
</View>
"""


@dataclass
class LabelStudio:
    """A fake Label Studio: files by path, and the path and Authorization of each request."""

    files: dict[str, bytes]
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    accepted: str | None = None
    """The only Authorization that opens its files; None: all."""
    access: list[str] = field(default_factory=list)
    """The access tokens that it gives for `PERSONAL`, one after the other."""


@pytest.fixture
def label_studio() -> Iterator[LabelStudio]:
    """Serves a photo at two of Label Studio's media paths, under a prefix."""
    paths = ["/ls/data/upload/1/photo.png", "/ls/data/local-files/?d=a%20b/photo.png"]
    studio = LabelStudio(dict.fromkeys(paths, PHOTO))
    studio.files["/ls/data/upload/1/large.png"] = PHOTO + bytes(100_000)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            studio.asked.append((self.path, self.headers["Authorization"]))
            content = studio.files.get(self.path)
            if studio.accepted not in (None, self.headers["Authorization"]):
                self.send_error(401)
                return
            self.send_response(302 if "moved" in self.path else 404 if content is None else 200)
            if "moved" in self.path:
                self.send_header("Location", f"{studio.url}/data/upload/1/photo.png")
            self.end_headers()
            self.wfile.write(content or b"")

        def do_POST(self) -> None:
            studio.asked.append((self.path, self.headers["Authorization"]))
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if given != {"refresh": PERSONAL} or not studio.access:
                self.send_error(401)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"access": studio.access.pop(0)}).encode())

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        studio.url = f"http://127.0.0.1:{server.server_port}/ls"
        yield studio
        server.shutdown()


@pytest.fixture
async def backend(
    make_settings: Callable[..., Settings], label_studio: LabelStudio
) -> AsyncIterator[InProcess]:
    """The app, configured with the fake Label Studio."""
    settings = make_settings(
        max_bytes=100_000, label_studio_url=label_studio.url, label_studio_token=TOKEN
    )
    async with in_process(settings) as running:
        yield running


def data_uri(data: bytes = PHOTO) -> str:
    """An image as a data: URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def predict_body(*images: object, config: str = CONFIG) -> dict[str, Any]:
    """A request body like those of Label Studio's ``MLApi.make_predictions``."""
    tasks = [
        {"id": number, "data": {"picture": image}, "annotations": [], "predictions": []}
        for number, image in enumerate(images)
    ]
    context = {"login": "", "password": "", "context": None}
    return {"tasks": tasks, "project": "1.17", "label_config": config, "params": context}


def decode_rle(rle: list[int]) -> npt.NDArray[np.uint8]:
    """Decode rle-pack the way Label Studio's converter does: one bit field after another."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    position = 0

    def read(size: int) -> int:
        nonlocal position
        position += size
        return int(bits[position - size : position], 2)

    count, word_bits = read(32), read(5) + 1
    length_bits = [read(4) + 1 for _ in range(4)]
    values = np.empty(count, dtype=np.uint8)
    done = 0
    while done < count:
        repeated = read(1)
        end = done + 1 + read(length_bits[read(2)])
        if repeated:
            values[done:end] = read(word_bits)
        else:
            values[done:end] = [read(word_bits) for _ in range(end - done)]
        done = end
    assert done == count
    return values


def assert_error(response: httpx.Response, status: int) -> str:
    """Assert an error in the protocol's format; return its message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


# ---- brush regions -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (13, 17), (300, 400)])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_brush_regions_decode_to_the_mask(shape: tuple[int, int], classes: int) -> None:
    """Random masks decode to 255 or 0 in all four channels of each pixel."""
    mask = np.random.default_rng(classes).integers(0, classes, shape, dtype=np.uint8)
    for chosen in ([0], [1], [0, 2]):
        pixels = decode_rle(list(RowRuns.of(mask).brush(chosen))).reshape(*shape, 4)
        expected = np.isin(mask, chosen)[..., None] * np.full(4, 255)
        np.testing.assert_array_equal(pixels, expected)


def test_long_runs() -> None:
    """A run longer than 16 bits allow is split."""
    mask = np.zeros((40, 5000), dtype=np.uint8)
    mask[10:30] = 1
    mask[39, -1] = 1
    pixels = decode_rle(list(RowRuns.of(mask).brush([1]))).reshape(40, 5000, 4)
    np.testing.assert_array_equal(pixels[..., 3], mask * np.uint8(255))


def test_brush_regions_are_those_of_label_studios_converter() -> None:
    """The bytes equal those of ``label_studio_converter.brush.mask2rle`` 0.0.59."""
    mask = np.repeat([0, 1, 0, 1, 0], [3, 2, 40, 70, 5]).astype(np.uint8).reshape(8, 15)
    expected = bytes.fromhex("000001e0391bfdb009fff4f8070117ffc26000")
    assert RowRuns.of(mask).brush([1]) == expected


# ---- the protocol ------------------------------------------------------------------------------


async def test_health_and_setup(backend: InProcess) -> None:
    """Label Studio can connect the service as a model."""
    assert (await backend.http.get(f"{BASE}/health")).json()["status"] == "UP"
    body = {
        "project": "1.17",
        "schema": CONFIG,
        "hostname": "http://localhost:8080",
        "access_token": "x",
        "extra_params": None,
    }
    response = await backend.http.post(f"{BASE}/setup", json=body)
    assert response.json() == {"model_version": "tiny-1"}
    # A project without a configuration yet.
    assert (await backend.http.post(f"{BASE}/setup", json={})).status_code == 200


async def test_predict(backend: InProcess) -> None:
    """Each label found in the photo gets a region with exactly its pixels."""
    mask = mask_of(await backend.http.post("/segment", content=PHOTO))
    response = await backend.http.post(f"{BASE}/predict", json=predict_body(data_uri()))
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["results"]
    assert prediction["model_version"] == "tiny-1"
    regions = prediction["result"]
    assert [region["value"]["brushlabels"] for region in regions] == [["Person"], ["Animal"]]
    assert len({region["id"] for region in regions}) == 2
    for region, name in zip(regions, ("person", "cat"), strict=True):
        assert (region["type"], region["from_name"], region["to_name"]) == (
            "brushlabels",
            "tag",
            "img",
        )
        assert (region["original_width"], region["original_height"]) == (96, 64)
        assert region["image_rotation"] == 0
        assert region["value"]["format"] == "rle"
        pixels = decode_rle(region["value"]["rle"]).reshape(64, 96, 4)
        expected = (mask == voc.CLASSES.index(name)) * np.uint8(255)
        np.testing.assert_array_equal(pixels[..., 3], expected)
        assert 1 / 21 < region["score"] <= 1
    assert prediction["score"] == pytest.approx(np.mean([one["score"] for one in regions]))


async def test_a_label_of_several_classes(backend: InProcess) -> None:
    """A label of several classes gets one region, named by the label's alias."""
    config = CONFIG.replace('"Animal" predicted_values="cat,dog"', '"x" alias="Being" '
                            'predicted_values="cat, person"')  # fmt: skip
    mask = mask_of(await backend.http.post("/segment", content=PHOTO))
    body = predict_body(data_uri(), config=config)
    regions = (await backend.http.post(f"{BASE}/predict", json=body)).json()["results"][0]["result"]
    being = next(one for one in regions if one["value"]["brushlabels"] == ["Being"])
    pixels = decode_rle(being["value"]["rle"]).reshape(64, 96, 4)[..., 0]
    expected = np.isin(mask, [voc.CLASSES.index("cat"), voc.CLASSES.index("person")])
    np.testing.assert_array_equal(pixels > 0, expected)


@pytest.mark.parametrize(
    "image",
    [
        "/data/upload/1/photo.png",
        "upload/1/photo.png",
        "/ls/data/upload/1/photo.png",
        "{url}/data/upload/1/photo.png",
        "/data/local-files/?d=a%20b/photo.png",
        "/data/local-files/?d=a b/photo.png",
    ],
)
async def test_images_come_from_label_studio(
    backend: InProcess, label_studio: LabelStudio, image: str
) -> None:
    """The service fetches images by path or full URL, and sends the token."""
    body = predict_body(image.format(url=label_studio.url))
    response = await backend.http.post(f"{BASE}/predict", json=body)
    assert len(response.json()["results"][0]["result"]) == 2
    ((path, authorization),) = label_studio.asked
    assert path in label_studio.files
    assert authorization == f"Token {TOKEN}"


async def test_a_personal_access_token_is_exchanged(
    make_settings: Callable[..., Settings], label_studio: LabelStudio
) -> None:
    """Once for many images; again when Label Studio refuses what it has given."""
    settings = make_settings(label_studio_url=label_studio.url, label_studio_token=PERSONAL)
    body = predict_body("/data/upload/1/photo.png")
    refresh, image = "/ls/api/token/refresh", "/ls/data/upload/1/photo.png"
    async with in_process(settings) as client:
        for access, expected in (
            ("first", [(refresh, None), (image, "Bearer first")]),
            ("first", [(image, "Bearer first")]),
            ("second", [(image, "Bearer first"), (refresh, None), (image, "Bearer second")]),
        ):
            label_studio.asked.clear()
            label_studio.access = [access]
            label_studio.accepted = f"Bearer {access}"
            response = await client.http.post(f"{BASE}/predict", json=body)
            assert len(response.json()["results"][0]["result"]) == 2
            assert label_studio.asked == expected


@pytest.mark.parametrize("access", [[], ["two\nlines"], [""]])
async def test_a_personal_access_token_that_is_refused(
    make_settings: Callable[..., Settings], label_studio: LabelStudio, access: list[str]
) -> None:
    """502 that names the setting or says what is missing; the token is in no answer."""
    settings = make_settings(label_studio_url=label_studio.url, label_studio_token=PERSONAL)
    label_studio.access = list(access)
    async with in_process(settings) as client:
        body = predict_body("/data/upload/1/photo.png")
        response = await client.http.post(f"{BASE}/predict", json=body)
    assert response.status_code == 502
    wanted = "sent no access token" if access else "401 to FCN_LABEL_STUDIO_TOKEN"
    assert wanted in response.json()["error"]
    assert PERSONAL not in response.text


async def test_an_access_token_is_sent_as_it_is(
    make_settings: Callable[..., Settings], label_studio: LabelStudio
) -> None:
    """A JWT of another type opens by itself."""
    token = jwt("access")
    settings = make_settings(label_studio_url=label_studio.url, label_studio_token=token)
    async with in_process(settings) as client:
        body = predict_body("/data/upload/1/photo.png")
        await client.http.post(f"{BASE}/predict", json=body)
    assert label_studio.asked == [("/ls/data/upload/1/photo.png", f"Bearer {token}")]


@pytest.mark.parametrize(
    "image",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:1/ls/data/upload/1/photo.png",
        "https://127.0.0.1/ls/data/upload/1/photo.png",
        "//example.org/data/upload/1/photo.png",
        "http://127.0.0.1@example.org/data/upload/1/photo.png",
        "http://[/data/upload/1/photo.png",
        "http://127.0.0.1:99999/data/upload/1/photo.png",
        "http:///data/upload/1/photo.png",
        "file:///etc/passwd",
        "s3://bucket/photo.png",
        "/api/projects",
        "/data",
        "/data/../api/projects",
        "/data/%2e%2e/api/projects",
        "/data/..%2Fapi/projects",
        "/data/..\\api/projects",
        "",
        "photo.png",
    ],
)
async def test_nothing_else_is_fetched(
    backend: InProcess, label_studio: LabelStudio, image: str
) -> None:
    """Tasks are untrusted: a task cannot direct a request to another target."""
    response = await backend.http.post(f"{BASE}/predict", json=predict_body(image))
    assert_error(response, 422)
    assert label_studio.asked == []


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("missing.png", 502, "answered 404"),
        ("moved.png", 502, "answered 302"),
        ("large.png", 413, "at most 100000 bytes"),
        ("x\r\nHost: y.png", 502, "answered 404"),
    ],
)
async def test_images_that_label_studio_does_not_give(
    backend: InProcess, label_studio: LabelStudio, path: str, status: int, message: str
) -> None:
    """The service does not follow redirects or read past the size limit."""
    body = predict_body(f"/data/upload/1/{path}")
    response = await backend.http.post(f"{BASE}/predict", json=body)
    assert message in assert_error(response, status)
    assert len(label_studio.asked) == 1


async def test_label_studio_is_down(make_settings: Callable[..., Settings]) -> None:
    """The answer is 502 and does not reveal Label Studio's address."""
    async with in_process(make_settings(label_studio_url="http://127.0.0.1:1")) as backend:
        body = predict_body("/data/upload/1/photo.png")
        error = assert_error(await backend.http.post(f"{BASE}/predict", json=body), 502)
    assert error == "Label Studio did not send the image"


@pytest.mark.parametrize(
    "url",
    ["localhost:8080", "ftp://host", "http://", "http://user@host", "http://host?x", "http://h:x"],
)
async def test_a_label_studio_that_cannot_be(url: str) -> None:
    """An invalid URL is a settings error; the token is not in the settings' repr."""
    with pytest.raises(ValidationError, match="label_studio_url"):
        Settings(label_studio_url=url)
    assert TOKEN not in repr(Settings(label_studio_token=TOKEN))


async def test_without_a_label_studio_nothing_is_fetched(client: InProcess) -> None:
    """Without a Label Studio only data: URIs work."""
    body = predict_body("/data/upload/1/photo.png")
    assert "FCN_LABEL_STUDIO_URL" in assert_error(
        await client.http.post(f"{BASE}/predict", json=body), 422
    )
    response = await client.http.post(f"{BASE}/predict", json=predict_body(data_uri()))
    assert len(response.json()["results"][0]["result"]) == 2


async def test_one_bad_image_does_not_fail_the_others(client: InProcess) -> None:
    """The bad image gets an empty prediction: Label Studio expects one for each task, in order."""
    body = predict_body(data_uri(), data_uri(b"hello"), "http://example.org/x.png", 7, data_uri())
    response = await client.http.post(f"{BASE}/predict", json=body)
    assert [len(one["result"]) for one in response.json()["results"]] == [2, 0, 0, 0, 2]
    assert response.json()["results"][1] == {"model_version": "tiny-1", "score": 0, "result": []}
    nothing = await client.http.post(f"{BASE}/predict", json=predict_body())
    assert nothing.json() == {"results": []}


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ("data:image/png", 400),
        ("data:image/png;base64,?", 400),
        (data_uri(b"hello"), 415),
        ("data:,hello%21", 415),
        ("data:," + "%41" * 70_000, 413),
        ("data:" + "a" * 70_000, 400),
        ("x" * 5000, 422),
        ("data:;base64,\U0001f600", 400),
        (data_uri(PHOTO[:100]), 422),
        (data_uri(bytes(100_001)), 413),
        (None, 400),
    ],
)
async def test_bad_images(client: InProcess, image: object, status: int) -> None:
    """If the only image fails, the request fails with its error."""
    response = await client.http.post(f"{BASE}/predict", json=predict_body(image))
    assert_error(response, status)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "<View>",
        "<View/>",
        CONFIG.replace("$picture", "picture"),
        CONFIG.replace('toName="img"', 'toName="other"'),
        CONFIG.replace("BrushLabels", "PolygonLabels"),
        '<View><Image name="i" value="$x"/><BrushLabels name="t" toName="i">'
        '<Label value="Unicorn"/></BrushLabels></View>',
        '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><View>&b;</View>',
        '<!doctype x SYSTEM "file:///etc/passwd"><View/>',
        "<View>" * 40_000,
        "<View>" * 15_000 + "</View>" * 15_000,
        "<View " + " ".join(f"a{number}=''" for number in range(20_000)) + "/>",
        '<?xml version="1.0" encoding="utf-99"?><View>\U0001f600',
        f"<View>{' ' * 300_000}</View>",
    ],
)
async def test_configurations_that_cannot_be_pre_labelled(client: InProcess, config: str) -> None:
    """An unusable configuration gets 422 from ``setup`` and from ``predict``."""
    setup = await client.http.post(f"{BASE}/setup", json={"schema": config})
    assert "label_config" in assert_error(setup, 422)
    body = predict_body(data_uri(), config=config)
    assert_error(await client.http.post(f"{BASE}/predict", json=body), 422)


async def test_thousands_of_labels(client: InProcess) -> None:
    """More labels than models have classes get 422: each would get a region of its own."""
    labels = "".join(
        f'<Label value="{number:x}" predicted_values="background"/>' for number in range(5200)
    )
    config = f'<View><Image name="i" value="$picture"/><BrushLabels name="b" toName="i">{labels}'
    config += "</BrushLabels></View>"
    setup = await client.http.post(f"{BASE}/setup", json={"schema": config})
    assert "at most 1000 labels" in assert_error(setup, 422)
    body = predict_body(data_uri(), config=config)
    assert_error(await client.http.post(f"{BASE}/predict", json=body), 422)


async def test_labels_of_the_same_class(client: InProcess) -> None:
    """Each gets a region with the same pixels and an id of its own."""
    config = CONFIG.replace("Unicorn", 'Pet" predicted_values="cat')
    body = predict_body(data_uri(), config=config.replace("cat,dog", "cat"))
    (prediction,) = (await client.http.post(f"{BASE}/predict", json=body)).json()["results"]
    _, animal, pet = prediction["result"]
    assert animal["value"]["rle"] == pet["value"]["rle"]
    assert animal["id"] != pet["id"]


async def test_too_many_tasks(make_settings: Callable[..., Settings]) -> None:
    """More than 250 tasks get 400, and more than 250 images 422, before any is read."""
    two_images = CONFIG.replace(
        "</View>",
        """<Image name="other" value="$second"/>
        <BrushLabels name="more" toName="other"><Label value="Cat"/></BrushLabels></View>""",
    )
    async with in_process(make_settings()) as client:
        body = predict_body(*["data:,"] * 100_000)
        error = assert_error(await client.http.post(f"{BASE}/predict", json=body), 400)
        assert "at most 250" in error
        body = predict_body(*["data:,"] * 126, config=two_images)
        error = assert_error(await client.http.post(f"{BASE}/predict", json=body), 422)
        assert "at most 250 images" in error


async def test_an_answer_that_is_too_long(
    client: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions beyond the limit get 422 with advice, whatever the number of tasks."""
    monkeypatch.setattr(routes, "MAX_ANSWER_BYTES", 5000)
    one = await client.http.post(f"{BASE}/predict", json=predict_body(data_uri()))
    assert one.status_code == 200
    body = predict_body(*[data_uri()] * 5)
    error = assert_error(await client.http.post(f"{BASE}/predict", json=body), 422)
    assert "send fewer" in error


async def test_a_task_with_two_images(client: InProcess) -> None:
    """Its prediction has the regions of both, each with its own photo's size."""
    config = CONFIG.replace(
        "</View>",
        """<Image name="other" value="$second"/>
        <BrushLabels name="more" toName="other"><Label value="Cat"/></BrushLabels></View>""",
    )
    body = predict_body(data_uri(), config=config)
    narrow = encode(two_class_photo()[:, 48:])
    body["tasks"][0]["data"]["second"] = data_uri(narrow)
    (prediction,) = (await client.http.post(f"{BASE}/predict", json=body)).json()["results"]
    found = [(one["from_name"], one["original_width"]) for one in prediction["result"]]
    assert found[:2] == [("tag", 96), ("tag", 96)]
    assert set(found[2:]) <= {("more", 48)}
    scores = [one["score"] for one in prediction["result"]]
    assert prediction["score"] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"tasks": [1], "label_config": ""}',
        b'{"tasks": null}',
        b'{"tasks": [{"data": []}]}',
        b"[" * 10_000,
    ],
)
async def test_malformed_requests(client: InProcess, content: bytes) -> None:
    """Malformed requests get 400."""
    assert_error(await client.http.post(f"{BASE}/predict", content=content), 400)


async def test_webhooks_are_ignored(client: InProcess) -> None:
    """The answer to an event is JSON that says that it is ignored."""
    for body in ({"action": "START_TRAINING", "project": {}}, {"action": "ANNOTATION_CREATED"}):
        response = await client.http.post(f"{BASE}/webhook", json=body)
        assert response.json() == {"status": "ignored"}


async def test_draining(client: InProcess) -> None:
    """A draining service is unhealthy and refuses predictions with Retry-After."""
    client.service.begin_draining()
    assert_error(await client.http.get(f"{BASE}/health"), 503)
    refused = await client.http.post(f"{BASE}/predict", json=predict_body(data_uri()))
    assert_error(refused, 503)
    assert refused.headers["Retry-After"] == "1"


async def test_paths_that_are_not_there(client: InProcess) -> None:
    """Paths that some versions of Label Studio request get 404."""
    for path in ("versions", "train", "validate"):
        assert_error(await client.http.get(f"{BASE}/{path}"), 404)
