"""Faults in real processes: the service recovers, or exits so that it is restarted."""

import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import httpx
import pytest

from service.server.watchdog import EXIT_STATUS
from tests.artefacts import encode, two_class_photo
from tests.clients import (
    Server,
    assert_problem,
    command_line,
    environment,
    head,
    receive_until,
    serving,
)
from tests.faults import Fault, WallClock, build_faulty_artefact, faulty_photo
from tests.processes import PATIENCE_S, Logged, load, logged

PHOTO = encode(two_class_photo())


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact whose network fails on certain photos."""
    return build_faulty_artefact(tmp_path_factory.mktemp("faulty") / "tiny")


@pytest.fixture(scope="module")
def faulty_server(faulty: Path) -> Iterator[Server]:
    """A server for the tests that do not end it."""
    with serving(faulty, device="cpu") as running:
        yield running


def post(url: str, photo: bytes = PHOTO) -> httpx.Response:
    """Send a photo."""
    return httpx.post(f"{url}/segment", content=photo, timeout=PATIENCE_S)


def metrics(service: Logged) -> str:
    """The text of ``GET /metrics``."""
    return httpx.get(f"{service.url}/metrics", timeout=PATIENCE_S).text


@pytest.mark.parametrize(
    ("fault", "slug"), [("error", "inference-failed"), ("memory", "overloaded")]
)
def test_a_batch_that_fails_costs_its_members_alone(
    faulty_server: Server, fault: Fault, slug: str
) -> None:
    """An error of ONNX Runtime gives 503 with Retry-After. The next photo is segmented."""
    url = faulty_server.url
    refused = post(url, encode(faulty_photo(fault)))
    assert_problem(refused, 503, slug)
    assert refused.headers["Retry-After"] == "1"
    assert post(url).status_code == 200


def test_a_batch_that_hangs_ends_the_process(faulty: Path) -> None:
    """The request gets 504 at its deadline; then the process logs every stack and exits."""
    with logged(faulty, threads=1, deadline_s=1, watchdog_s=4) as service:
        hung = post(service.url, encode(faulty_photo("hang")))
        assert_problem(hung, 504, "deadline-exceeded")
        assert httpx.get(f"{service.url}/readyz").status_code == 200
        line = service.seen("this process hangs and ends")
        assert line["level"] == "critical"
        assert line["reason"].startswith("a batch has been running for")
        assert service.wait() == EXIT_STATUS
        # The stack shows that ONNX Runtime hangs.
        assert any("onnxruntime_inference_collection.py" in line for line in service.others)


def test_a_worker_that_hangs_is_replaced_alone(faulty: Path) -> None:
    """Requests queued behind the batch get 503; the other worker keeps running."""
    with logged(faulty, processes=2, watchdog_s=3, deadline_s=PATIENCE_S) as service:
        pids = [service.seen("worker started", worker=worker)["pid"] for worker in (0, 1)]
        service.seen("listening", worker=1)
        with (
            ThreadPoolExecutor(2) as pool,
            service.connect(0) as hanging,
            service.connect(0) as waiting,
        ):
            photo = encode(faulty_photo("hang"))
            hanging.sendall(head(len(photo), "X-Request-ID: hangs") + photo)
            while 'fcn_batch_size_count{worker="0"} 1' not in metrics(service):
                pass
            waiting.sendall(head(len(PHOTO), "X-Request-ID: waits") + PHOTO)
            answers = [
                pool.submit(receive_until, connection, b"}") for connection in (hanging, waiting)
            ]
            line = service.seen("this process hangs and ends", worker=0)
            assert sorted(line["requests"]) == ["hangs", "waits"]
            for answer in answers:
                assert answer.result().startswith(b"HTTP/1.1 503 ")
        assert service.seen("worker exited", worker=0)["status"] == EXIT_STATUS
        service.seen("listening", worker=0, count=2)
        assert not service.lines("worker exited", worker=1)
        assert service.seen("worker started", worker=0, count=2)["pid"] not in pids
        service.connect(0).close()


def test_a_worker_that_is_stuck_altogether_is_killed(tiny_artefact: Path) -> None:
    """A suspended worker cannot end itself: its supervisor misses its signs of life."""
    with logged(tiny_artefact, processes=2, watchdog_s=5) as service:
        pid = service.seen("worker started", worker=0)["pid"]
        for worker in (0, 1):
            service.seen("listening", worker=worker)
        os.kill(pid, signal.SIGSTOP)
        assert service.seen("worker hangs and is killed", worker=0)["pid"] == pid
        assert service.seen("worker exited", worker=0)["signal"] == "Killed"
        service.seen("listening", worker=0, count=2)
        assert not service.lines("worker exited", worker=1)
        service.connect(0).close()


def test_a_log_that_takes_nothing_ends_the_process(tiny_artefact: Path) -> None:
    """The event loop blocks on a pipe that nobody reads; the watchdog ends the process."""
    with serving(tiny_artefact, device="cpu", log_level="debug", watchdog_s=2) as server:
        assert server.process.stderr is not None
        fcntl.fcntl(server.process.stderr, fcntl.F_SETPIPE_SZ, resource.getpagesize())
        with pytest.raises(httpx.TransportError):
            ask_until_it_fails(f"{server.url}/healthz")
        assert server.process.wait(PATIENCE_S) == EXIT_STATUS


def ask_until_it_fails(url: str) -> NoReturn:
    """Send requests until one fails."""
    while True:
        httpx.get(url, timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("sink", "log_format"),
    [
        ("2>/dev/full", "json"),
        ("2> >(:)", "json"),
        ("2>&-", "json"),
        ("2>&-", "console"),
    ],
    ids=["a full disk", "a pipe without a reader", "nothing", "nothing, for people"],
)
def test_a_log_that_cannot_be_written_costs_no_answer(
    tiny_artefact: Path, sink: str, log_format: str
) -> None:
    """Valid and invalid requests get their usual responses."""
    with bound_port() as port:
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" {sink}', "-", *command_line("serve")],
            env=environment(
                model=tiny_artefact, port=port, device="cpu", threads=1, log_format=log_format
            ),
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            wait_until_it_answers(client, process)
            for content, status in [(PHOTO, 200), (b"no photo", 415)] * 10:
                assert client.post("/segment", content=content).status_code == status
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def bound_port() -> Iterator[int]:
    """A free port, for a process whose log cannot be read."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


def wait_until_it_answers(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Wait until the service is ready; fails if the process exits."""
    while process.poll() is None:
        with contextlib.suppress(httpx.ConnectError):
            assert client.get("/readyz").status_code == 200
            return
    raise AssertionError(f"it exited with {process.returncode}")


def test_descriptors_that_run_out_come_back(tiny_artefact: Path) -> None:
    """Excess connections are closed; the form of an earlier one needs no descriptor."""
    limit = 48
    photo = encode(two_class_photo()) + bytes(2 * 2**20)
    form = httpx.Request("POST", "http://x", files={"image": ("large.png", photo)})
    body = form.read()
    with serving(tiny_artefact, device="cpu") as server, contextlib.ExitStack() as opened:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        early = opened.enter_context(socket.create_connection(server.address, PATIENCE_S))
        early.sendall(
            head(len(body), f"Content-Type: {form.headers['Content-Type']}", "Expect: 100-continue")
        )
        assert b"100 Continue" in early.recv(65536)
        many = [
            opened.enter_context(socket.create_connection(server.address, PATIENCE_S))
            for _ in range(2 * limit)
        ]
        # The last connections are closed at once: no descriptor is left for them.
        assert many[-1].recv(1) == b""
        early.sendall(body)
        assert receive_until(early, b"IEND\xaeB`\x82").startswith(b"HTTP/1.1 200 ")
        opened.close()
        assert answers_again(server)


def answers_again(server: Server) -> bool:
    """Whether a photo is segmented; retries while old connections still close."""
    for _ in range(1000):
        with contextlib.suppress(httpx.TransportError):
            return post(server.url).status_code == 200
    return False


def test_a_clock_that_jumps_changes_nothing(
    tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day ahead, then three back: no deadline passes, and nothing counts as hanging."""
    day_s = 86_400
    clock = WallClock(tmp_path)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    times = []
    with (
        logged(tiny_artefact, threads=1, rate_limit="1000000/day") as service,
        load(service.url, 4, PHOTO) as outcomes,
    ):
        for days in (1, -2, 0):
            clock.jump(days * day_s)
            # By then each client has begun a request after the jump.
            service.seen("request", path="/segment", count=len(outcomes) + 8)
            times.append(service.lines("request", path="/segment")[-1]["timestamp"])
    assert {outcome.status for outcome in outcomes} == {200}
    ahead, back, now = map(datetime.fromisoformat, times)
    assert (ahead - now).days == 0
    assert (now - back).days == 2
