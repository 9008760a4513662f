"""``fcn-segment serve`` as a separate process, over real sockets."""

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest

from tests.artefacts import build_artefact, encode, two_class_photo
from tests.clients import (
    Server,
    assert_problem,
    fails,
    head,
    mask_of,
    receive_until,
    serving,
)

PHOTO = encode(two_class_photo())


@pytest.fixture(scope="module")
def server(tiny_artefact: Path) -> Iterator[Server]:
    """One server for the tests that do not stop it."""
    with serving(tiny_artefact, max_bytes=100_000) as running:
        yield running


def test_a_photo_over_the_wire(server: Server) -> None:
    """The same bytes in a form and raw give the same mask."""
    form = httpx.post(f"{server.url}/segment", files={"image": ("x.png", PHOTO)})
    raw = httpx.post(f"{server.url}/segment", content=PHOTO)
    assert form.status_code == raw.status_code == 200
    assert form.content == raw.content
    assert mask_of(raw).shape == (64, 96)


def test_chunked_transfer(server: Server) -> None:
    """A body of unknown length is accepted, up to the size limit."""

    def chunks(count: int) -> Iterator[bytes]:
        yield PHOTO
        for _ in range(count):
            yield bytes(1000)

    assert httpx.post(f"{server.url}/segment", content=chunks(3)).status_code == 200
    response = httpx.post(f"{server.url}/segment", content=chunks(150))
    assert_problem(response, 413, "body-too-large")


def test_a_body_far_over_the_cap_gets_its_answer(server: Server) -> None:
    """The response reaches a client that is still sending."""
    response = httpx.post(f"{server.url}/segment", content=bytes(30_000_000))
    assert_problem(response, 413, "body-too-large")


def test_ready_over_the_wire(server: Server) -> None:
    """Probes of an orchestrator are answered."""
    for path in ("/healthz", "/readyz", "/classes", "/model", "/docs"):
        assert httpx.get(f"{server.url}{path}").status_code == 200


def test_sigterm_finishes_what_is_in_flight(tiny_artefact: Path) -> None:
    """A request in flight gets its response; idle connections close; the exit status is 0."""
    with serving(tiny_artefact) as server:
        with socket.create_connection(server.address, 30) as idle:
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b'{"status":"alive"}' in receive_until(idle, b"}")
            with socket.create_connection(server.address, 30) as busy:
                busy.sendall(head(len(PHOTO), "Expect: 100-continue"))
                # The app asks for the body: the request is in flight.
                assert b"100 Continue" in busy.recv(65536)
                server.process.send_signal(signal.SIGTERM)
                # The shutdown has begun once the idle connection is closed.
                assert idle.recv(65536) == b""
                busy.sendall(PHOTO)
                answer = b"".join(iter(lambda: busy.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"\r\n\r\n\x89PNG" in answer
        assert server.process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_quietly(tiny_artefact: Path, number: signal.Signals) -> None:
    """Exit status 0, and no traceback among its last lines."""
    with serving(tiny_artefact) as server:
        server.process.send_signal(number)
        assert server.process.wait(60) == 0
        assert server.process.stderr is not None
        assert [json.loads(line)["event"] for line in server.process.stderr] == ["stopped"]


def test_one_access_line_a_request(tiny_artefact: Path) -> None:
    """Method, path, status, milliseconds, bytes and request id, as JSON."""
    with serving(tiny_artefact) as server:
        response = httpx.post(
            f"{server.url}/segment", content=PHOTO, headers={"X-Request-ID": "mine"}
        )
        httpx.get(f"{server.url}/nowhere")
        server.process.terminate()
        assert server.process.stderr is not None
        lines = [json.loads(line) for line in server.process.stderr]
    first, second = (line for line in lines if line["event"] == "request")
    assert (first["method"], first["path"], first["status"]) == ("POST", "/segment", 200)
    assert (first["sent_bytes"], first["request_id"]) == (len(response.content), "mine")
    assert first["ms"] > 0
    assert (second["status"], second["path"]) == (404, "/nowhere")


def test_a_port_in_use_is_one_line(server: Server, tiny_artefact: Path) -> None:
    """Reported before the model is loaded: here there is none."""
    port = str(server.address[1])
    status, stderr = fails("serve", "--port", port, "--model", "/nowhere")
    assert status != 0
    assert stderr == f"fcn-segment: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_bad_artefact_is_one_line(tmp_path: Path) -> None:
    """Only the reason is on stderr; the exit status is not 0."""
    changed = build_artefact(tmp_path / "changed")
    with (changed / "network.onnx").open("ab") as file:
        file.write(b"x")
    no_contract = build_artefact(tmp_path / "no_contract", metadata={"a": "b"})
    stride = build_artefact(tmp_path / "stride", stride=8)
    for folder, reason in [
        (changed, "sha256 is"),
        (no_contract, "the graph's metadata lacks fcn.schema_version"),
        (stride, "stride 16 makes logits"),
        (tmp_path, "No such file or directory"),
    ]:
        status, stderr = fails("serve", "--port", "0", model=folder, log_level="warning")
        assert status == 1
        assert stderr.startswith("fcn-segment: ")
        assert reason in stderr
        assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "line"),
    [
        (["--port", "http"], {}, "--port: "),
        ([], {"queue_size": "none"}, "FCN_QUEUE_SIZE: "),
        ([], {"queue_sice": "1"}, "unknown setting FCN_QUEUE_SICE; did you mean FCN_QUEUE_SIZE?"),
        (["--host", "256.0.0.1", "--port", "0"], {}, "cannot listen on 256.0.0.1:0: "),
    ],
)
def test_a_bad_setting_is_one_line(
    arguments: list[str], variables: dict[str, str], line: str
) -> None:
    """The flag or the variable is named; exit status 2, as for wrong usage."""
    status, stderr = fails("serve", *arguments, **variables)
    assert status == 2
    assert stderr.startswith(f"fcn-segment: {line}")
    assert stderr.count("\n") == 1


def test_cuda_that_is_not_there_is_one_line(tiny_artefact: Path) -> None:
    """A missing device that was requested stops the start."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    status, stderr = fails("serve", "--port", "0", "--device", "cuda", model=tiny_artefact)
    assert status == 1
    assert stderr.startswith("fcn-segment: device cuda was asked for")
    assert stderr.count("\n") == 1


def test_the_masks_are_right_under_concurrency(server: Server) -> None:
    """Each of many concurrent clients gets its own mask."""

    def ask(index: int) -> bool:
        photo = np.roll(two_class_photo(), 16 * (index % 6), axis=1)
        response = httpx.post(f"{server.url}/segment", content=encode(photo), timeout=60)
        mask = mask_of(response)
        return bool(mask[30, (80 + 16 * (index % 6)) % 96] == 15)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(32)))
