"""``fcn-segment serve`` with several processes behind one port."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from skimage import data

from service.settings import DEFAULT_MODEL
from tests.artefacts import encode
from tests.clients import fails, head
from tests.processes import PATIENCE_S, Logged, load, logged

JPEG = encode(data.chelsea(), "JPEG", quality=90)  # type: ignore[no-untyped-call]

CLIENTS = 6

CUT = {"ReadError", "RemoteProtocolError", "WriteError"}
"""Errors that a client gets when the server process dies."""


def begin(service: Logged, worker: int) -> socket.socket:
    """A connection on which this worker waits for a photo."""
    connection = service.connect(worker)
    connection.sendall(head(len(JPEG), "Expect: 100-continue", "Connection: close"))
    assert b"100 Continue" in connection.recv(65536)
    return connection


def finish(connection: socket.socket) -> bytes:
    """Send the announced photo; returns the whole response."""
    connection.sendall(JPEG)
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@contextlib.contextmanager
def supervised(model: Path, **variables: object) -> Iterator[Logged]:
    """Two workers on a free port, both ready."""
    with logged(model, processes=2, **variables) as service:
        for worker in (0, 1):
            service.seen("listening", worker=worker)
        yield service


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_started_again(tiny_artefact: Path, end: signal.Signals) -> None:
    """Even after a native crash, the other worker loses no request."""
    with supervised(tiny_artefact) as service:
        pids = [service.seen("worker started", worker=worker)["pid"] for worker in (0, 1)]
        assert len({service.process.pid, *pids}) == 3
        with (
            load(service.url, CLIENTS, JPEG) as outcomes,
            begin(service, 0) as lost,
            begin(service, 1) as kept,
        ):
            os.kill(pids[0], end)
            assert service.seen("worker exited", worker=0)["restart_in_s"] == 0
            with contextlib.suppress(ConnectionError):
                assert lost.recv(65536) == b""
            assert finish(kept).startswith(b"HTTP/1.1 200 OK")
            service.seen("listening", worker=0, count=2)
            service.connect(0).close()
        assert service.seen("worker started", worker=0, count=2)["pid"] not in pids
        failed = [outcome for outcome in outcomes if outcome.status != 200]
        assert len(outcomes) > len(failed)
        # At most one request of each client is lost, with a connection error.
        assert len(failed) <= CLIENTS
        assert {outcome.error for outcome in failed} <= CUT


def test_sigterm_finishes_what_is_in_flight_on_all() -> None:
    """Every accepted request gets its response, queued ones too; the exit status is 0."""
    with (
        contextlib.ExitStack() as connections,
        supervised(DEFAULT_MODEL, precision="fp32", client_timeout_s=120) as service,
        load(service.url, CLIENTS, JPEG) as outcomes,
    ):
        busy = [connections.enter_context(begin(service, worker)) for worker in (0, 1, 0, 1)]
        idle = [connections.enter_context(service.connect(worker)) for worker in (0, 1)]
        # More requests are in progress than the two workers can process.
        service.seen("request", path="/segment", count=2 * CLIENTS)
        service.process.send_signal(signal.SIGTERM)
        for connection in idle:
            # The shutdown has begun once the idle connections are closed.
            assert connection.recv(65536) == b""
        for connection in busy:
            answer = finish(connection)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"\r\n\r\n\x89PNG" in answer
        assert service.wait() == 0
    taken = {
        line["request_id"]: line["status"]
        for line in service.lines("request", path="/segment")
        if line["request_id"].startswith("load-")
    }
    answered = {one.request_id: one.status for one in outcomes if one.status is not None}
    assert taken == answered
    # 503: the request arrived during draining. Later ones could not connect.
    assert set(answered.values()) <= {200, 503}
    assert {one.error for one in outcomes if one.status is None} <= {"ConnectError"}


def test_sigterm_while_the_models_load(tiny_artefact: Path) -> None:
    """Without requests in flight the status is 0, and there is no traceback."""
    with logged(tiny_artefact, processes=2) as service:
        service.seen("worker started", worker=1)
        service.process.terminate()
        assert service.process.wait(PATIENCE_S) == 0
        service.seen("all workers stopped")


def test_a_second_interrupt_waits_for_nothing(tiny_artefact: Path) -> None:
    """The first interrupt drains; the second aborts the requests in flight."""
    with contextlib.ExitStack() as connections, supervised(tiny_artefact) as service:
        idle = [connections.enter_context(service.connect(worker)) for worker in (0, 1)]
        busy = [connections.enter_context(begin(service, worker)) for worker in (0, 1)]
        service.process.send_signal(signal.SIGINT)
        assert [connection.recv(65536) for connection in idle] == [b"", b""]
        service.process.send_signal(signal.SIGINT)
        # Well before the 35 seconds that a request has.
        assert service.process.wait(20) == 0
        assert not any(b"200 OK" in connection.recv(65536) for connection in busy)


def test_the_workers_stop_when_their_supervisor_is_killed(
    tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They finish the requests in flight, then exit; the port is free, and no file is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with supervised(tiny_artefact) as service:
        address = service.address
        with begin(service, 0) as busy:
            service.process.kill()
            service.process.wait(PATIENCE_S)
            assert finish(busy).startswith(b"HTTP/1.1 200 OK")
        # Only the workers still hold the other end of stderr.
        service.reader.join(PATIENCE_S)
        assert not service.reader.is_alive()
        assert not [*tmp_path.iterdir()]
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()


def test_a_start_that_fails_is_one_line(tmp_path: Path) -> None:
    """Regardless of the number of workers; the exit status is the same as without workers."""
    arguments = ("serve", "--port", "0", "--processes", "3", "--device", "cpu")
    status, stderr = fails(*arguments, model=tmp_path, log_level="warning")
    assert status == 1
    assert stderr == f"fcn-segment: {tmp_path}/manifest.json: No such file or directory\n"


def test_the_workers_command_is_not_for_people() -> None:
    """Without a supervisor it fails at once."""
    status, stderr = fails("worker", "0", "1")
    assert status == 2
    assert stderr == "fcn-segment: worker: only `serve` starts it\n"
