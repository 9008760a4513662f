"""The API's errors over ASGI: status and problem, and no internals."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from starlette.types import Message, Scope

from service.errors import ArtefactError, ContractError
from service.settings import Settings
from tests.artefacts import build_artefact, encode, paint, two_class_photo
from tests.clients import InProcess, assert_problem, in_process
from tests.fakes import FakeSession

pytestmark = pytest.mark.anyio

PHOTO = encode(two_class_photo())
JPEG = encode(paint(np.full((12, 18), 15, dtype=np.uint8)), "JPEG")


async def test_no_body(client: InProcess) -> None:
    """A request without a body is 400."""
    assert_problem(await client.http.post("/segment"), 400, "no-image")


@pytest.mark.parametrize(
    "form",
    [
        {"files": {"photo": ("x.png", PHOTO)}},
        {"files": {"image": ("x.png", b"")}},
        {"files": {"note": (None, "x")}, "data": {"image": "text"}},
    ],
)
async def test_a_form_without_an_image(client: InProcess, form: dict[str, Any]) -> None:
    """Another field, an empty file or text is 400."""
    assert_problem(await client.http.post("/segment", **form), 400, "no-image")


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data"),
        (
            b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--",
            "multipart/form-data; boundary=x",
        ),
        (b"", "multipart/form-data; boundary=x"),
        (b"--x--", "multipart/form-data; boundary=x; charset=nonsense"),
        (b"x", "multipart/form-data; boundary="),
        (b"x", 'multipart/form-data; boundary="'),
        (b"x", "multipart/form-data; boundary=" + "x" * 1000),
    ],
)
async def test_a_broken_form(client: InProcess, content: bytes, content_type: str) -> None:
    """A malformed form is 400."""
    response = await client.http.post(
        "/segment", content=content, headers={"Content-Type": content_type}
    )
    assert response.status_code == 400
    assert response.headers["Content-Type"] == "application/problem+json"


async def test_a_form_of_two_files(client: InProcess) -> None:
    """More than one photo is 400."""
    files = [("image", ("a.png", PHOTO)), ("image", ("b.png", PHOTO))]
    assert_problem(await client.http.post("/segment", files=files), 400, "malformed-request")


async def test_a_text_file(client: InProcess) -> None:
    """A text file with an image's Content-Type is 415; the detail lists the allowed types."""
    response = await client.http.post(
        "/segment", content=b"hello", headers={"Content-Type": "image/png"}
    )
    assert "JPEG, PNG" in assert_problem(response, 415, "unsupported-image-type")["detail"]


async def test_a_truncated_jpeg(client: InProcess) -> None:
    """Half of an image is 422."""
    response = await client.http.post("/segment", content=JPEG[: len(JPEG) // 2])
    assert_problem(response, 422, "undecodable-image")


async def test_an_image_over_the_pixel_cap(client: InProcess) -> None:
    """Few bytes with many pixels are 413."""
    big = encode(np.zeros((400, 300, 3), dtype=np.uint8))
    problem = assert_problem(
        await client.http.post("/segment", content=big), 413, "image-too-large"
    )
    assert "300 x 400 = 120000 pixels, but at most 100000" in problem["detail"]


@pytest.mark.parametrize("as_form", [False, True])
async def test_a_body_over_the_cap(client: InProcess, as_form: bool) -> None:
    """A Content-Length over the cap is 413, raw or in a form."""
    data = JPEG + bytes(200_000)
    sent = {"files": {"image": ("x.jpg", data)}} if as_form else {"content": data}
    problem = assert_problem(
        await client.http.post("/segment", **sent),
        413,
        "body-too-large",
    )
    assert "100000 bytes" in problem["detail"]


@pytest.mark.parametrize("content_type", ["image/jpeg", "multipart/form-data; boundary=x"])
async def test_an_endless_chunked_body_is_not_read_to_its_end(
    client: InProcess, content_type: str
) -> None:
    """Without a Content-Length the received bytes are counted."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        while True:
            taken += 10_000
            assert taken < 1_000_000
            yield bytes(10_000)

    response = await client.http.post(
        "/segment", content=endless(), headers={"Content-Type": content_type}
    )
    assert_problem(response, 413, "body-too-large")


async def test_a_form_whose_file_alone_is_over_the_cap(client: InProcess) -> None:
    """The allowance for a form's overhead does not apply to the file."""
    data = JPEG + bytes(100_001 - len(JPEG))
    response = await client.http.post("/segment", files={"image": ("x.jpg", data)})
    assert_problem(response, 413, "body-too-large")


@pytest.mark.parametrize(
    ("params", "parameter"),
    [
        ({"view": "wireframe"}, "view"),
        ({"alpha": "1.5"}, "alpha"),
        ({"alpha": "nan"}, "alpha"),
        ({"alpha": "much"}, "alpha"),
        ({"mask": "svg"}, "mask"),
        ({"max_side": "63"}, "max_side"),
        ({"max_side": "2049"}, "max_side"),
        ({"max_side": "big"}, "max_side"),
        ({"classes": "person,unicorn"}, "classes"),
        ({"classes": ""}, "classes"),
        ({"view": ["mask", "overlay"]}, "view"),
    ],
)
@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
async def test_a_parameter_out_of_range(
    client: InProcess, path: str, params: dict[str, str], parameter: str
) -> None:
    """It is 422, and the detail names the parameter; in the query and in the form."""
    photo = {"image": ("x.png", PHOTO)}
    for given in ({"params": params}, {"data": params}):
        response = await client.http.post(path, files=photo, **given)  # type: ignore[arg-type]
        problem = assert_problem(response, 422, "invalid-parameter")
        assert problem["detail"].startswith(f"{parameter}: ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("veiw", "did you mean view?"),
        ("VIEW", "did you mean view?"),
        ("max-side", "did you mean max_side?"),
        ("class", "did you mean classes?"),
        ("size", "known are: view, alpha, classes, max_side, mask, model"),
        ("", "known are: view"),
        ("x" * 2000, "known are: view"),
    ],
)
@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
async def test_an_unknown_parameter(client: InProcess, path: str, name: str, hint: str) -> None:
    """It is 422 with the nearest name, in the query and in the form: the default would be wrong."""
    photo = {"image": ("x.png", PHOTO)}
    for given in ({"params": {name: "1"}}, {"data": {name: "1"}}):
        response = await client.http.post(path, files=photo, **given)  # type: ignore[arg-type]
        problem = assert_problem(response, 422, "invalid-parameter")
        assert problem["detail"].startswith(f"{name[:80]}: is not known; ")
        assert hint in problem["detail"]
        assert [one["parameter"] for one in problem["errors"]] == [name[:80]]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", path) for path in ("/views", "/classes", "/models", "/model", "/v2")],
        ("GET", "/v2/models/tiny"),
        ("GET", "/v2/models/tiny/ready"),
        ("POST", "/v2/models/tiny/infer"),
        ("POST", "/v2/repository/index"),
        ("POST", "/hf/image-segmentation"),
        ("POST", "/label-studio/setup"),
        ("POST", "/label-studio/predict"),
    ],
)
async def test_an_unknown_parameter_of_any_endpoint(
    client: InProcess, method: str, path: str
) -> None:
    """The same everywhere, in each protocol's own format."""
    response = await client.http.request(method, path, params={"modle": "tiny"})
    assert response.status_code == 422
    assert "modle: is not known" in response.text


async def test_a_file_in_another_field(client: InProcess) -> None:
    """It is not left out without a word."""
    files = [("image", ("a.png", PHOTO)), ("photo", ("b.png", PHOTO))]
    response = await client.http.post("/segment/batch", files=files)
    problem = assert_problem(response, 422, "invalid-parameter")
    assert problem["detail"] == "photo: send the file in the field 'image'"


async def test_a_query_of_too_many_parameters(client: InProcess) -> None:
    """It is 400."""
    response = await client.http.post("/segment?" + "view=mask&" * 300, content=PHOTO)
    assert_problem(response, 400, "malformed-request")


@pytest.mark.parametrize(
    ("view", "accept", "available"),
    [
        ("mask", "text/html", ["image/png", "application/json"]),
        ("mask", "image/jpeg", ["image/png", "application/json"]),
        (
            "overlay",
            "image/avif",
            ["image/png", "image/jpeg", "image/webp", "application/json"],
        ),
        ("cutout", "image/jpeg", ["image/png", "image/webp", "application/json"]),
        ("confidence", "image/webp", ["image/png", "application/json"]),
    ],
)
async def test_no_acceptable_representation(
    client: InProcess, view: str, accept: str, available: list[str]
) -> None:
    """It is 406, and the problem lists the available types."""
    response = await client.http.post(
        "/segment", content=PHOTO, params={"view": view}, headers={"Accept": accept}
    )
    assert assert_problem(response, 406, "not-acceptable")["available"] == available


async def test_unknown_paths_and_methods(client: InProcess) -> None:
    """404 and 405 are problems too; 405 lists the allowed methods."""
    assert_problem(await client.http.get("/nowhere"), 404, "not-found")
    response = await client.http.get("/segment")
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["Allow"] == "POST"


class Unread:
    """A body that fails if it is read."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Fail."""
        raise AssertionError("the body was read")


async def test_overload_says_when_to_retry(make_settings: Callable[..., Settings]) -> None:
    """It is 503 with Retry-After before the body is read; the photo in flight succeeds."""
    fake = FakeSession()
    async with in_process(make_settings(queue_size=1), fake) as client:
        fake.gate.clear()
        fake.started.clear()
        held = asyncio.create_task(client.http.post("/segment", content=PHOTO))
        await asyncio.to_thread(fake.started.wait, 30)
        response = await client.http.post("/segment", content=Unread())
        assert_problem(response, 503, "overloaded")
        assert int(response.headers["Retry-After"]) >= 1
        fake.gate.set()
        assert (await held).status_code == 200


async def test_the_deadline(make_settings: Callable[..., Settings]) -> None:
    """A photo that takes longer than the deadline is 504."""
    fake = FakeSession()
    async with in_process(make_settings(deadline_s=0.05), fake) as client:
        fake.gate.clear()
        response = await client.http.post("/segment", content=PHOTO)
        fake.gate.set()
        assert_problem(response, 504, "deadline-exceeded")


@pytest.mark.parametrize(
    ("error", "slug"),
    [
        (RuntimeError("secret inside"), "inference-failed"),
        (MemoryError("secret inside"), "overloaded"),
        (RuntimeError("Failed to allocate memory for the secret inside"), "overloaded"),
    ],
)
async def test_a_failing_runtime_reveals_no_internals(
    make_settings: Callable[..., Settings],
    error: Exception,
    slug: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is 503 with Retry-After; the log has the cause and the request's id."""
    fake = FakeSession()
    async with in_process(make_settings(), fake) as client:
        fake.error = error
        response = await client.http.post("/segment", content=PHOTO)
        problem = assert_problem(response, 503, slug)
        assert response.headers["Retry-After"] == "1"
    assert "secret" not in json.dumps(problem)
    logged = capsys.readouterr().out
    assert "secret inside" in logged
    assert problem["request_id"] in logged


async def test_a_client_that_disconnects_frees_its_place(
    make_settings: Callable[..., Settings],
) -> None:
    """The work is cancelled and no longer counts as in flight."""
    fake = FakeSession()
    async with in_process(make_settings(queue_size=1), fake) as client:
        fake.gate.clear()
        fake.started.clear()
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": PHOTO, "more_body": False})
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/segment",
            "raw_path": b"/segment",
            "query_string": b"",
            "headers": [],
            "client": None,
            "server": None,
        }
        app = client.http._transport.app  # type: ignore[attr-defined]
        request = asyncio.create_task(app(scope, messages.get, send))
        await asyncio.to_thread(fake.started.wait, 30)
        messages.put_nowait({"type": "http.disconnect"})
        await request
        assert sent == []
        fake.gate.set()
        assert (await client.http.post("/segment", content=PHOTO)).status_code == 200


async def test_a_bad_artefact_stops_the_lifespan(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """A bad contract, a wrong stride in the warm-up and a missing manifest stop the start."""
    strange = build_artefact(tmp_path / "strange", metadata={"fcn.schema_version": "2"})
    with pytest.raises(ContractError, match=r"lacks fcn\.name"):
        async with in_process(make_settings(model=strange)):
            pytest.fail("started")
    stride = build_artefact(tmp_path / "stride", stride=8)
    with pytest.raises(ContractError, match="stride 16"):
        async with in_process(make_settings(model=stride)):
            pytest.fail("started")
    with pytest.raises(ArtefactError, match=r"manifest\.json: No such file"):
        async with in_process(make_settings(model=tmp_path)):
            pytest.fail("started")
