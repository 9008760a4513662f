"""``fcn-segment serve`` with several processes behind one port."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from skimage import data

from service.settings import DEFAULT_MODEL
from tests.artefacts import encode
from tests.clients import command_line, environment, fails, head, receive_until, under_load

JPEG = encode(data.chelsea(), "JPEG", quality=90)  # type: ignore[no-untyped-call]

PATIENCE_S = 60.0
CLIENTS = 3


class Supervised:
    """Two serving processes and their supervisor, and what they all have logged."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: list[dict[str, Any]] = []
        self._others: list[str] = []
        self._ended = False
        self._more = threading.Condition()
        self._ids = map("r{}".format, itertools.count())
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def seen(self, event: str, count: int = 1, **values: object) -> dict[str, Any]:
        """The line number ``count`` of an event with these values, once it has been logged."""
        wanted = {"event": event, **values}

        def matching() -> list[dict[str, Any]]:
            return [line for line in self._lines if wanted.items() <= line.items()]

        with self._more:
            self._more.wait_for(lambda: self._ended or len(matching()) >= count, PATIENCE_S)
            assert len(matching()) >= count, (wanted, self._others, self._lines)
            return matching()[count - 1]

    @property
    def url(self) -> str:
        """Where they answer."""
        return str(self.seen("listening")["url"])

    def connect(self, worker: int) -> socket.socket:
        """A connection that this worker has accepted; it has to come to the others' too."""
        parts = urlsplit(self.url)
        for _ in range(1000):
            connection = socket.create_connection((parts.hostname, parts.port), PATIENCE_S)
            request_id = next(self._ids)
            connection.sendall(
                f"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: {request_id}\r\n\r\n".encode()
            )
            receive_until(connection, b'{"status":"alive"}')
            if self.seen("request", request_id=request_id)["worker"] == worker:
                return connection
            connection.close()
        raise AssertionError(f"worker {worker} accepts nothing")

    def begin(self, worker: int) -> socket.socket:
        """A connection on which this worker waits for a photo."""
        connection = self.connect(worker)
        connection.sendall(head(len(JPEG), "Expect: 100-continue", "Connection: close"))
        assert b"100 Continue" in connection.recv(65536)
        return connection

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                try:
                    self._lines.append(json.loads(line))
                except json.JSONDecodeError:
                    self._others.append(line)
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()


def finish(connection: socket.socket) -> bytes:
    """Send the photo that was announced; the whole answer."""
    connection.sendall(JPEG)
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@contextlib.contextmanager
def supervised(model: Path, *, wait: bool = True) -> Iterator[Supervised]:
    """Start two processes on a free port, wait until both answer, stop them at the end."""
    process = subprocess.Popen(
        command_line("serve", "--port", "0"),
        env=environment(
            model=model, processes=2, device="cpu", log_format="json", log_level="debug"
        ),
        stderr=subprocess.PIPE,
        text=True,
    )
    running = Supervised(process)
    try:
        if wait:
            for worker in (0, 1):
                running.seen("listening", worker=worker)
        yield running
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        running.reader.join(PATIENCE_S)
        assert process.stderr is not None
        process.stderr.close()


def load(url: str, clients: int) -> contextlib.AbstractContextManager[list[int | str]]:
    """Photos, as fast as they are answered; gives what became of each."""

    def ask() -> int | str:
        try:
            return httpx.post(f"{url}/segment", content=JPEG, timeout=PATIENCE_S).status_code
        except httpx.TransportError as exc:
            return type(exc).__name__

    return under_load(clients, ask)


def test_a_killed_worker_is_started_again() -> None:
    """Both answer on the one port; a kill costs the requests in flight on one, and no other."""
    with supervised(DEFAULT_MODEL) as service:
        pids = [service.seen("worker started", worker=worker)["pid"] for worker in (0, 1)]
        assert len({service.process.pid, *pids}) == 3
        with (
            load(service.url, CLIENTS) as outcomes,
            service.begin(0) as lost,
            service.begin(1) as kept,
        ):
            os.kill(pids[0], signal.SIGKILL)
            assert service.seen("worker exited", worker=0)["restart_in_s"] == 0
            with contextlib.suppress(ConnectionError):
                assert lost.recv(65536) == b""
            assert finish(kept).startswith(b"HTTP/1.1 200 OK")
            service.seen("listening", worker=0, count=2)
            service.connect(0).close()
        assert service.seen("worker started", worker=0, count=2)["pid"] not in pids
        failed = [outcome for outcome in outcomes if outcome != 200]
        assert len(outcomes) > len(failed)
        assert len(failed) <= CLIENTS
        assert {type(outcome) for outcome in failed} <= {str}


def test_sigterm_finishes_what_is_in_flight_on_all() -> None:
    """Every request that was taken is answered, under load; the exit status is 0."""
    with (
        contextlib.ExitStack() as connections,
        supervised(DEFAULT_MODEL) as service,
        load(service.url, CLIENTS) as outcomes,
    ):
        busy = [connections.enter_context(service.begin(worker)) for worker in (0, 1, 0, 1)]
        idle = [connections.enter_context(service.connect(worker)) for worker in (0, 1)]
        service.process.send_signal(signal.SIGTERM)
        for connection in idle:
            # The shutdown has begun once the idle connections are closed.
            assert connection.recv(65536) == b""
        for connection in busy:
            answer = finish(connection)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"\r\n\r\n\x89PNG" in answer
        assert service.process.wait(PATIENCE_S) == 0
    # 503: it came while they were draining. The rest found no one at the port any more.
    assert {outcome for outcome in outcomes if isinstance(outcome, int)} <= {200, 503}


def test_sigterm_while_the_models_load(tiny_artefact: Path) -> None:
    """Nothing is in flight: the status is 0, and there is no traceback."""
    with supervised(tiny_artefact, wait=False) as service:
        service.seen("worker started", worker=1)
        service.process.terminate()
        assert service.process.wait(PATIENCE_S) == 0
        service.seen("all workers stopped")


def test_a_second_interrupt_waits_for_nothing(tiny_artefact: Path) -> None:
    """The first drains; the second breaks off what is in flight."""
    with contextlib.ExitStack() as connections, supervised(tiny_artefact) as service:
        idle = [connections.enter_context(service.connect(worker)) for worker in (0, 1)]
        busy = [connections.enter_context(service.begin(worker)) for worker in (0, 1)]
        service.process.send_signal(signal.SIGINT)
        assert [connection.recv(65536) for connection in idle] == [b"", b""]
        service.process.send_signal(signal.SIGINT)
        # Well before the 35 seconds that a request has.
        assert service.process.wait(20) == 0
        assert not any(b"200 OK" in connection.recv(65536) for connection in busy)


def test_the_workers_stop_when_their_supervisor_is_killed(tiny_artefact: Path) -> None:
    """They answer what is in flight and are gone; the port is free."""
    with supervised(tiny_artefact) as service:
        parts = urlsplit(service.url)
        with service.begin(0) as busy:
            service.process.kill()
            service.process.wait(PATIENCE_S)
            assert finish(busy).startswith(b"HTTP/1.1 200 OK")
        # They alone hold the other end of stderr by now.
        service.reader.join(PATIENCE_S)
        assert not service.reader.is_alive()
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((parts.hostname, parts.port))
            listener.listen()


def test_a_start_that_fails_is_one_line(tmp_path: Path) -> None:
    """However many processes it fails in; the exit status is that of one alone."""
    arguments = ("serve", "--port", "0", "--processes", "3", "--device", "cpu")
    status, stderr = fails(*arguments, model=tmp_path, log_level="warning")
    assert status == 1
    assert stderr == f"fcn-segment: {tmp_path}/manifest.json: No such file or directory\n"


def test_the_workers_command_is_not_for_people() -> None:
    """Nor does it hang without a supervisor."""
    status, stderr = fails("worker", "0", "1")
    assert status == 2
    assert stderr == "fcn-segment: worker: only `serve` starts one\n"
