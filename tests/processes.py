"""A running ``fcn-segment serve`` whose log lines tests wait for, and clients that load it."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.clients import address_of, command_line, environment, receive_until, under_load

PATIENCE_S = 60.0
"""A time limit that is never reached, even on a busy machine."""


class Logged:
    """A process and everything that it and its workers have logged."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.others: list[str] = []
        self._lines: list[dict[str, Any]] = []
        self._ended = False
        self._more = threading.Condition()
        self._ids = map("probe-{}".format, itertools.count())
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def seen(self, event: str, count: int = 1, **values: object) -> dict[str, Any]:
        """Wait for line number ``count`` of an event with these values; returns the line."""

        def matching() -> list[dict[str, Any]]:
            return self.lines(event, **values)

        with self._more:
            self._more.wait_for(lambda: self._ended or len(matching()) >= count, PATIENCE_S)
            assert len(matching()) >= count, (event, values, self.others, self._lines)
            return matching()[count - 1]

    def lines(self, event: str, **values: object) -> list[dict[str, Any]]:
        """The lines so far of an event with these values."""
        wanted = {"event": event, **values}
        return [line for line in self._lines if wanted.items() <= line.items()]

    def lines_of(self, logger: str) -> list[dict[str, Any]]:
        """The lines so far of a logger and the loggers below it."""
        return [line for line in self._lines if f"{line['logger']}.".startswith(f"{logger}.")]

    def wait(self) -> int:
        """Wait for its exit and the rest of its log; returns the exit status."""
        status = self.process.wait(PATIENCE_S)
        self.reader.join(PATIENCE_S)
        return status

    @property
    def url(self) -> str:
        """Where it serves."""
        return str(self.seen("listening")["url"])

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return address_of(self.url)

    def connect(self, worker: int) -> socket.socket:
        """Open connections until this worker accepts one; returns that one."""
        for _ in range(1000):
            connection = socket.create_connection(self.address, PATIENCE_S)
            request_id = next(self._ids)
            connection.sendall(
                b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
                + f"X-Request-ID: {request_id}\r\n\r\n".encode()
            )
            receive_until(connection, b'{"status":"alive"}')
            if self.seen("request", request_id=request_id)["worker"] == worker:
                return connection
            connection.close()
        raise AssertionError(f"worker {worker} accepts nothing")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                try:
                    self._lines.append(json.loads(line))
                except json.JSONDecodeError:
                    self.others.append(line)
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()


@contextlib.contextmanager
def logged(model: Path, **variables: object) -> Iterator[Logged]:
    """Start ``serve`` on a free port; stop it at the end, and kill it if it hangs."""
    fixed = {"model": model, "port": 0, "device": "cpu", "log_format": "json", "log_level": "debug"}
    process = subprocess.Popen(
        command_line("serve"),
        env=environment(**{**fixed, **variables}),
        stderr=subprocess.PIPE,
        text=True,
    )
    running = Logged(process)
    try:
        yield running
    finally:
        # Gracefully first, so that its workers stop too.
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        running.reader.join(PATIENCE_S)
        assert process.stderr is not None
        process.stderr.close()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request: its status and response, or its error."""

    request_id: str
    status: int | None
    headers: Mapping[str, str]
    content: bytes
    error: str | None = None


@contextlib.contextmanager
def load(url: str, clients: int, photo: bytes) -> Iterator[list[Outcome]]:
    """Send a photo repeatedly from clients with persistent connections; yields the outcomes."""
    ids = map("load-{}".format, itertools.count())
    free: queue.SimpleQueue[httpx.Client] = queue.SimpleQueue()

    def ask() -> Outcome:
        client = free.get()
        request_id = next(ids)
        try:
            answer = client.post(
                f"{url}/segment", content=photo, headers={"X-Request-ID": request_id}
            )
        except httpx.TransportError as exc:
            return Outcome(request_id, None, {}, b"", type(exc).__name__)
        finally:
            free.put(client)
        return Outcome(request_id, answer.status_code, answer.headers, answer.content)

    with contextlib.ExitStack() as opened:
        for _ in range(clients):
            free.put(opened.enter_context(httpx.Client(timeout=PATIENCE_S)))
        with under_load(clients, ask) as outcomes:
            yield outcomes
