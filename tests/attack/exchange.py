"""Send any bytes to the service and read whatever it answers.

Unlike a client's library it sends malformed requests as they are, and reads the answer while it
still sends, so that an early refusal is not taken for a cut connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tests.benchmarks.wire import HOST

PATIENCE_S: Final = 100.0
"""An answer that takes longer counts as none: Label Studio waits so long for 250 photos."""

CUT: Final = 0
"""Status of an exchange in which the connection ended before the answer did."""

# A method or transfer coding, and a version of HTTP, that the service does not implement.
_NOT_HTTP: Final = (501, 505)
_PIECE_BYTES: Final = 2**18


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes to send on a connection of their own. ``name`` is for the report.

    ``incomplete``: it ends too early, so that the service may close the connection without an
    answer; ``half_closed``: the client closes its sending side after it, as ``nc -N`` does;
    ``refused``: only a 4xx is right; ``photos``: how many it has; each may cost as much as one
    alone.
    """

    name: str
    content: bytes
    incomplete: bool = False
    half_closed: bool = False
    refused: bool = False
    photos: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; ``status`` is `CUT` without a complete one. Header names are in lower case."""

    status: int
    seconds: float
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def problem(self) -> str:
        """The end of the problem's type, such as ``worker-lost``; empty if it is no problem."""
        if "problem+json" not in self.headers.get("content-type", ""):
            return ""
        found: dict[str, Any] = json.loads(self.body)
        return str(found["type"]).rpartition("/")[2]

    @property
    def detail(self) -> str:
        """What the problem says; empty if it is no problem."""
        return str(json.loads(self.body)["detail"]) if self.problem else ""

    @property
    def truthful_refusal(self) -> bool:
        """Whether it is a 503 that says when to return."""
        return self.status == 503 and self.headers.get("retry-after", "").isdigit()


def acceptable(request: Request, answer: Answer) -> bool:
    """Whether a hostile request may be answered so."""
    if answer.status == CUT:
        return request.incomplete
    if request.refused:
        return 400 <= answer.status < 500
    return 200 <= answer.status < 500 or answer.truthful_refusal or answer.status in _NOT_HTTP


class Incomplete(Exception):
    """The connection ended before the answer did."""


async def exchange(
    port: int, request: Request, *, source: str = HOST, timeout_s: float = PATIENCE_S
) -> Answer:
    """Send a request and read its answer. ``source``: the client's loopback address."""
    began_s = time.monotonic()
    with contextlib.closing(await connect(port, source)) as connection:
        sending = asyncio.create_task(_send(connection, request))
        try:
            async with asyncio.timeout(timeout_s):
                status, headers, body = await _receive(connection, request.content[:5] == b"HEAD ")
        except (Incomplete, OSError, TimeoutError):
            return Answer(CUT, time.monotonic() - began_s)
        finally:
            sending.cancel()
            await asyncio.wait([sending])
    return Answer(status, time.monotonic() - began_s, headers, body)


async def connect(port: int, source: str = HOST, receive_bytes: int = 0) -> socket.socket:
    """Open a connection. ``receive_bytes``: size of its receive buffer, 0 for the system's."""
    connection = socket.socket()
    try:
        connection.setblocking(False)
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
    except BaseException:
        connection.close()
        raise
    return connection


async def _send(connection: socket.socket, request: Request) -> None:
    # A service that refuses the request may close before it has all of it: the answer decides.
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(connection, request.content)
        if request.half_closed or request.incomplete:
            connection.shutdown(socket.SHUT_WR)


async def _receive(
    connection: socket.socket, without_body: bool
) -> tuple[int, Mapping[str, str], bytes]:
    """The first answer that is not an interim one. Raises `Incomplete` or `OSError`."""
    reader = _Reader(connection)
    while True:
        status_line, *lines = (await reader.until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        try:
            status = int(status_line.split(" ", 2)[1])
        except (IndexError, ValueError) as exc:
            raise Incomplete from exc
        if status >= 200:
            break
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if without_body or status in (204, 304):
        return status, headers, b""
    if headers.get("transfer-encoding") == "chunked":
        body = bytearray()
        while size := int((await reader.until(b"\r\n")).split(b";")[0], 16):
            body += await reader.exactly(size)
            await reader.exactly(2)
        await reader.until(b"\r\n")
        return status, headers, bytes(body)
    return status, headers, await reader.exactly(int(headers["content-length"]))


class _Reader:
    """Reads from a socket. Its methods raise `Incomplete` at the end, or `OSError`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._kept = bytearray()

    async def until(self, end: bytes) -> bytes:
        """What comes before ``end``."""
        while (at := self._kept.find(end)) < 0:
            await self._more()
        return self._taken(at + len(end))[: -len(end)]

    async def exactly(self, size: int) -> bytes:
        while len(self._kept) < size:
            await self._more()
        return self._taken(size)

    async def _more(self) -> None:
        piece = await asyncio.get_running_loop().sock_recv(self._connection, _PIECE_BYTES)
        if not piece:
            raise Incomplete
        self._kept += piece

    def _taken(self, size: int) -> bytes:
        taken = bytes(self._kept[:size])
        del self._kept[:size]
        return taken
