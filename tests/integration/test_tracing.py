"""Traces sent to a collector over HTTP: a working one, one that hangs, and a missing one."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.errors import SettingsError
from service.settings import Settings
from service.telemetry.metrics import STAGES
from service.telemetry.tracing import ThrottlingHandler
from tests.artefacts import encode, two_class_photo
from tests.clients import InProcess, fails, in_process
from tests.processes import PATIENCE_S, logged

PHOTO = encode(two_class_photo())
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Collector(ThreadingHTTPServer):
    """An OTLP endpoint. It does not answer while ``gate`` is closed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()
        self.exports: list[ExportTraceServiceRequest] = []

    @property
    def url(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def spans(self) -> list[Span]:
        """All received spans."""
        return [
            span
            for export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resources(self) -> list[dict[str, Any]]:
        """The senders' attributes."""
        return [
            attributes(resource.resource)
            for export in self.exports
            for resource in export.resource_spans
        ]

    def servers(self) -> list[Span]:
        """The requests' own spans."""
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.set()
        self.server.gate.wait(PATIENCE_S)
        self.server.exports.append(ExportTraceServiceRequest.FromString(body))
        with contextlib.suppress(ConnectionError):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def attributes(of: Any) -> dict[str, Any]:  # noqa: ANN401  several messages have them
    """A message's attributes by name."""
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in of.attributes
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A working collector."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.gate.set()
            server.shutdown()
            thread.join()


Traced = Callable[[], contextlib.AbstractAsyncContextManager[InProcess]]


@pytest.fixture
def traced(
    collector: Collector,
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Traced:
    """Opens the app; its spans are at the collector once it is closed."""
    monkeypatch.setenv(ENDPOINT, collector.url)
    return lambda: in_process(make_settings())


@pytest.mark.anyio
async def test_a_request_and_its_stages(collector: Collector, traced: Traced) -> None:
    """The client's trace has a span for the request, with a child span for each stage."""
    parent = f"00-{TRACE_ID}-{PARENT_ID}-01"
    async with traced() as client:
        await client.http.post("/segment", content=PHOTO, headers={"traceparent": parent})
    (server,) = collector.servers()
    assert server.name == "POST /segment"
    assert server.trace_id.hex() == TRACE_ID
    assert server.parent_span_id.hex() == PARENT_ID
    assert server.status.code == server.status.STATUS_CODE_UNSET
    assert attributes(server) == {
        "http.request.method": "POST",
        "http.route": "/segment",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/segment",
        "network.protocol.version": "1.1",
        "server.address": "service",
        "server.port": 80,
    }
    stages = [span for span in collector.spans if span.kind == Span.SPAN_KIND_INTERNAL]
    assert [span.name for span in stages] == list(STAGES)
    before = server.start_time_unix_nano
    for span in stages:
        assert span.trace_id == server.trace_id
        assert span.parent_span_id == server.span_id
        # Up to the precision of seconds as floating-point numbers.
        assert before - 1000 <= span.start_time_unix_nano <= span.end_time_unix_nano
        before = span.end_time_unix_nano
    assert before <= server.end_time_unix_nano + 1000
    (resource,) = collector.resources()
    assert resource["service.name"] == "fcn-segment"
    assert "service.version" in resource


@pytest.mark.anyio
async def test_what_goes_wrong_is_seen(collector: Collector, traced: Traced) -> None:
    """Only the service's failures are errors; an unknown method is not part of a name."""
    async with traced() as client:
        await client.http.post("/segment", content=b"no photo")
        client.service.begin_draining()
        await client.http.post("/segment", content=PHOTO)
        await client.http.request("BREW", "/pot?%FF")
    theirs, ours, strange = collector.servers()
    assert attributes(theirs)["http.response.status_code"] == 415
    assert theirs.status.code == theirs.status.STATUS_CODE_UNSET
    assert "error.type" not in attributes(theirs)
    assert ours.status.code == ours.status.STATUS_CODE_ERROR
    assert attributes(ours)["error.type"] == "503"
    assert attributes(strange)["http.request.method"] == "_OTHER"


@pytest.mark.anyio
async def test_probes_are_not_traced(collector: Collector, traced: Traced) -> None:
    """Health endpoints of every protocol, and metrics, have no spans."""
    paths = ["/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"]
    async with traced() as client:
        for path in [*paths, "/label-studio/health", "/classes"]:
            assert (await client.http.get(path)).status_code == 200
    assert [span.name for span in collector.spans] == ["GET /classes"]


@pytest.mark.anyio
async def test_the_operators_words_come_first(
    collector: Collector, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenTelemetry's own variables set name, attributes and sampling."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "masks")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=here")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with traced() as client:
        await client.http.get("/classes")
        sampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
        await client.http.get("/model", headers=sampled)
    assert [span.name for span in collector.spans] == ["GET /model"]
    (resource,) = collector.resources()
    assert resource["service.name"] == "masks"
    assert resource["deployment.environment.name"] == "here"


@pytest.mark.anyio
async def test_a_collector_that_hangs_holds_nobody(
    collector: Collector, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests and the stop do not wait for it, even when the queue of spans is full."""
    monkeypatch.setattr("service.telemetry.tracing.LONGEST_FLUSH_S", 0.01)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    collector.gate.clear()
    async with traced() as client:
        for _ in range(20):
            assert (await client.http.get("/classes")).status_code == 200
        assert collector.asked.wait(PATIENCE_S)
    assert not collector.exports


def test_workers_trace_and_tell_the_trace(
    collector: Collector, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker sends its own spans; log lines have the trace id."""
    monkeypatch.setenv(ENDPOINT, collector.url)
    with logged(tiny_artefact, processes=2) as service:
        for worker in (0, 1):
            service.seen("listening", worker=worker)
            with service.connect(worker) as connection:
                connection.sendall(b"GET /classes HTTP/1.1\r\nHost: localhost\r\n\r\n")
                service.seen("request", path="/classes", worker=worker)
        lines = service.lines("request", path="/classes")
        service.process.terminate()
        assert service.wait() == 0
    assert len(lines) == 2
    assert {line["trace_id"] for line in lines} == {
        span.trace_id.hex() for span in collector.servers()
    }


def test_a_collector_that_is_not_there_is_told_once(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests succeed, and one log line has the reason."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
        with logged(tiny_artefact, log_level="info") as service:
            with httpx.Client(base_url=service.url, timeout=PATIENCE_S) as client:
                for _ in range(20):
                    assert client.get("/classes").status_code == 200
            service.process.terminate()
            assert service.wait() == 0
    (line,) = service.lines_of("opentelemetry")
    assert "Connection refused" in line["event"]


def test_a_line_a_minute() -> None:
    """The first line is forwarded, others within the minute are dropped."""
    handler = ThrottlingHandler(iter((100.0, 159.0, 161.0)).__next__)
    seen: list[str] = []

    class Root(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    root = Root()
    logging.getLogger().addHandler(root)
    try:
        for text in ("first", "second", "third"):
            handler.emit(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))
    finally:
        logging.getLogger().removeHandler(root)
    assert seen == ["first", "third"]


@pytest.mark.parametrize(
    ("variable", "word", "reason"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "only http/protobuf is supported"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "max_queue_size must be a positive integer"),
    ],
)
@pytest.mark.anyio
async def test_a_configuration_that_cannot_be_stops_the_start(
    traced: Traced, variable: str, word: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invalid configuration is an error, so that spans are not lost silently."""
    monkeypatch.setenv(variable, word)
    with pytest.raises(SettingsError, match=re.escape(reason)):
        await traced().__aenter__()


def test_a_missing_extra_is_one_line(
    tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported before the model is loaded, with the package to install."""
    (tmp_path / "opentelemetry" / "sdk").mkdir(parents=True)
    (tmp_path / "opentelemetry" / "sdk" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    status, stderr = fails("serve", "--port", "0", model=tiny_artefact)
    assert status == 2
    assert stderr == (
        f"fcn-segment: {ENDPOINT} is set: traces need OpenTelemetry: "
        "pip install 'fcn-segment[tracing]'\n"
    )


def test_without_an_endpoint_nothing_is_loaded() -> None:
    """Without traces, OpenTelemetry's SDK is not imported."""
    code = "import sys, service.cli.main; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
