"""The clients: which failures they retry and when, and which errors they raise."""

import asyncio
import inspect
import io
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, assert_type

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from service.client import (
    AsyncClient,
    Client,
    ClientError,
    NoAnswerInTime,
    RequestRefused,
    Retries,
    ServiceBusy,
    ServiceUnreachable,
    UnexpectedAnswer,
)
from service.images.encoding import encode_mask
from service.schemas import BatchItem, Problem
from tests.artefacts import encode, two_class_photo

PHOTO = encode(two_class_photo())
MASK = np.array([[0, 15], [8, 0]], dtype=np.uint8)

Mask = npt.NDArray[np.uint8]
Handler = Callable[[httpx.Request], httpx.Response]
Call = Callable[[Any], Any]


def drive_threads(
    handler: Handler, call: Call, retries: Retries | None = None
) -> tuple[Any, list[float]]:
    """The result of a call on `Client`, and its waits in seconds."""
    waits: list[float] = []
    with Client(
        transport=httpx.MockTransport(handler), sleep=waits.append, retries=retries
    ) as client:
        return call(client), waits


def drive_asyncio(
    handler: Handler, call: Call, retries: Retries | None = None
) -> tuple[Any, list[float]]:
    """The result of a call on `AsyncClient`, and its waits in seconds."""
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    async def run() -> Any:  # noqa: ANN401
        transport = httpx.MockTransport(handler)
        async with AsyncClient(transport=transport, sleep=wait, retries=retries) as client:
            pending: Awaitable[Any] = call(client)
            return await pending

    return asyncio.run(run()), waits


Drive = Callable[..., tuple[Any, list[float]]]
both = pytest.mark.parametrize("drive", [drive_threads, drive_asyncio])


def answers(*script: httpx.Response | Exception) -> tuple[Handler, list[httpx.Request]]:
    """A handler that answers from a script and repeats the last step, and its requests."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        step = script[min(len(seen), len(script)) - 1]
        if isinstance(step, Exception):
            raise step
        return httpx.Response(step.status_code, headers=step.headers, content=step.content)

    return handler, seen


def mask_answer() -> httpx.Response:
    """A response with a mask."""
    return httpx.Response(200, content=encode_mask(MASK), headers={"Content-Type": "image/png"})


def refusal(status: int, retry_after: str | None = None) -> httpx.Response:
    """A response with a problem."""
    problem = Problem(
        type="/problems/x",
        title="X",
        status=status,
        detail="so it is",
        instance="/",
        request_id="1",
    )
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, content=problem.model_dump_json(), headers=headers)


def get_mask(client: Any) -> Any:  # noqa: ANN401
    """Send one request."""
    return client.mask(PHOTO)


@both
@pytest.mark.parametrize("status", [503, 429])
def test_busy_is_tried_again_when_the_service_says(drive: Drive, status: int) -> None:
    """The client waits for Retry-After, plus at most a quarter of it, and returns the answer."""
    handler, seen = answers(refusal(status, "7"), refusal(status, "2"), mask_answer())
    mask, waits = drive(handler, get_mask)
    assert np.array_equal(mask, MASK)
    assert len(seen) == 3
    assert [request.content for request in seen] == [PHOTO] * 3
    assert 7 <= waits[0] <= 7 * 1.25
    assert 2 <= waits[1] <= 2 * 1.25


def test_retry_after_may_be_a_date() -> None:
    """A date in the past means no wait; an invalid value is ignored."""
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    handler, _ = answers(refusal(503, soon), refusal(503, past), refusal(503, "?"), mask_answer())
    _, waits = drive_threads(handler, get_mask, retries=Retries(backoff_s=1))
    assert 25 <= waits[0] <= 30 * 1.25
    assert waits[1] == 0
    assert 4 <= waits[2] <= 4 * 1.25


@both
@pytest.mark.parametrize(
    "failure",
    [
        refusal(503),
        httpx.Response(503, text="<html>", headers={"Content-Type": "text/html"}),
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("closed"),
    ],
)
def test_the_wait_doubles(drive: Drive, failure: httpx.Response | Exception) -> None:
    """Without Retry-After the wait doubles, after a broken connection as after 503."""
    handler, _ = answers(failure, failure, failure, mask_answer())
    _, waits = drive(handler, get_mask, retries=Retries(backoff_s=1))
    assert [int(wait) for wait in waits] == [1, 2, 4]


@both
def test_at_last_it_is_given_up(drive: Drive) -> None:
    """After the last try the client raises that try's error."""
    handler, seen = answers(refusal(503, "1"))
    with pytest.raises(ServiceBusy, match="so it is"):
        drive(handler, get_mask, retries=Retries(tries=3))
    assert len(seen) == 3
    handler, seen = answers(httpx.ConnectError("refused"))
    with pytest.raises(ServiceUnreachable, match=r"http://127\.0\.0\.1:8000: refused") as caught:
        drive(handler, get_mask, retries=Retries(tries=1))
    assert len(seen) == 1
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


@pytest.mark.parametrize("status", [503, 429])
def test_a_proxy_may_be_busy_in_its_own_words(status: int) -> None:
    """The error shows the proxy's status, not its page."""
    handler, _ = answers(httpx.Response(status, text="<html>"))
    with pytest.raises(ServiceBusy, match=rf"^{status} [A-Z]"):
        drive_threads(handler, get_mask, retries=Retries(tries=1))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_that_no_header_can_carry_is_not_shown(kind: type[Client | AsyncClient]) -> None:
    """The error for a key with a newline or a non-ASCII letter does not repeat the key."""
    for key in ("fcn_secret\n", "fcn_secr\N{LATIN SMALL LETTER E WITH ACUTE}t"):
        with pytest.raises(ClientError, match="API key") as caught:
            kind(api_key=key)
        assert "secr" not in str(caught.value)


@both
def test_a_key_goes_with_every_request(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key comes from the environment; without one there is no header."""
    handler, seen = answers(mask_answer())
    for variable in ("", "fcn_environments"):
        monkeypatch.setenv("FCN_API_KEY", variable)
        drive(handler, get_mask)
    monkeypatch.delenv("FCN_API_KEY")
    drive(handler, get_mask)
    sent = [request.headers.get("Authorization") for request in seen]
    assert sent == [None, "Bearer fcn_environments", None]


def test_a_service_that_wants_to_be_left_alone_for_long_is() -> None:
    """The client gives up when Retry-After asks for an hour."""
    handler, seen = answers(refusal(503, "3600"))
    with pytest.raises(ServiceBusy):
        drive_threads(handler, get_mask)
    assert len(seen) == 1


@both
@pytest.mark.parametrize("status", [400, 404, 406, 413, 415, 422, 500, 504])
def test_other_problems_are_raised_at_once(drive: Drive, status: int) -> None:
    """The error carries the service's problem."""
    handler, seen = answers(refusal(status))
    with pytest.raises(RequestRefused, match="so it is") as caught:
        drive(handler, get_mask)
    assert caught.value.problem.status == status
    assert len(seen) == 1


@pytest.mark.parametrize("failure", [httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout])
def test_what_takes_too_long_is_not_asked_for_again(failure: type[httpx.TimeoutException]) -> None:
    """A timeout is not retried: the service may still work on the request."""
    handler, seen = answers(failure("slow"))
    with pytest.raises(NoAnswerInTime):
        drive_threads(handler, get_mask)
    assert len(seen) == 1


def test_every_error_of_httpx_is_one_of_the_clients() -> None:
    """Each exception of httpx becomes a `ClientError` with the exception as its cause."""
    pending: list[type[httpx.RequestError]] = [httpx.RequestError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        handler, _ = answers(kind("x"))
        with pytest.raises(ClientError) as caught:
            drive_threads(handler, get_mask, retries=Retries(tries=1))
        assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>", headers={"Content-Type": "text/html"}),
        httpx.Response(200, text="no", headers={"Content-Type": "image/png"}),
        httpx.Response(200, text="no", headers={"Content-Type": "application/json"}),
        httpx.Response(302, headers={"Location": "http://elsewhere"}),
        httpx.Response(502, text="Bad Gateway"),
    ],
)
def test_another_services_answers(answer: httpx.Response) -> None:
    """A response from another service raises `UnexpectedAnswer` with its URL."""
    for call in (get_mask, lambda client: client.segment(PHOTO)):
        handler, _ = answers(answer)
        with pytest.raises(UnexpectedAnswer, match=r"127\.0\.0\.1:8000/segment answered"):
            drive_threads(handler, call)
    handler, _ = answers(answer)
    with pytest.raises(UnexpectedAnswer):
        drive_threads(handler, lambda client: client.models())
    with pytest.raises(UnexpectedAnswer):
        drive_threads(handler, lambda client: client.batch([PHOTO]))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "http://", "http://[::1"])
def test_urls_that_are_none(url: str) -> None:
    """An invalid URL raises an error in the constructor."""
    for make in (Client, AsyncClient):
        with pytest.raises(ClientError, match="is not a URL"):
            make(url)


@both
def test_a_photo_is_bytes_a_path_or_an_array(drive: Drive, tmp_path: Path) -> None:
    """The body is the image file alone; an array is sent as PNG."""
    path = tmp_path / "a.png"
    path.write_bytes(PHOTO)
    image = two_class_photo()
    for photo in (PHOTO, path, str(path), image, image[::2, ::2]):
        handler, seen = answers(mask_answer())
        drive(handler, lambda client, photo=photo: client.mask(photo))
        with Image.open(io.BytesIO(seen[0].content)) as sent:
            expected = photo if isinstance(photo, np.ndarray) else image
            assert np.array_equal(np.asarray(sent), expected)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (4, 4, 3)])
def test_other_arrays_are_no_photos(shape: tuple[int, ...]) -> None:
    """Grey, RGBA and float arrays raise `ValueError`."""
    with pytest.raises(ValueError, match="a photo array must be"):
        drive_threads(answers(mask_answer())[0], lambda client: client.mask(np.zeros(shape)))


def test_a_file_that_is_missing() -> None:
    """A missing file raises `FileNotFoundError`."""
    with pytest.raises(FileNotFoundError):
        drive_threads(answers(mask_answer())[0], lambda client: client.mask("missing.jpg"))


@both
def test_a_large_batch_is_several_requests(drive: Drive) -> None:
    """Each request has at most ``batch_size`` photos; indices count over all of them."""

    def handler(request: httpx.Request) -> httpx.Response:
        lines = [
            BatchItem(index=index, name="x", problem=None).model_dump_json()
            for index in range(request.content.count(b'name="image"'))
        ]
        sizes.append(len(lines))
        return httpx.Response(200, text="\n".join(lines))

    sizes: list[int] = []
    items, _ = drive(handler, lambda client: client.batch([PHOTO] * 7, batch_size=3))
    assert sizes == [3, 3, 1]
    assert [item.index for item in items] == list(range(7))
    assert drive(handler, lambda client: client.batch([])) == ([], [])


def test_a_batch_with_a_line_too_few() -> None:
    """A truncated response raises `UnexpectedAnswer`."""
    line = BatchItem(index=0, name="x").model_dump_json()
    handler, _ = answers(httpx.Response(200, text=line))
    with pytest.raises(UnexpectedAnswer):
        drive_threads(handler, lambda client: client.batch([PHOTO, PHOTO]))


def test_both_clients_have_the_same_methods() -> None:
    """The public methods of both clients have the same names and parameters."""

    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)


def test_static_types() -> None:
    """Type checkers know what both clients return and accept; `help` shows the same."""
    handler, _ = answers(mask_answer())
    transport = httpx.MockTransport(handler)
    with Client(transport=transport) as client:
        assert_type(client.mask(PHOTO), Mask)
        assert_type(client.cutout(PHOTO, classes="person"), bytes)
        assert_type(client.batch([]), list[BatchItem])
        with pytest.raises(TypeError):
            client.mask()  # type: ignore[call-arg]
        client.mask(PHOTO, alpha=0.5)  # type: ignore[call-arg]

    async def run() -> None:
        async with AsyncClient(transport=transport) as client:
            pending = assert_type(client.mask(PHOTO), Coroutine[Any, Any, Mask])
            assert_type(await pending, Mask)
            assert_type(await client.cutout(PHOTO, classes="person"), bytes)
            assert_type(await client.batch([]), list[BatchItem])

    asyncio.run(run())
    for kind in (Client, AsyncClient):
        assert inspect.signature(kind.mask).return_annotation == "npt.NDArray[np.uint8]"
        assert kind.mask.__doc__ == "Class ids, ``(H, W) uint8``."


@contextmanager
def stub(*script: str) -> Iterator[tuple[str, list[bytes]]]:
    """A loopback server that follows a script; yields its URL and the bodies it received."""
    steps = iter(script)
    bodies: list[bytes] = []

    class Stub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            step = next(steps)
            if step == "drop":
                self.close_connection = True
                return
            content = encode_mask(MASK) if step == "200" else b"{}"
            self.send_response(int(step))
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(content)))
            if step == "503":
                self.send_header("Retry-After", "3")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_over_real_connections() -> None:
    """The client sends the same request after a 503 and after a dropped connection."""
    waits: list[float] = []
    with (
        stub("503", "drop", "200") as (url, bodies),
        Client(url, sleep=waits.append) as client,
    ):
        assert np.array_equal(client.mask(PHOTO), MASK)
    assert bodies == [PHOTO] * 3
    assert 3 <= waits[0] <= 3 * 1.25
    assert 1 <= waits[1] <= 1.25


def test_nobody_listens() -> None:
    """A closed port raises `ServiceUnreachable` with the URL."""
    with stub() as (url, _):
        pass
    with (
        pytest.raises(ServiceUnreachable, match=url),
        Client(url, retries=Retries(tries=2), sleep=lambda _: None) as client,
    ):
        client.classes()


def test_the_client_loads_no_runtime() -> None:
    """The client imports no runtime and no server; without httpx it names the extra to install."""
    check = (
        "import sys, service.client; print({'onnxruntime', 'torch', 'uvicorn'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    check = "import sys; sys.modules['httpx'] = None; import service.client"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False
    )
    assert "ImportError: the client needs httpx: pip install 'fcn-segment[client]'" in done.stderr
