"""Raw bytes that no client library would send, to a server process."""

import base64
import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import parse_headers
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.artefacts import encode, two_class_photo
from tests.clients import Server, head, receive_until, serving
from tests.processes import PATIENCE_S, Logged, logged

PHOTO = encode(two_class_photo())

HOST = b"Host: localhost\r\n"
GET = b"GET /healthz HTTP/1.1\r\n"
POST = b"POST /segment HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LAST = GET + HOST + b"Connection: close\r\n\r\n"
"""Sent after other bytes: a response shows that the connection was kept."""

Address = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """One response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        """The problem in the body; checks the headers that every response has."""
        assert self.headers["content-type"] == "application/problem+json"
        assert self.headers["x-content-type-options"] == "nosniff"
        assert "server" not in self.headers
        problem: dict[str, Any] = json.loads(self.body)
        assert problem["status"] == self.status
        assert problem["request_id"] == self.headers["x-request-id"]
        return problem


def answers(received: bytes) -> list[Answer]:
    """Parse consecutive responses to requests other than HEAD."""
    found = []
    file = BytesIO(received)
    while line := file.readline():
        status = int(line.split()[1])
        headers = {name.lower(): value for name, value in parse_headers(file).items()}
        if status == 100:
            continue
        length = int(headers["content-length"])
        found.append(Answer(status, headers, file.read(length)))
        assert len(found[-1].body) == length
    return found


def connect(address: Address, source: str = "127.0.0.1") -> socket.socket:
    """A connection with a timeout."""
    return socket.create_connection(address, PATIENCE_S, source_address=(source, 0))


def until_closed(connection: socket.socket) -> bytes:
    """Everything received until the server closes or resets the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def exchange(address: Address, *pieces: bytes, source: str = "127.0.0.1") -> list[Answer]:
    """Send these bytes; returns the responses until the server closes the connection."""
    with connect(address, source) as connection:
        # The server may close the connection before everything is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connection.sendall(piece)
        return answers(until_closed(connection))


# ---- unambiguous requests ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        # Where one body ends and the next request begins: RFC 9112, section 6.
        (POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", 400),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nG", 400),
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (POST + b"Content-Length: 1, 1\r\n\r\na", 400),
        (POST + b"Content-Length: +1\r\n\r\na", 400),
        (POST + b"Content-Length: -1\r\n\r\na", 400),
        (POST + b"Content-Length: 0x1\r\n\r\na", 400),
        (POST + b"Content-Length: 1_0\r\n\r\na", 400),
        (POST + b"Content-Length: \r\n\r\na", 400),
        (POST + b"Content-Length: " + b"0" * 5000 + b"\r\n\r\n", 400),
        (POST + b"Content-Length: " + b"0" * 20 + b"1\r\n\r\na", 400),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\na", 400),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /segment HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (CHUNKED + b"-1\r\nx\r\n0\r\n\r\n", 400),
        (CHUNKED + b"+1\r\nx\r\n0\r\n\r\n", 400),
        (CHUNKED + b"0x1\r\nx\r\n0\r\n\r\n", 400),
        (CHUNKED + b"1 \r\nx\r\n0\r\n\r\n", 400),
        (CHUNKED + b"1ffffffffffffffff\r\nx\r\n0\r\n\r\n", 400),
        (CHUNKED + b"1\nx\n0\n\n", 400),
        (CHUNKED + b"1;a\nx\r\n0\r\n\r\n", 400),
        (CHUNKED + b"1\r\nxyz\r\n0\r\n\r\n", 400),
        (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", 400),
        (CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        # Lines and headers: sections 2.2 and 5.
        (GET + HOST + b"X-A: b\r\n c\r\n\r\n", 400),
        (GET + b" X-A: b\r\n" + HOST + b"\r\n", 400),
        (GET + HOST + b"X-A: b\nX-B: c\r\n\r\n", 400),
        (GET + HOST + b"X-A: b\rX-B: c\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\nHost: x\n\n", 400),
        (GET + b"Host : x\r\n\r\n", 400),
        (GET + HOST + b"X-A: a\0b\r\n\r\n", 400),
        (GET + HOST + b"X\0A: b\r\n\r\n", 400),
        (GET + HOST + b"nonsense\r\n\r\n", 400),
        # Host, target and version: sections 2.3 and 3.
        (GET + b"\r\n", 400),
        (GET + HOST + HOST + b"\r\n", 400),
        (GET + b"Host: local host\r\n\r\n", 400),
        (GET + b"Host: localhost:http\r\n\r\n", 400),
        (GET + b"Host: any@localhost\r\n\r\n", 400),
        (GET + b"Host: localhost/path\r\n\r\n", 400),
        (GET + b"Host: l\xf6calhost\r\n\r\n", 400),
        (GET + b"Host: localhost, localhost\r\n\r\n", 400),
        (GET + b"Host: [::1\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 505),
        (b"GET /healthz HTTP/2.0\r\n" + HOST + b"\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT x:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"NONSENSE /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /heal thz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_what_two_servers_might_read_differently(
    protocol_server: Server, sent: bytes, status: int
) -> None:
    """One problem, then the connection closes; later bytes are not parsed."""
    (answer,) = exchange(protocol_server.address, sent, LAST)
    assert answer.problem["status"] == status
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\r\n" + GET + HOST + b"\r\n", 200),
        (GET + HOST + b"X-A: caf\xe9\r\n\r\n", 200),
        (b"GET http://localhost:1/healthz HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"OPTIONS /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"TRACE /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"GET //elsewhere/healthz HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /static/../../../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /healthz/%00 HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (POST + b"Content-Length: 1\r\n\r\nx", 415),
        (POST + b'Transfer-Encoding:\tChunked\r\n\r\n1;a=b;c="d"\r\nx\r\n0\r\n\r\n', 415),
        (CHUNKED + b"1\r\nx\r\n0\r\nX-T: y\r\n\r\n", 415),
        (CHUNKED + b"1\r\nx\r\n" * 4000 + b"0\r\n\r\n", 415),
        (CHUNKED + b"1;" + b"a" * 16_000 + b"\r\nx\r\n0\r\n\r\n", 415),
        (CHUNKED + b"0\r\n" + b"X-T: y\r\n" * 100 + b"\r\n", 400),
        (POST + b"Expect: nonsense\r\nContent-Length: 1\r\n\r\nx", 415),
    ],
)
def test_what_has_one_meaning(protocol_server: Server, sent: bytes, status: int) -> None:
    """It gets its response, and so does the next request on the connection."""
    first, last = exchange(protocol_server.address, sent, LAST)
    assert (first.status, last.status) == (status, 200)


def test_requests_are_answered_in_order(protocol_server: Server) -> None:
    """Pipelined requests get responses in order, before the one to malformed bytes."""
    photo = head(len(PHOTO)) + PHOTO
    classes = b"GET /classes HTTP/1.1\r\n" + HOST + b"\r\n"
    found = exchange(protocol_server.address, photo + classes + photo + b"nonsense\r\n" + LAST)
    assert [one.status for one in found] == [200, 200, 200, 400]
    types = [one.headers["content-type"] for one in found]
    assert types == ["image/png", "application/json", "image/png", "application/problem+json"]


def test_too_many_requests_at_once(protocol_server: Server) -> None:
    """The first ones get their responses; then 429 and the connection closes."""
    found = exchange(protocol_server.address, (GET + HOST + b"\r\n") * 1000)
    assert [one.status for one in found] == [200] * 17 + [429]


def test_a_body_that_is_longer_than_it_says(protocol_server: Server) -> None:
    """The excess bytes are parsed as the next request."""
    short = head(len(PHOTO)) + PHOTO
    assert [one.status for one in exchange(protocol_server.address, short, b"junk\r\n\r\n")] == [
        200,
        400,
    ]


@pytest.mark.parametrize("token", [b"websocket", b"h2c"])
def test_no_other_protocol_is_spoken(protocol_server: Server, token: bytes) -> None:
    """The Upgrade header is ignored, and later bytes are not parsed."""
    upgrade = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: "
        + token
        + b"\r\nHTTP2-Settings: AAMA\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    (answer,) = exchange(protocol_server.address, GET + HOST + upgrade + LAST)
    assert (answer.status, answer.headers["connection"]) == (200, "close")


@pytest.mark.parametrize("connection", [b"", b"Connection: keep-alive\r\n"])
def test_http_1_0(protocol_server: Server, connection: bytes) -> None:
    """Host is optional; one request per connection."""
    (answer,) = exchange(
        protocol_server.address, b"GET /healthz HTTP/1.0\r\n" + connection + b"\r\n" + LAST
    )
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_head(protocol_server: Server) -> None:
    """The same as GET without content, for every GET resource."""
    for path in ("/", "/healthz", "/classes", "/metrics"):
        asked = httpx.head(f"{protocol_server.url}{path}")
        assert (asked.status_code, asked.content) == (200, b"")
        assert int(asked.headers["Content-Length"]) > 0
    assert httpx.head(f"{protocol_server.url}/segment").status_code == 405


def test_trailers_are_no_headers(protocol_server: Server) -> None:
    """A proxy may not have checked them."""
    chunks = b"".join(
        [
            b"%x\r\n" % len(PHOTO),
            PHOTO,
            b"\r\n0\r\nX-Request-ID: forged\r\nAccept: text/html\r\n\r\n",
        ]
    )
    (answer,) = exchange(
        protocol_server.address,
        POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks,
    )
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["x-request-id"] != "forged"


# ---- limits --------------------------------------------------------------------------------------

MIB = 2**20


def peak_bytes(server: Server) -> int:
    """A server's peak memory so far."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def cpu_s(server: Server) -> float:
    """A server's CPU time so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def little_is_spent(server: Server) -> Iterator[None]:
    """Check that memory and CPU time stay low inside the context."""
    memory, seconds = peak_bytes(server), cpu_s(server)
    yield
    assert peak_bytes(server) - memory < 16 * MIB
    assert cpu_s(server) - seconds < 2


@pytest.mark.parametrize(
    ("start", "filler", "status"),
    [
        (b"", b"\r\n", 431),
        (b"", b"A", 400),
        (b"GET /", b"a", 414),
        (b"GET /?", b"a=b&", 414),
        (GET, b"a", 431),
        (GET + b"X-A: ", b"a", 431),
        (GET, b"X-A: b\r\n", 431),
        (CHUNKED + b"1;", b"a", 400),
        (CHUNKED + b"0\r\nX-T: ", b"a", 400),
        (CHUNKED + b"0\r\n", b"X-T: y\r\n", 431),
        (CHUNKED, b"1\r\nx\r\n", 400),
        (CHUNKED, b"2;a=b\r\nxy\r\n", 400),
    ],
)
def test_what_never_ends(protocol_server: Server, start: bytes, filler: bytes, status: int) -> None:
    """Lines and heads have a limit; 32 MiB beyond it cost little."""
    piece = filler * (MIB // len(filler))
    with little_is_spent(protocol_server):
        (answer,) = exchange(protocol_server.address, start, *[piece] * 32)
    assert answer.problem["status"] == status


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        (b"1;" + b"a" * 100_000 + b"\r\nx\r\n0\r\n\r\n", 400),
        (b"1;" + b"a" * 100_000 + b'="' + b"b" * 100_000 + b'"\r\nx\r\n0\r\n\r\n', 400),
        (b"0;" + b"a" * 100_000 + b"\r\n\r\n", 400),
        (b"1\r\nx\r\n0\r\nX-T: " + b"a" * 100_000 + b"\r\n\r\n", 400),
        (b"1\r\nx\r\n0\r\n" + b"X-T: y\r\n" * 101 + b"\r\n", 431),
        (b"1\r\nx\r\n0\r\n" + b"".join(b"X-T: %s\r\n" % (b"a" * 16_000) for _ in range(75)), 431),
    ],
)
def test_long_lines_in_a_body_that_ends(
    protocol_server: Server, chunks: bytes, status: int
) -> None:
    """They are limited although the end arrives at once; the connection closes."""
    (answer,) = exchange(protocol_server.address, CHUNKED + chunks, LAST)
    assert answer.problem["status"] == status


def test_as_much_as_there_may_be(protocol_server: Server) -> None:
    """A long target and many headers, just below the limits, are accepted."""
    target = b"GET /healthz?" + b"a" * 8100 + b" HTTP/1.1\r\n"
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 300) for number in range(98))
    first, last = exchange(protocol_server.address, target + HOST + headers + b"\r\n", LAST)
    assert (first.status, last.status) == (200, 200)


def test_a_body_that_is_announced_too_large(protocol_server: Server) -> None:
    """Refused by its head, without 100 Continue."""
    for headers in ((), ("Expect: 100-continue",)):
        with connect(protocol_server.address) as connection:
            connection.sendall(head(10**15, *headers))
            received = until_closed(connection)
        (answer,) = answers(received)
        assert received.startswith(b"HTTP/1.1 413")
        assert answer.problem["type"] == "/problems/body-too-large"
        assert answer.headers["connection"] == "close"


def test_a_body_that_is_asked_for(protocol_server: Server) -> None:
    """A client that waits for it gets 100 Continue once."""
    with connect(protocol_server.address) as connection:
        connection.sendall(head(len(PHOTO), "Expect: 100-continue", "Connection: close"))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(PHOTO)
        (answer,) = answers(until_closed(connection))
    assert answer.headers["content-type"] == "image/png"


def test_a_chunked_body_without_an_end(protocol_server: Server) -> None:
    """It is counted as it arrives; the rest is discarded while the client reads the response."""
    chunk = b"100000\r\n" + bytes(MIB) + b"\r\n"
    (answer,) = exchange(protocol_server.address, CHUNKED, *[chunk] * 64)
    assert answer.problem["type"] == "/problems/body-too-large"


# ---- forms ---------------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=x"


def part(disposition: str, content: bytes = PHOTO, *headers: str) -> bytes:
    """One part of a form."""
    lines = ["--x", f"Content-Disposition: form-data; {disposition}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content + b"\r\n"


IMAGE = 'name="image"; filename="x.png"'
END = b"--x--\r\n"


@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", part(IMAGE) + END),
        ("multipart/form-data; boundary=", part(IMAGE) + END),
        ("multipart/form-data; boundary=" + "x" * 1000, part(IMAGE) + END),
        ("multipart/form-data; boundary=y", part(IMAGE) + END),
        (FORM, b""),
        (FORM, END),
        (FORM, b"preamble\r\n" * 1_000_000),
        (FORM, b"--x\r\n" + b"a" * 10 * MIB),
        (FORM, b"--x\r\nX-A: " + b"a" * 10 * MIB),
        (FORM, b"--x\r\n" + b"X-A: b\r\n" * MIB),
        (FORM, b"--x\r\n\r\n" * MIB),
        (FORM, b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n" + END),
        (FORM, part('name="note"', b"1") * 100_000 + END),
        (FORM, part('name="note"', b"a" * 10 * MIB) + END),
        (FORM, part('name="image"', PHOTO) + END),
        (FORM, part('name="image[0][photo]"; filename="x.png"') + END),
        (FORM, part(f'name="{"image[" * 800}"; filename="x.png"') + END),
        (
            FORM,
            part('name="image"; filename="x.png"', b"", "Content-Type: image/png") * 50_000 + END,
        ),
    ],
)
def test_no_form(protocol_server: Server, path: str, content_type: str, body: bytes) -> None:
    """400 for a form of any length, at little cost in memory and time."""
    with little_is_spent(protocol_server):
        answer = httpx.post(
            f"{protocol_server.url}{path}",
            content=body,
            headers={"Content-Type": content_type},
            timeout=PATIENCE_S,
        )
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        *[
            (f"{FORM}; charset={charset}", part(IMAGE) + END)
            for charset in ("nonsense", "utf-16", "hex", "idna", "undefined", "punycode")
        ],
        (
            "multipart/form-data; boundary=" + "y" * 200,
            (part(IMAGE) + END).replace(b"--x", b"--" + b"y" * 200),
        ),
        (FORM, part('name="image"; filename="../../etc/passwd"') + END),
        (FORM, part('name="image"; filename="a\0b/c\\\\d.png"') + END),
        (FORM, part('name="image"; filename="caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"') + END),
        (FORM, part('name="view"', b"mask") + part(IMAGE) + END + b"epilogue"),
        (FORM, part("name=image; filename*=utf-8''f%C3%B6to.png") + END),
        (FORM, part('name="image"', PHOTO, "Content-Type: image/png") + END),
    ],
)
def test_an_odd_form(protocol_server: Server, content_type: str, body: bytes) -> None:
    """Unusual parts of a form do not matter if the photo is valid."""
    answer = httpx.post(
        f"{protocol_server.url}/segment", content=body, headers={"Content-Type": content_type}
    )
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")


# ---- slow clients, and many ----------------------------------------------------------------------

STRANGER = "127.0.0.2"
"""An address that is not a trusted proxy."""


@pytest.fixture(scope="module")
def hurried(tiny_artefact: Path) -> Iterator[Logged]:
    """A server for one photo at a time, with a client timeout of half a second."""
    with logged(
        tiny_artefact,
        threads=1,
        queue_size=1,
        client_timeout_s=0.5,
        max_pixels=5_000_000,
    ) as server:
        assert server.url
        yield server


@pytest.fixture(scope="module")
def few(tiny_artefact: Path) -> Iterator[Server]:
    """A server with at most four connections."""
    with serving(tiny_artefact, max_connections=4) as server:
        yield server


@pytest.mark.parametrize("sent", [b"", LAST.replace(b"Connection: close", b"X-A: b")])
def test_a_client_that_asks_for_nothing(hurried: Logged, sent: bytes) -> None:
    """An idle connection is closed, with or without an earlier request."""
    with connect(hurried.address) as connection:
        connection.sendall(sent)
        assert [one.status for one in answers(until_closed(connection))] == [200] * bool(sent)


@pytest.mark.parametrize("sent", [b"", LAST.replace(b"Connection: close", b"X-A: b")])
def test_a_head_that_does_not_end(hurried: Logged, sent: bytes) -> None:
    """408, then the connection closes."""
    with connect(hurried.address) as connection:
        connection.sendall(sent + GET + b"X-A: b")
        *_, answer = answers(until_closed(connection))
    assert answer.problem["type"] == "/problems/request-timeout"


@pytest.mark.parametrize("content_type", ["image/png", "multipart/form-data; boundary=x"])
def test_a_body_that_stops(hurried: Logged, content_type: str) -> None:
    """408 for raw bodies and forms, logged like any other response."""
    form = b"" if content_type == "image/png" else part(IMAGE, b"")[:-2]
    with connect(hurried.address) as connection:
        connection.sendall(head(100_000, f"Content-Type: {content_type}") + form + PHOTO)
        (answer,) = answers(until_closed(connection))
    assert answer.problem["type"] == "/problems/request-timeout"
    assert answer.headers["connection"] == "close"
    request_id = answer.headers["x-request-id"]
    assert hurried.seen("request", request_id=request_id)["status"] == 408


def test_a_body_that_comes_byte_by_byte(hurried: Logged) -> None:
    """Single bytes are not enough progress: 408 while they still arrive."""
    with connect(hurried.address) as connection:
        connection.settimeout(0.05)
        connection.sendall(head(100_000))
        received = b""
        while not received:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
        connection.settimeout(PATIENCE_S)
        (answer,) = answers(received + until_closed(connection))
    assert answer.status == 408


def test_no_place_is_held_by_a_body_that_comes_slowly(protocol_server: Server) -> None:
    """Even many slow bodies leave a place for a complete photo."""
    slow_head = head(len(PHOTO), "Connection: close")
    with contextlib.ExitStack() as opened:
        slow = [opened.enter_context(connect(protocol_server.address)) for _ in range(70)]
        for connection in slow:
            connection.sendall(slow_head + PHOTO[:-1])
        (answer,) = exchange(protocol_server.address, slow_head + PHOTO)
        assert answer.status == 200
        for connection in slow:
            connection.sendall(PHOTO[-1:])
            (answer,) = answers(until_closed(connection))
            assert answer.status == 200


def test_an_answer_that_is_not_read(hurried: Logged) -> None:
    """The connection is aborted, and its buffer is freed."""
    white = encode(np.full((2000, 2000, 3), 255, dtype=np.uint8))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(hurried.address)
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
        body = json.dumps(
            {"inputs": [{**tensor, "data": [base64.b64encode(white).decode()]}]}
        ).encode()
        request = head(len(body)).replace(b"/segment", b"/v2/models/tiny/infer")
        connection.sendall(request + body)
        cut = hurried.seen("the client does not read its answer")
        assert cut["waiting_bytes"] > MIB
        received = until_closed(connection)
    (length,) = re.findall(rb"content-length: (\d+)", received)
    assert len(received) < int(length)
    assert exchange(hurried.address, LAST)[0].status == 200


@pytest.mark.parametrize("sent", [b"", LAST.replace(b"Connection: close", b"X-A: b"), GET + b"X-"])
@pytest.mark.parametrize(
    "sources", [["127.0.0.1"], [STRANGER], [f"127.0.0.{number}" for number in range(2, 12)]]
)
def test_idle_connections_make_room(
    protocol_server: Server, sources: list[str], sent: bytes
) -> None:
    """A thousand that ask for nothing, or have not ended a head, keep nobody out."""
    with contextlib.ExitStack() as opened:
        for number in range(1000):
            source = sources[number % len(sources)]
            connection = opened.enter_context(connect(protocol_server.address, source))
            # The server may have closed it already, for the next ones.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(sent)
        for source in (sources[0], "127.0.0.99"):
            for asked in (GET, b"GET /readyz HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\n"):
                request = asked + HOST + b"Connection: close\r\n\r\n"
                (answer,) = exchange(protocol_server.address, request, source=source)
                assert answer.status == 200
            photo = head(len(PHOTO), "Connection: close") + PHOTO
            (answer,) = exchange(protocol_server.address, photo, source=source)
            assert answer.status == 200


def test_the_connection_that_is_idle_longest_makes_room(few: Server) -> None:
    """It is closed without an answer; the others serve on."""
    with contextlib.ExitStack() as opened:
        kept = [opened.enter_context(connect(few.address)) for _ in range(4)]
        for number in (0, 3, 1, 2, 0):
            kept[number].sendall(GET + HOST + b"\r\n")
            receive_until(kept[number], b'{"status":"alive"}')
        assert [one.status for one in exchange(few.address, LAST)] == [200]
        assert until_closed(kept.pop(3)) == b""
        for connection in kept:
            connection.sendall(LAST)
            assert [one.status for one in answers(until_closed(connection))] == [200]


@pytest.fixture
def busy(few: Server, source: str) -> Iterator[list[socket.socket]]:
    """As many requests in progress as ``source`` may have connections."""
    with contextlib.ExitStack() as opened:
        allowed = 1 if source == STRANGER else 4
        connections = [opened.enter_context(connect(few.address, source)) for _ in range(allowed)]
        for connection in connections:
            connection.sendall(head(len(PHOTO), "Expect: 100-continue", "Connection: close"))
            receive_until(connection, b"HTTP/1.1 100 Continue\r\n\r\n")
        yield connections


@pytest.mark.parametrize("source", [STRANGER, "127.0.0.1"])
def test_probes_are_answered_when_all_connections_are_busy(
    few: Server, busy: list[socket.socket], source: str
) -> None:
    """At most a quarter from one address, and all in total; beyond that one probe each."""
    photo = head(len(PHOTO)) + PHOTO
    classes = b"GET /classes HTTP/1.1\r\n" + HOST + b"\r\n"
    for sent in (photo, classes, GET + b"\r\n"):
        (refused,) = exchange(few.address, sent, LAST, source=source)
        assert refused.headers["connection"] == "close"
        assert refused.problem["status"] == (503 if sent != GET + b"\r\n" else 400)
    (refused,) = exchange(few.address, classes, source=source)
    assert refused.problem["type"] == "/problems/overloaded"
    assert refused.headers["retry-after"] == "1"
    with contextlib.ExitStack() as opened:
        for _ in range(100):
            opened.enter_context(connect(few.address, source))
        for path in (b"/healthz", b"/readyz", b"/metrics", b"/v2/health/ready"):
            request = b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n"
            (answer,) = exchange(few.address, request, LAST, source=source)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
    for connection in busy:
        connection.sendall(PHOTO)
        assert [one.status for one in answers(until_closed(connection))] == [200]


def until_served(address: Address, source: str) -> None:
    """Repeat an ordinary request until a place is free."""
    started = time.monotonic()
    classes = b"GET /classes HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    while [one.status for one in exchange(address, classes, source=source)] != [200]:
        assert time.monotonic() < started + PATIENCE_S


@pytest.mark.parametrize("source", [STRANGER, "127.0.0.1"])
def test_a_closed_connection_frees_its_place(
    few: Server, busy: list[socket.socket], source: str
) -> None:
    """Once the server notices."""
    busy.pop().close()
    until_served(few.address, source)


# ---- clients that close one direction ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (head(len(PHOTO)) + PHOTO, [200]),
        ((head(len(PHOTO)) + PHOTO) * 3, [200] * 3),
        (head(len(PHOTO)) + PHOTO + GET + b"X-A", [200]),
        (b"POST /segment HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(PHOTO) + PHOTO, [200]),
        (head(10, "Connection: close") + b"no picture", [415]),
        (CHUNKED + b"no chunk", [400]),
        (b"nonsense\r\n\r\n", [400]),
        (GET + HOST + b"\r\n", [200]),
    ],
)
def test_a_client_that_only_reads_on(
    protocol_server: Server, sent: bytes, statuses: list[int]
) -> None:
    """A client that shuts down its sending side after whole requests gets all answers."""
    with connect(protocol_server.address) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert [one.status for one in answers(until_closed(connection))] == statuses


def test_half_a_request_has_no_answer(protocol_server: Server) -> None:
    """The connection closes: the client is gone."""
    for sent in (b"", GET, head(len(PHOTO)) + PHOTO[:-1]):
        with connect(protocol_server.address) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert until_closed(connection) == b""


# ---- other hosts and other sites' pages ----------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]", ""]
)
@pytest.mark.parametrize("port", ["", ":", ":8000"])
def test_a_loopback_address_has_loopback_names(
    protocol_server: Server, host: str, port: str
) -> None:
    """With any port, which a tunnel or proxy may have changed."""
    sent = f"GET /healthz HTTP/1.1\r\nHost: {host}{port}\r\nConnection: close\r\n\r\n"
    (answer,) = exchange(protocol_server.address, sent.encode())
    assert answer.status == 200


@pytest.mark.parametrize(
    "start",
    [
        *("GET /healthz HTTP/1.1\r\nHost: %s\r\n", "POST /segment HTTP/1.1\r\nHost: %s\r\n"),
        *(
            "GET /healthz HTTP/1.0\r\nHost: %s\r\n",
            "GET http://%s/ HTTP/1.1\r\nHost: localhost\r\n",
        ),
    ],
)
@pytest.mark.parametrize(
    "host",
    [
        *("attacker.example", "localhost.attacker.example", "notlocalhost", "127.0.0.1.example"),
        *("192.0.2.1", "[2001:db8::1]", "0.0.0.0", "attacker.example:8000"),  # noqa: S104
    ],
)
def test_a_loopback_address_has_no_other_names(
    protocol_server: Server, start: str, host: str
) -> None:
    """421: a page has pointed its own name here (DNS rebinding)."""
    (answer,) = exchange(protocol_server.address, (start % host).encode() + b"\r\n", LAST)
    assert (answer.status, answer.problem["type"]) == (421, "/problems/unknown-host")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("allowed", "statuses"), [("segment.example,*.b.example", [200, 200, 421]), ("*", [200] * 3)]
)
def test_names_that_are_allowed(tiny_artefact: Path, allowed: str, statuses: list[int]) -> None:
    """The configured ones, beside the loopback names."""
    with serving(tiny_artefact, allowed_hosts=allowed) as server:
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        found = [
            httpx.get(f"{server.url}/healthz", headers={"Host": host}).status_code
            for host in ("Segment.Example:80", "a.b.example", "b.example")
        ]
    assert found == statuses
