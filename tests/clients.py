"""Clients of the service, in this process over ASGI or over a socket to a server process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from PIL import Image

from service.app import create_app, with_state
from service.inference.session import InferenceSession
from service.runtime import Service
from service.settings import Settings

T = TypeVar("T")

Check = Callable[[httpx.Response], Awaitable[None]]
CHECKS: list[Callable[[FastAPI, Settings], Check]] = []
"""Checks of every answer over ASGI; `tests.integration` adds to them."""


@dataclass(frozen=True)
class InProcess:
    """An HTTP client and its service."""

    http: httpx.AsyncClient
    service: Service


@contextlib.asynccontextmanager
async def in_process(
    settings: Settings, session: InferenceSession | None = None
) -> AsyncIterator[InProcess]:
    """Open the app with its lifespan, without a socket."""
    app = create_app(settings, session)
    hooks = {"response": [check(app, settings) for check in CHECKS]}
    async with app.router.lifespan_context(app) as state:
        assert state is not None
        transport = httpx.ASGITransport(with_state(app, state))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://service", event_hooks=hooks
        ) as http:
            yield InProcess(http, state["service"])


def address_of(url: str) -> tuple[str, int]:
    """The host and port of a URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


@dataclass(frozen=True)
class Server:
    """A running ``fcn-segment serve``."""

    process: subprocess.Popen[str]
    url: str

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return address_of(self.url)


def environment(**variables: object) -> dict[str, str]:
    """This process's environment, with ``variables`` added as ``FCN_*``."""
    given = {f"FCN_{name.upper()}": str(value) for name, value in variables.items()}
    return {**os.environ, "PYTHONUNBUFFERED": "1", **given}


def command_line(*arguments: str | Path) -> list[str]:
    """The command ``fcn-segment`` with this interpreter."""
    return [sys.executable, "-W", "error", "-m", "service", *map(str, arguments)]


def fails(*arguments: str | Path, **variables: object) -> tuple[int, str]:
    """Run the command line until it exits; returns its status and stderr."""
    done = subprocess.run(
        command_line(*arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def head(body_bytes: int, *headers: str) -> bytes:
    """The head of a request as bytes."""
    lines = ["POST /segment HTTP/1.1", "Host: localhost", f"Content-Length: {body_bytes}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    """Receive up to and including ``end``, which may take several pieces."""
    received = b""
    while not received.endswith(end):
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


@contextlib.contextmanager
def drained(server: Server) -> Iterator[Server]:
    """Discard a server's log so that writing it never blocks; stop the server at the end."""
    assert server.process.stderr is not None
    reader = threading.Thread(target=server.process.stderr.read)
    reader.start()
    try:
        yield server
    finally:
        server.process.terminate()
        reader.join()


@contextlib.contextmanager
def serving(model: Path, *arguments: str, **variables: object) -> Iterator[Server]:
    """Start ``serve`` on a free port, wait until it listens, and stop it at the end."""
    fixed = {"model": model, "port": 0, "threads": 1, "log_format": "json"}
    process = subprocess.Popen(
        command_line("serve", *arguments),
        env=environment(**{**fixed, **variables}),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(process, _listening(process)["url"])
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _listening(process: subprocess.Popen[str]) -> Mapping[str, Any]:
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        with contextlib.suppress(json.JSONDecodeError):
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "listening":
                return event
    raise AssertionError(f"the server ended before it listened:\n{seen}")


def mask_of(response: httpx.Response) -> npt.NDArray[np.uint8]:
    """The class ids in a palette PNG."""
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.mode == "P"
        return np.asarray(image)


def assert_problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """Assert a complete RFC 9457 problem about this request; returns it."""
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["type"]) == (status, f"/problems/{slug}")
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"] == response.request.url.path
    assert problem["request_id"] == response.headers["X-Request-ID"]
    return problem


@contextlib.contextmanager
def under_load(clients: int, ask: Callable[[], T]) -> Iterator[list[T]]:
    """Call ``ask`` repeatedly in ``clients`` threads; yields the list of its results so far."""
    outcomes: list[T] = []
    enough = threading.Event()

    def go_on() -> None:
        while not enough.is_set():
            outcomes.append(ask())

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(go_on) for _ in range(clients)]
        try:
            yield outcomes
        finally:
            enough.set()
    for future in asking:
        future.result()
