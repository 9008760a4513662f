"""A minimal HTTP/1.1 client for measuring: raw sockets over asyncio."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

HOST: Final = "127.0.0.1"
_BOUNDARY: Final = "benchmark-of-fcn-segment"


def multipart(field: str, photo: bytes) -> tuple[str, bytes]:
    """Content type and body of a multipart form with one JPEG file."""
    head = (
        f"--{_BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{field}"; filename="photo.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + photo + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return f"multipart/form-data; boundary={_BOUNDARY}", body


class Answer(NamedTuple):
    """A complete answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """One keep-alive HTTP/1.1 connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def exchange(self, request: bytes) -> Answer:
        """Send a request and read its complete answer. Raises `OSError` or `EOFError`."""
        if self._reader is not None and self._reader.at_eof():
            self.close()  # the server has closed the idle connection
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                HOST, self._port, limit=2**26
            )
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.rstrip().split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if "content-length" in headers:
            body = await self._reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            body = await self._chunks(self._reader)
        else:
            raise EOFError("the answer has no length")
        if headers.get("connection") == "close":
            self.close()
        return Answer(int(status.split(" ", 2)[1]), headers, body)

    async def _chunks(self, reader: asyncio.StreamReader) -> bytes:
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return body

    def close(self) -> None:
        """Close the connection; the next exchange opens a new one."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


def request_bytes(
    port: int, path: str, content_type: str = "", body: bytes = b"", *headers: str
) -> bytes:
    """A complete request: a POST with a body, a GET without one."""
    lines = [f"{'POST' if body else 'GET'} {path} HTTP/1.1", f"Host: {HOST}:{port}", *headers]
    if body:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def arrivals(rate_per_s: float, seconds: float, seed: int) -> Iterable[float]:
    """The arrival times of a Poisson process, in seconds from its start."""
    rng = random.Random(seed)  # noqa: S311 - the same arrivals for every side, not a secret
    at_s = rng.expovariate(rate_per_s)
    while at_s < seconds:
        yield at_s
        at_s += rng.expovariate(rate_per_s)
