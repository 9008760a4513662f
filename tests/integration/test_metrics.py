"""``GET /metrics`` of one app and of several workers, and the log line of each request."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from structlog.typing import EventDict

from service.app import with_state
from service.errors import NotAcceptable, Overloaded, RateLimited, SegmentError
from service.http.middleware import RequestContext
from service.http.problems import PROBLEM_TYPES, ProblemType
from service.http.routers import RouteFlags
from service.settings import Settings
from service.telemetry.metrics import STAGES
from tests.artefacts import encode, two_class_photo
from tests.clients import InProcess, in_process, serving
from tests.fakes import FakeSession
from tests.host_device import HostDevice
from tests.processes import PATIENCE_S, logged

PHOTO = encode(two_class_photo())

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """Every sample, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(client: InProcess) -> Samples:
    """The app's metrics."""
    response = await client.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return read(response.text)


def value(found: Samples, name: str, **labels: str) -> float:
    """One sample; 0 if there is none yet."""
    return found.get((name, frozenset(labels.items())), 0.0)


@pytest.mark.anyio
async def test_a_photo_in_the_metrics(client: InProcess) -> None:
    """A photo is counted once: as a request, in every stage, in its batch."""
    assert (await client.http.post("/segment", content=PHOTO)).status_code == 200
    found = await scrape(client)
    segment = {"route": "/segment", "method": "POST", "status": "200"}
    assert value(found, "fcn_requests_total", **segment) == 1
    assert value(found, "fcn_request_seconds_count", route="/segment") == 1
    for stage in STAGES:
        assert value(found, "fcn_stage_seconds_count", stage=stage) == 1
    assert value(found, "fcn_photo_pixels_sum") == 64 * 96
    assert value(found, "fcn_photo_bytes_sum") == len(PHOTO)
    assert value(found, "fcn_batch_size_sum") == 1
    assert value(found, "fcn_ready") == 1
    model = {"model": "tiny", "version": "1", "precision": "fp32"}
    assert value(found, "fcn_model_info", **model, provider="CPUExecutionProvider") == 1
    assert value(found, "fcn_deadline_seconds") == client.service.settings.deadline_s
    # The image workers' memory counts too.
    in_use = value(found, "fcn_memory_bytes")
    assert 10e6 < in_use < value(found, "fcn_memory_limit_bytes")
    assert value(found, "fcn_request_memory_bytes") == 0
    assert value(found, "fcn_request_memory_limit_bytes") > 100e6
    assert value(found, "fcn_image_workers_lost_total", reason="killed") == 0


@pytest.mark.anyio
async def test_refusals_by_reason(client: InProcess) -> None:
    """Each problem is counted by its type."""
    await client.http.post("/segment", content=b"no photo")
    await client.http.post("/segment", content=b"")
    await client.http.post("/segment?max_side=1", content=PHOTO)
    await client.http.get("/nowhere")
    await client.http.get("/nowhere/else")
    found = await scrape(client)
    for reason in ("unsupported-image-type", "no-image", "invalid-parameter"):
        assert value(found, "fcn_refusals_total", reason=reason) == 1
    assert value(found, "fcn_refusals_total", reason="not-found") == 2


@pytest.fixture
def written() -> Iterator[list[EventDict]]:
    """The lines of the log so far."""
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        yield lines


def requests(written: list[EventDict]) -> list[EventDict]:
    """The lines of requests."""
    return [line for line in written if line["event"] == "request"]


@pytest.mark.anyio
async def test_a_requests_line(client: InProcess, written: list[EventDict]) -> None:
    """It has the request, its outcome, the client, and the time of each stage."""
    ids = {"X-Request-ID": "mine", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    answer = await client.http.post("/segment?view=overlay", content=PHOTO, headers=ids)
    (line,) = requests(written)
    assert line["ms"] >= sum(line["stages_ms"].values()) - 0.1 * len(STAGES)
    assert set(line.pop("stages_ms")) == set(STAGES)
    assert line.pop("ms") > 0
    assert line == {
        "event": "request",
        "log_level": "info",
        "request_id": "mine",
        "trace_id": "ab" * 16,
        "method": "POST",
        "path": "/segment",
        "route": "/segment",
        "status": 200,
        "outcome": "answered",
        "received_bytes": len(PHOTO),
        "sent_bytes": len(answer.content),
        "client": "127.0.0.1",
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("error", "kind"), PROBLEM_TYPES.items(), ids=lambda one: getattr(one, "type", "")
)
async def test_every_refusal_is_told(
    error: type[SegmentError],
    kind: ProblemType,
    client: InProcess,
    written: list[EventDict],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has its own reason in the log and in the metrics, where it starts at 0."""

    async def refuse(*_: object) -> NoReturn:
        arguments: dict[type[SegmentError], object] = {NotAcceptable: (), Overloaded: 1.0}
        arguments[RateLimited] = 1.0
        raise error("why", *([arguments[error]] if error in arguments else []))

    client.http.event_hooks = {}  # not all of them are described there
    name = ("fcn_refusals_total", frozenset({("reason", kind.reason)}))
    assert (await scrape(client))[name] == 0
    monkeypatch.setattr(type(client.service.segmenter), "segment", refuse)
    answer = await client.http.post("/segment", content=PHOTO)
    assert answer.status_code == kind.status
    found = await scrape(client)
    assert found[name] == 1
    labels = {"route": "/segment", "method": "POST", "status": str(int(kind.status))}
    assert value(found, "fcn_requests_total", **labels) == 1
    line = requests(written)[1]
    assert (line["outcome"], line["status"]) == (kind.reason, kind.status)


@pytest.mark.anyio
async def test_single_photos_are_refused_too(client: InProcess) -> None:
    """A batch gets 200 even if one of its photos fails."""
    files = [("image", ("good", PHOTO)), ("image", ("bad", b"no photo"))]
    assert (await client.http.post("/segment/batch", files=files)).status_code == 200
    found = await scrape(client)
    assert value(found, "fcn_refusals_total", reason="unsupported-image-type") == 1
    assert value(found, "fcn_photo_pixels_count") == 1


Begun = Callable[[Send], Awaitable[None]]


async def begin(send: Send) -> None:
    """Send the head of a response and a part of its body."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})


async def nothing(send: Send) -> None:
    """Send nothing."""


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sends", "error", "outcome", "status"),
    [
        (nothing, ClientDisconnect(), "client-gone", 499),
        (begin, ClientDisconnect(), "client-gone", 499),
        (nothing, RuntimeError("unforeseen"), "internal-error", 500),
        (begin, RuntimeError("unforeseen"), "internal-error", 500),
        (nothing, asyncio.CancelledError(), "cancelled", 500),
        (begin, asyncio.CancelledError(), "cancelled", 500),
    ],
)
async def test_no_end_goes_unseen(
    sends: Begun,
    error: BaseException,
    outcome: str,
    status: int,
    client: InProcess,
    written: list[EventDict],
) -> None:
    """Before or during a response, the request is counted and logged once, then removed."""

    async def endpoint(_: Scope, __: Receive, send: Send) -> None:
        await sends(send)
        raise error

    context = RequestContext(endpoint, client.service.metrics, RouteFlags.of(()))
    app = with_state(context, {"service": client.service})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        with contextlib.suppress(asyncio.CancelledError, AssertionError):
            await http.get("/")
    found = await scrape(client)
    labels = {"route": "other", "method": "GET", "status": str(status)}
    assert value(found, "fcn_requests_total", **labels) == 1
    assert sum(found[one] for one in found if one[0] == "fcn_requests_total") == 1
    unforeseen = isinstance(error, RuntimeError)
    assert value(found, "fcn_refusals_total", reason="internal-error") == unforeseen
    line = requests(written)[0]
    assert (line["outcome"], line["status"]) == (outcome, status)
    assert [one for one in written if one["event"] == "unforeseen error"] == [
        one for one in written if one["log_level"] == "error"
    ]
    assert client.service.requests == []


@pytest.mark.anyio
async def test_strangers_texts_are_cut(client: InProcess, written: list[EventDict]) -> None:
    """A long path is truncated, and a long request id is replaced."""
    await client.http.get("/" + "x" * 5000, headers={"X-Request-ID": "y" * 5000})
    (line,) = requests(written)
    assert len(line["path"]) < 300
    assert re.fullmatch("[0-9a-f]{32}", line["request_id"])


@pytest.mark.anyio
async def test_paths_are_no_labels(client: InProcess) -> None:
    """A route with placeholders has one label value; all unknown paths share another one."""
    for number in range(5):
        await client.http.get(f"/nowhere/{number}")
        await client.http.get(f"/static/{number}")
    routes = {dict(labels).get("route") for name, labels in await scrape(client)}
    assert routes <= {"other", "/static/{path:path}", None}


@pytest.mark.anyio
async def test_what_waits_is_told(make_settings: Callable[..., Settings]) -> None:
    """Photos in flight, photos waiting for the device, and refusals because of both."""
    session = FakeSession()
    async with in_process(make_settings(queue_size=3), session) as client:
        session.gate.clear()
        session.started.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(client.http.post("/segment", content=PHOTO))
            found: Samples = {}
            while not session.started.is_set() or value(found, "fcn_queue_depth", model="tiny") < 2:
                await asyncio.sleep(0)  # in one process a request may never yield by itself
                found = await scrape(client)
            refused = await client.http.post("/segment", content=PHOTO)
            found = await scrape(client)
            session.gate.set()
        assert refused.status_code == 503
        assert value(found, "fcn_in_flight") == 3
        assert value(found, "fcn_in_flight_limit") == 3
        assert value(found, "fcn_queue_depth", model="tiny") == 2
        assert value(found, "fcn_refusals_total", reason="overloaded") == 1
        found = await scrape(client)
        assert value(found, "fcn_in_flight") == value(found, "fcn_queue_depth", model="tiny") == 0


@pytest.mark.anyio
async def test_draining_is_not_ready(client: InProcess) -> None:
    """Metrics stay available while draining."""
    client.service.begin_draining()
    assert value(await scrape(client), "fcn_ready") == 0


@pytest.mark.anyio
async def test_a_gpus_memory(client: InProcess) -> None:
    """Used and total memory of the model's GPU."""
    engine = client.service.engines.default
    engine.model = dataclasses.replace(engine.model, gpu=HostDevice(1))  # type: ignore[type-var]
    found = await scrape(client)
    assert value(found, "fcn_gpu_memory_used_bytes", gpu="1") == 1 << 28
    assert value(found, "fcn_gpu_memory_total_bytes", gpu="1") == 1 << 30


@pytest.mark.anyio
async def test_openmetrics(client: InProcess) -> None:
    """Available by Accept, as Prometheus sends it."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    response = await client.http.get("/metrics", headers={"Accept": accept})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_probes_are_not_in_the_log(tiny_artefact: Path) -> None:
    """Unless they fail, or the level is debug."""
    paths = ("/healthz", "/readyz", "/metrics", "/classes")
    for level, shown in (("info", ["/classes"]), ("debug", [*paths])):
        with serving(tiny_artefact, log_level=level) as server:
            for path in paths:
                assert httpx.get(f"{server.url}{path}").status_code == 200
            server.process.terminate()
            assert server.process.stderr is not None
            lines = [json.loads(line) for line in server.process.stderr]
        assert [line["path"] for line in lines if line["event"] == "request"] == shown


def test_processes_tell_together(tiny_artefact: Path) -> None:
    """Each worker reports the metrics of all; a restarted worker starts from 0."""
    with logged(tiny_artefact, processes=2) as service, httpx.Client(timeout=PATIENCE_S) as http:

        def values(name: str, **labels: str) -> list[float]:
            # A new connection each time, which either worker may accept.
            text = httpx.get(f"{service.url}/metrics", timeout=PATIENCE_S).text
            return [value(read(text), name, worker=worker, **labels) for worker in ("0", "1")]

        for worker in (0, 1):
            service.seen("listening", worker=worker)
        for _ in range(12):
            assert http.post(f"{service.url}/segment", content=PHOTO).status_code == 200
        for _ in range(4):
            assert sum(values("fcn_photo_pixels_count")) == 12
            assert values("fcn_ready") == values("fcn_worker_up") == [1, 1]
        _, others = values("fcn_photo_pixels_count")
        os.kill(service.seen("worker started", worker=0)["pid"], signal.SIGKILL)
        service.seen("listening", worker=0, count=2)
        for _ in range(4):
            assert values("fcn_photo_pixels_count") == [0, others]
            assert values("fcn_worker_up") == [1, 1]
            assert values("fcn_worker_restarts_total", cause="died") == [1, 0]
            assert values("fcn_worker_restarts_total", cause="hung") == [0, 0]


def test_what_is_no_request_is_counted(tiny_artefact: Path) -> None:
    """Malformed HTTP has no route, but it is counted and logged too."""
    with logged(tiny_artefact) as service:
        with socket.create_connection(service.address, PATIENCE_S) as connection:
            connection.sendall(b"no request at all\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
        assert service.seen("request", status=400)["outcome"] == "malformed-request"
        found = read(httpx.get(f"{service.url}/metrics").text)
        assert value(found, "fcn_refusals_total", reason="malformed-request") == 1
        labels = {"route": "other", "method": "other", "status": "400"}
        assert value(found, "fcn_requests_total", **labels) == 1
