"""``POST /segment/batch`` over ASGI."""

import asyncio
import errno
import io
import json
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.types import Message, Scope

from service.artefact import voc
from service.http.uploads import Upload
from service.routes.batch import in_order
from service.settings import Settings
from tests.artefacts import encode, paint, two_class_photo
from tests.clients import InProcess, assert_problem, in_process
from tests.fakes import FakeSession

pytestmark = pytest.mark.anyio

PHOTO = encode(two_class_photo())
LINES = {"Accept": "application/x-ndjson"}

Files = list[tuple[str, tuple[str, bytes]]]


def files(*photos: tuple[str, bytes], field: str = "image") -> Files:
    """A form's files."""
    return [(field, photo) for photo in photos]


def of_class(name: str, height: int = 4, width: int = 6) -> bytes:
    """A photo of one class."""
    return encode(paint(np.full((height, width), voc.CLASSES.index(name), dtype=np.uint8)))


MIXED = files(
    ("cat.jpg", of_class("cat")),
    ("broken.png", PHOTO[:60]),
    ("folder/dog.png", of_class("dog", 6, 4)),
    ("note.txt", b"hello"),
    ("cat.png", of_class("cat", 6, 6)),
    ("empty.jpg", b""),
)


async def test_an_archive(client: InProcess) -> None:
    """The archive has a PNG named after each photo, and an index with the problems."""
    response = await client.http.post("/segment/batch", files=MIXED)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/zip"
    assert response.headers["X-Model"] == "tiny/1"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["cat.png", "dog.png", "cat-2.png", "index.json"]
        for name, shape in (("cat.png", (64, 96)), ("dog.png", (96, 64)), ("cat-2.png", (96, 96))):
            with Image.open(archive.open(name)) as image:
                assert image.mode == "P"
                mask = np.asarray(image)
            assert mask.shape == shape
            assert (mask == voc.CLASSES.index(name[:3])).all()
        index = json.loads(archive.read("index.json"))
    assert index["model"] == {"name": "tiny", "version": "1"}
    assert [one["index"] for one in index["images"]] == list(range(6))
    assert [one["name"] for one in index["images"]] == [name for _, (name, _) in MIXED]
    assert [one.get("file") for one in index["images"]] == [
        *["cat.png", None, "dog.png"],
        *[None, "cat-2.png", None],
    ]
    problems = [one["problem"]["status"] for one in index["images"] if "problem" in one]
    assert problems == [422, 415, 400]


async def test_json_lines(client: InProcess) -> None:
    """Each line is /segment's JSON or a problem, in the order of the images."""
    params = {"mask": "polygons", "classes": "cat"}
    response = await client.http.post("/segment/batch", files=MIXED, headers=LINES, params=params)
    assert response.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [(one["index"], one["name"]) for one in lines] == [
        (index, name) for index, (_, (name, _)) in enumerate(MIXED)
    ]
    assert ["segmentation" in one for one in lines] == [True, False, True, False, True, False]
    assert ["problem" in one for one in lines] == [False, True, False, True, False, True]
    alone = await client.http.post(
        "/segment",
        content=of_class("cat"),
        params=params,
        headers={"Accept": "application/json"},
    )
    assert _untimed(lines[0]["segmentation"]) == _untimed(alone.json())
    assert lines[2]["segmentation"]["classes"] == []
    request_id = response.headers["X-Request-ID"]
    assert lines[1]["problem"] == {
        "type": "/problems/undecodable-image",
        "title": "The image cannot be decoded",
        "status": 422,
        "detail": "the PNG data is broken, truncated or of an unsupported variant",
        "instance": "/segment/batch",
        "request_id": request_id,
    }


def _untimed(segmentation: dict[str, Any]) -> dict[str, Any]:
    return {**segmentation, "timing_ms": None}


async def test_the_views_of_an_archive(client: InProcess) -> None:
    """An archive has the same files as /segment with the same parameters."""
    response = await client.http.post(
        "/segment/batch", files=files(("a.png", PHOTO)), params={"view": "cutout"}
    )
    alone = await client.http.post("/segment", content=PHOTO, params={"view": "cutout"})
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.read("a.png") == alone.content


async def test_the_other_names_of_the_field(client: InProcess) -> None:
    """All in their order in the form."""
    names = ["images", "file", "image[]", "files[]", "image"]
    sent = [one for name in names for one in files((f"{name}.png", PHOTO), field=name)]
    response = await client.http.post("/segment/batch", files=sent, headers=LINES)
    found = [json.loads(line)["name"] for line in response.text.splitlines()]
    assert found == [f"{name}.png" for name in names]


async def test_parameters_in_the_form(client: InProcess) -> None:
    """They count as those of the query do."""
    form = {"data": {"view": "cutout"}}
    response = await client.http.post("/segment/batch", files=files(("a.png", PHOTO)), **form)  # type: ignore[arg-type]
    alone = await client.http.post("/segment", content=PHOTO, params={"view": "cutout"})
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.read("a.png") == alone.content


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"content": PHOTO},
        {"files": {"photo": ("x.png", PHOTO)}},
        {"files": {"note": (None, "x")}, "data": {"image": "text"}},
    ],
)
async def test_no_images(client: InProcess, sent: dict[str, Any]) -> None:
    """A raw body or another field is 400."""
    assert_problem(await client.http.post("/segment/batch", **sent), 400, "no-image")


async def test_errors_of_the_whole_request(client: InProcess) -> None:
    """Errors in parameters, model or Accept fail the request."""
    for status, slug, options in (
        (404, "unknown-model", {"params": {"model": "other"}}),
        (406, "not-acceptable", {"headers": {"Accept": "image/png"}}),
        (422, "invalid-parameter", {"params": {"classes": "unicorn"}}),
        (422, "invalid-parameter", {"params": {"max_side": "1"}}),
    ):
        response = await client.http.post(
            "/segment/batch",
            files=files(("a.png", PHOTO)),
            **options,  # type: ignore[arg-type]
        )
        assert_problem(response, status, slug)


async def test_the_caps(make_settings: Callable[..., Settings]) -> None:
    """Too many images are 400, too many bytes 413; one image too large is its own problem."""
    settings = make_settings(max_images=3, max_images_bytes=40_000, max_bytes=30_000)
    async with in_process(settings) as client:
        many = await client.http.post("/segment/batch", files=files(*[("a.png", PHOTO)] * 4))
        problem = assert_problem(many, 400, "malformed-request")
        assert "more than 3 files" in problem["detail"]
        heavy = await client.http.post(
            "/segment/batch", files=files(*[("a.png", PHOTO + bytes(25_000))] * 3)
        )
        problem = assert_problem(heavy, 413, "body-too-large")
        assert "images of one request may have at most 40000 bytes" in problem["detail"]
        one = await client.http.post(
            "/segment/batch",
            files=files(("big.png", PHOTO + bytes(30_000)), ("small.png", PHOTO)),
            headers=LINES,
        )
        big, small = (json.loads(line) for line in one.text.splitlines())
        assert (big["problem"]["status"], "segmentation" in small) == (413, True)


async def test_a_failing_device_fails_no_other_image(
    make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """The problem reveals no internals; the log has them."""
    fake = FakeSession()
    async with in_process(make_settings(), fake) as client:
        fake.error = RuntimeError("secret inside")
        response = await client.http.post(
            "/segment/batch", files=files(("a.png", PHOTO), ("b.txt", b"x")), headers=LINES
        )
    first, second = (json.loads(line)["problem"] for line in response.text.splitlines())
    assert (first["type"], second["status"]) == ("/problems/inference-failed", 415)
    assert "secret" not in response.text
    assert "secret inside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "slug"),
    [
        (RuntimeError("secret inside"), 500, "internal-error"),
        (MemoryError("secret inside"), 503, "overloaded"),
        (OSError(errno.ENOSPC, "secret inside"), 503, "overloaded"),
    ],
)
async def test_an_unexpected_error_fails_no_other_image(
    client: InProcess,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    slug: str,
) -> None:
    """The problem of any error while reading reveals no internals; the log has them."""
    read = Upload.read

    def fail(upload: Upload, max_bytes: int) -> bytes:
        if upload.name == "a.txt":
            raise error
        return read(upload, max_bytes)

    monkeypatch.setattr(Upload, "read", fail)
    response = await client.http.post(
        "/segment/batch", files=files(("a.txt", b"x"), ("b.png", PHOTO)), headers=LINES
    )
    first, second = (json.loads(line) for line in response.text.splitlines())
    problem = first["problem"]
    assert (problem["status"], problem["type"]) == (status, f"/problems/{slug}")
    assert "segmentation" in second
    assert "secret" not in response.text
    assert "secret inside" in capsys.readouterr().out


async def test_a_batch_uses_the_free_places(make_settings: Callable[..., Settings]) -> None:
    """One free place is enough for a batch; without one it is refused, as a photo would be."""
    fake = FakeSession()
    async with in_process(make_settings(queue_size=2), fake) as client:
        segmenter = client.service.segmenter
        photos = files(*[(f"{number}.png", PHOTO) for number in range(5)])
        with segmenter.hold(1):
            response = await client.http.post("/segment/batch", files=photos, headers=LINES)
            lines = [json.loads(line) for line in response.text.splitlines()]
            assert all("segmentation" in line for line in lines)
            assert segmenter.in_flight == 1
        with segmenter.hold(2):
            refused = await client.http.post("/segment/batch", files=photos)
            assert_problem(refused, 503, "overloaded")
            assert refused.headers["Retry-After"]
        assert segmenter.in_flight == 0
        client.service.begin_draining()
        refused = await client.http.post("/segment/batch", files=photos)
        assert_problem(refused, 503, "not-ready")


@dataclass
class Holding(FakeSession):
    """Closes the gate after ``passes`` runs, and sets ``held``."""

    passes: int | None = None
    held: threading.Event = field(default_factory=threading.Event)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,  # noqa: ANN401
    ) -> Sequence[Any]:
        """Logits of zeros."""
        if len(self.threads) == self.passes:
            self.gate.clear()
            self.held.set()
        return super().run(output_names, input_feed)


async def test_the_response_starts_with_the_first_photo(
    make_settings: Callable[..., Settings],
) -> None:
    """If the client then disconnects, the places are free and no other photo is started."""
    fake = Holding()
    async with in_process(make_settings(queue_size=1), fake) as client:
        runs = len(fake.threads)
        fake.passes = runs + 1
        request, messages, sent = _post(client, *[(f"{number}.png", PHOTO) for number in range(9)])
        assert await asyncio.to_thread(fake.held.wait, 30)
        head, line = sent
        assert head["status"] == 200
        assert json.loads(line["body"])["name"] == "0.png"
        messages.put_nowait({"type": "http.disconnect"})
        await request
        assert client.service.segmenter.in_flight == 0
        assert not any(message.get("more_body") is False for message in sent)
        fake.gate.set()
        assert (await client.http.post("/segment", content=PHOTO)).status_code == 200
        # The first and the held one; the third is the other request's.
        assert len(fake.threads) == runs + 3


def _post(
    client: InProcess, *photos: tuple[str, bytes]
) -> tuple[asyncio.Task[None], asyncio.Queue[Message], list[Message]]:
    """Send a batch by ASGI messages, so that the test sees each piece of the response."""
    built = httpx.Request("POST", "http://service/segment/batch", files=files(*photos))
    messages: asyncio.Queue[Message] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": built.read(), "more_body": False})
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/segment/batch",
        "raw_path": b"/segment/batch",
        "query_string": b"",
        "headers": [
            (b"content-type", built.headers["Content-Type"].encode()),
            (b"accept", LINES["Accept"].encode()),
        ],
        "client": None,
        "server": None,
    }
    app = client.http._transport.app  # type: ignore[attr-defined]
    return asyncio.create_task(app(scope, messages.get, send)), messages, sent


async def test_results_come_in_order() -> None:
    """Results keep their order, at most three run at once, and closing cancels the rest."""
    running, most = 0, 0
    gates = [asyncio.Event() for _ in range(6)]

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await gates[number].wait()
        finally:
            running -= 1
        return number

    async def collect() -> list[int]:
        return [result async for result in in_order((work(number) for number in range(6)), 3)]

    collecting = asyncio.create_task(collect())
    for gate in reversed(gates):
        await asyncio.sleep(0)
        gate.set()
    assert await collecting == list(range(6))
    assert most == 3
    gates[1].clear()
    stream = in_order((work(number) for number in range(6)), 3)
    assert await anext(stream) == 0
    assert running == 1
    await stream.aclose()
    assert running == 0
