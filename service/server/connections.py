"""HTTP/1.1 connections that resist abuse: uvicorn's, with limits on size, number and time.

uvicorn's parser, llhttp, rejects request smuggling. This module adds what uvicorn lacks:

- limits on request targets, headers, trailers and the framing of chunks;
- exactly one Host header, which names this service, and no transfer coding but chunked;
- a problem response to malformed HTTP, sent after the responses to earlier requests;
- timeouts for clients that send or read too slowly;
- a response that is complete only when the client has read almost all of it;
- a response to a client that has shut down its sending side;
- limits on the connections of one address and of all, with a reserve for probes.

A client that is still sending a body when the response is complete gets time to read it: closing a
socket with unread data resets the connection. Source: RFC 9112, sections 3, 5 to 7, 9.6 and 11.

uvicorn has no public interface for any of this, so `Connection` overrides parts of its protocol.
`tests/unit/test_private_seams.py` lists them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Protocol, TypeVar

import httptools
import structlog
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    HTTPResponseBodyEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.access import AllowedHosts, client_address
from service.errors import MalformedRequest, Overloaded, RequestTimeout, SegmentError
from service.http.problems import REFUSAL, REFUSAL_UNLESS_PROBE
from service.http.uploads import PROGRESS_BYTES, PROGRESS_PERIODS
from service.settings import Settings

MAX_TARGET_BYTES: Final = 8192
"""Longest request target. RFC 9112, section 3, recommends at least 8000 octets."""

MAX_HEAD_BYTES: Final = 32_768
"""Longest header or trailer section; also the longest line in a head, a trailer or before a chunk.
"""

MAX_HEADERS: Final = 100
"""Most headers, and most trailers."""

MAX_LENGTH_DIGITS: Final = 19
"""Longest Content-Length: as many digits as llhttp's 64 bits hold, leading zeros included."""

MAX_PIPELINED: Final = 16
"""Pipelined requests that may wait for the response to an earlier one."""

RESERVE: Final = 32
"""Connections above the limit, for probes."""

# One address gets a quarter of the connections, so that it cannot lock out all others.
_SHARE: Final = 4
_LINGER_S: Final = 5.0

# A chunked body may have this share of its bytes in chunk sizes and extensions, besides
# MAX_HEAD_BYTES. The parser calls back for each chunk, so chunks of a few bytes would be slow.
_FRAMING_SHARE: Final = 8

# Input is parsed in pieces of this size where lines are counted: a line is noticed as too long at
# the latest after two more pieces.
_FEED_BYTES: Final = 8192

# An answer is written in pieces of this size, each when the transport's buffer is below its mark.
_PIECE_BYTES: Final = 65_536

# How often to look whether a half-closed connection has been reset.
_LOOK_EVERY_S: Final = 0.25

_HOST: Final = re.compile(
    rb"(?P<name>\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(:[0-9]*)?"
)

_Method = TypeVar("_Method", bound=Callable[..., Any])

_log: Any = structlog.get_logger("service.connections")


def _overrides(method: _Method) -> _Method:
    """Mark a method that uvicorn must call. Raises `ImportError` if uvicorn has no such method.

    Without this check, a uvicorn release that renames the method would never call ours.
    """
    if not hasattr(HttpToolsProtocol, method.__name__):
        raise ImportError(
            f"uvicorn {uvicorn.__version__} is not supported: "
            f"HttpToolsProtocol has no method {method.__name__}"
        )
    return method


class Admission(Enum):
    """What a connection is good for."""

    SERVED = "every request"
    PROBES = "one request, which must be a probe"
    REFUSED = "nothing"


class Client(Protocol):
    """What `Clients` needs of a connection. ``host``: the client's address."""

    host: str | None

    def evict(self) -> None:
        """Close the connection at once."""


class _Places:
    """The places that a limit leaves to connections."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.taken = 0
        # Longest idle first. A dict would scan its deleted entries for the first one.
        self.idle: OrderedDict[Client, None] = OrderedDict()

    def make_room(self) -> bool:
        """Whether there is a place; if not, evict the client that has been idle longest."""
        if self.taken < self._most:
            return True
        longest_idle = next(iter(self.idle), None)
        if longest_idle is not None:
            longest_idle.evict()
        return longest_idle is not None


class Clients:
    """Counts connections, in total and by address (see `client_address`).

    One address may have a quarter of ``max_connections``. A trusted proxy forwards many clients and
    may have all of them. Beyond a limit a new connection takes the place of the one that has been
    idle longest, as in nginx. If all have a request in progress, it gets one of `RESERVE` places
    for probes. ``hosts``: the names that requests may be addressed to.
    """

    def __init__(self, settings: Settings, hosts: AllowedHosts) -> None:
        self.timeout_s = settings.client_timeout_s
        self.hosts = hosts
        self._most = settings.max_connections
        self._proxies = [
            ipaddress.ip_network(proxy.strip()) for proxy in settings.trusted_proxies.split(",")
        ]
        self._all = _Places(self._most)
        self._reserve = _Places(RESERVE)
        self._by_address: dict[str, _Places] = {}
        self._places_of: dict[Client, tuple[_Places, ...]] = {}

    def enter(self, client: Client) -> Admission:
        """Count a connection, as idle; one that is refused is not counted."""
        address = client_address(client.host)
        own = self._by_address.get(address) or _Places(self._share(client.host))
        if own.make_room() and self._all.make_room():
            self._by_address[address] = own
            self._take(client, own, self._all)
            return Admission.SERVED
        if self._reserve.make_room():
            self._take(client, self._reserve)
            return Admission.PROBES
        return Admission.REFUSED

    def leave(self, client: Client) -> None:
        """Stop counting a connection, if it is counted."""
        self.set_busy(client)
        for places in self._places_of.pop(client, ()):
            places.taken -= 1
        address = client_address(client.host)
        if address in self._by_address and self._by_address[address].taken == 0:
            del self._by_address[address]

    def set_busy(self, client: Client) -> None:
        """Note that a connection has a request in progress: it is not evicted."""
        for places in self._places_of.get(client, ()):
            places.idle.pop(client, None)

    def set_idle(self, client: Client) -> None:
        """Note that a connection has no request in progress."""
        for places in self._places_of.get(client, ()):
            places.idle[client] = None

    def _take(self, client: Client, *places: _Places) -> None:
        self._places_of[client] = places
        for one in places:
            one.taken += 1
        self.set_idle(client)

    def _share(self, host: str | None) -> int:
        return self._most if self._is_proxy(host) else max(1, self._most // _SHARE)

    def _is_proxy(self, host: str | None) -> bool:
        try:
            address = ipaddress.ip_address(host or "")
        except ValueError:
            return False
        return any(address in network for network in self._proxies)


class JoiningTransport:
    """A transport that can write a response's head together with the first piece of its body.

    That is one system call, one packet and one wake-up of the client instead of two.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._holds = False
        self._held = b""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._transport, name)

    def hold_next(self) -> None:
        """Hold what is written next until more is written, but not beyond this turn of the loop."""
        self._holds = True

    def write(self, data: bytes) -> None:
        """Write bytes, or hold them."""
        if self._holds:
            self._holds = False
            self._held = data
            self._loop.call_soon(self._flush)
        elif self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Close the connection once everything has been written."""
        self._flush()
        self._transport.close()

    def write_eof(self) -> None:
        """Shut down the sending side once everything has been written."""
        self._flush()
        self._transport.write_eof()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)


class Connection(HttpToolsProtocol):
    """One client's connection. ``options`` are the arguments that uvicorn gives a protocol."""

    def __init__(self, clients: Clients, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.host: str | None = None
        self._clients = clients
        self._admission = Admission.REFUSED
        # Whether the parser is in a head, and whether the first byte of that head has arrived.
        self._in_head = True
        self._head_begun = False
        # Lines and bytes of the current header or trailer section.
        self._section_lines = self._section_bytes = 0
        # Bytes since the parser last completed an element: limits the length of a line.
        self._line_bytes = 0
        # The current body: whether it is in chunks, its bytes, and all other bytes among them.
        self._chunked = False
        self._body_bytes = self._framing_bytes = 0
        # Whether all further input is discarded until the connection closes.
        self._deaf = False
        # Whether the client has closed the connection, or shut down its sending side.
        self._ended = False
        self._look_timer: asyncio.TimerHandle | None = None
        # What is wrong with the current body.
        self._body_error: Exception | None = None
        # The request that is being answered; uvicorn's `cycle` is the last one that has begun.
        self._active: RequestResponseCycle | None = None
        # Bytes of answers: what there is to send so far, and what the transport has been given.
        self._answer_bytes = self._sent_bytes = 0
        self._reading_step = PROGRESS_BYTES
        self._write_timer: asyncio.TimerHandle | None = None

    # ---- uvicorn's protocol ----------------------------------------------------------------------

    @_overrides
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or respond that there are too many and close it."""
        self._joining = JoiningTransport(transport, self.loop)
        super().connection_made(self._joining)  # type: ignore[arg-type]
        self.host = self.client[0] if self.client is not None else None
        self._admission = self._clients.enter(self)
        if self._admission is Admission.REFUSED:
            self._refuse(_too_many())
        else:
            self._wait(self._clients.timeout_s)

    @_overrides
    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection, and end the requests on it."""
        self._unset_keepalive_if_required()
        for timer in (self._write_timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        self._clients.leave(self)
        # uvicorn does this for its `cycle`, which may be another request of this connection.
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        super().connection_lost(exc)

    def evict(self) -> None:
        """Close the connection at once, for another client."""
        self._clients.leave(self)
        self.transport.abort()

    @_overrides
    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open if a whole request is in progress: the client may be reading.

        RFC 9112, section 9.6, and TCP allow to close one direction.
        """
        self._ended = True
        if not self._answering or not (self._in_head or self._deaf):
            return False
        self._deaf = True
        cycle = self._active
        if cycle is not None and not cycle.response_started:
            # A client that is gone, and not only done sending, resets the connection when bytes
            # arrive. All others may discard this response: RFC 9110, section 15.2.1.
            if cycle.scope["http_version"] == "1.1":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._look_for_reset()
        return True

    @_overrides
    def data_received(self, data: bytes) -> None:
        """Parse input, unless the connection is about to close."""
        if self._deaf:
            return
        if self._in_head and not self._head_begun:
            self._head_begun = True
            self._wait(self._clients.timeout_s)
        try:
            self._feed(memoryview(data))
        except httptools.HttpParserUpgrade:
            # Later input belongs to another protocol, which is not supported: RFC 9110, 7.8.
            self._deaf = True
        except httptools.HttpParserError as exc:
            own = exc.__context__  # raised by a callback
            if not isinstance(own, SegmentError | HTTPException):
                own = MalformedRequest("this is not an HTTP/1.1 request")
            self._fail(own)

    @_overrides
    def on_message_begin(self) -> None:
        """Handle a request's first byte."""
        super().on_message_begin()
        self._head_begun = True
        self._section_lines = self._section_bytes = 0

    @_overrides
    def on_url(self, url: bytes) -> None:
        """Handle a piece of the request target."""
        super().on_url(url)
        self._line_bytes = 0
        if len(self.url) > MAX_TARGET_BYTES:
            raise HTTPException(414, f"a target may have at most {MAX_TARGET_BYTES} bytes")

    @_overrides
    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a header. Ignore trailers: they are not headers (RFC 9110, section 6.5.1)."""
        self._line_bytes = 0
        if self._in_head:
            super().on_header(name, value)
        self._section_lines += 1
        self._section_bytes += len(name) + len(value)
        if self._section_lines > MAX_HEADERS or self._section_bytes > MAX_HEAD_BYTES:
            raise HTTPException(
                431,
                f"there may be at most {MAX_HEADERS} headers and as many trailers, each of both "
                f"together {MAX_HEAD_BYTES} bytes",
            )

    @_overrides
    def on_headers_complete(self) -> None:
        """Check what llhttp does not, then start the request."""
        self._check_head()
        if self._admission is Admission.PROBES:
            self.scope["state"][REFUSAL_UNLESS_PROBE] = _too_many()
        super().on_headers_complete()
        if self._admission is Admission.PROBES:
            self._deaf = True
            self.cycle.keep_alive = False
        self._in_head = False
        self._line_bytes = self._section_lines = self._section_bytes = 0
        self._body_bytes = self._framing_bytes = 0
        self._unset_keepalive_if_required()

    @_overrides
    def on_body(self, body: bytes) -> None:
        """Handle a piece of the body."""
        self._line_bytes = 0
        self._body_bytes += len(body)
        self._framing_bytes -= len(body)
        super().on_body(body)

    @_overrides
    def on_message_complete(self) -> None:
        """Handle the end of a request; the next byte starts another one."""
        super().on_message_complete()
        self._in_head = True
        self._head_begun = False
        self._line_bytes = 0

    @_overrides
    def on_response_complete(self) -> None:
        """Continue with the next request, or close the connection cleanly."""
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete:
            return
        self._clients.set_idle(self)
        if self._ended:
            self.transport.close()
            return
        if self._deaf:
            self.transport.write_eof()
        self._wait(_LINGER_S if self._deaf else self._clients.timeout_s)

    @_overrides
    def timeout_keep_alive_handler(self) -> None:
        """Close the connection: the next request has not arrived in time, or only partly."""
        if self._answering:
            return  # `on_response_complete` sets the timer again
        if self._head_begun and not self._deaf:
            self._refuse(RequestTimeout("the request's head took too long"))
        else:
            self.transport.close()

    # ---- malformed HTTP --------------------------------------------------------------------------

    @property
    def _answering(self) -> bool:
        """Whether the response to a request is incomplete."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _check_head(self) -> None:
        """Check a head with valid syntax. Raises `MalformedRequest` or `HTTPException`."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise HTTPException(505, "send HTTP/1.1")
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (version == "1.1" and not hosts):
            raise MalformedRequest("a request must have one Host header: RFC 9112, section 3.2")
        for host in hosts:
            self._check_host(host)
        for name, value in self.headers:
            if name == b"content-length" and len(value) > MAX_LENGTH_DIGITS:
                raise MalformedRequest(
                    f"Content-Length may have at most {MAX_LENGTH_DIGITS} digits"
                )
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and version == "1.0":
            raise MalformedRequest("HTTP/1.0 does not have transfer codings")
        if codings not in ([], [b"chunked"]):
            raise HTTPException(501, "chunked is the only supported transfer coding")
        self._chunked = bool(codings)
        if len(self.pipeline) >= MAX_PIPELINED:
            raise HTTPException(429, f"at most {MAX_PIPELINED} requests may wait on a connection")

    def _check_host(self, host: bytes) -> None:
        """Check the host that a request is for. Raises `MalformedRequest`, or 421 if it is foreign.

        421 and not 400, because such a request is well-formed but misdirected: RFC 9110, sections
        7.4 and 15.5.20. The host in an absolute target overrules the header: RFC 9112, section
        3.2.2.
        """
        found = _HOST.fullmatch(host)
        target = None if self.url.startswith(b"/") else httptools.parse_url(self.url).host
        if found is None:
            raise MalformedRequest("Host is no host name or address with an optional port")
        name = (target or found["name"]).decode("ascii")
        own = self.server[0] if self.server is not None else ""
        # A browser always sends a name here.
        if name and not self._clients.hosts.allow(name, own):
            raise HTTPException(421, f"{name} is not served here; the setting is allowed_hosts")

    def _feed(self, data: memoryview) -> None:
        """Parse input. Raises as the parser does."""
        while data and not self._deaf:
            # The body of a known length has no lines: it is parsed at once.
            size = _FEED_BYTES if self._in_head or self._chunked else len(data)
            piece, data = data[:size], data[size:]
            self._line_bytes += len(piece)
            self._framing_bytes += len(piece)
            self.parser.feed_data(piece)
            if self._line_bytes > MAX_HEAD_BYTES:
                self._fail(HTTPException(431 if self._in_head else 400, "a line is too long"))
            elif self._chunked and not self._in_head:
                most = MAX_HEAD_BYTES + self._body_bytes // _FRAMING_SHARE
                if self._framing_bytes > most:
                    self._fail(MalformedRequest("the chunks are too small, or extended too long"))

    def _fail(self, error: Exception) -> None:
        """Handle malformed input: fail the request that it is the body of, or the next one."""
        if self._in_head:
            self._refuse(error)
        else:
            self._deaf = True
            self._body_error = error
            self.cycle.message_event.set()

    def _refuse(self, error: Exception) -> None:
        """Respond with ``error`` after all other responses, then close the connection."""
        self._deaf = True
        self._unset_keepalive_if_required()
        self.on_message_begin()
        self.scope["method"] = self.scope["path"] = "-"
        self.scope["raw_path"] = self.scope["query_string"] = b""
        self.scope["state"][REFUSAL] = error
        waiting = self._answering
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self.cycle.more_body = False
        if waiting:
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    # ---- responses -------------------------------------------------------------------------------

    @_overrides
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active = cycle
        self._clients.set_busy(self)

        async def watched(
            scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
        ) -> None:
            async def receive_valid() -> ASGIReceiveEvent:
                message = await receive()
                if self._body_error is not None and cycle is self.cycle:
                    raise self._body_error
                return message

            async def send_watched(message: ASGISendEvent) -> None:
                await self._send(cycle, send, message)

            if cycle.scope["method"] == "HEAD":
                # Each GET resource supports HEAD (RFC 9110, 9.1). uvicorn omits the content.
                scope = {**cycle.scope, "method": "GET"}
            await app(scope, receive_valid, send_watched)

        super()._start_asgi_task(cycle, watched)

    async def _send(
        self, cycle: RequestResponseCycle, send: ASGISendCallable, message: ASGISendEvent
    ) -> None:
        """Send a piece of a response. The last one of a connection has ``Connection: close``.

        Raises `ClientDisconnect` if the connection was lost before a large piece was read.
        """
        if message["type"] == "http.response.start":
            last = cycle is self.cycle and (self._deaf or cycle.more_body)
            if last:
                self._deaf = True
                cycle.keep_alive = False
            self._joining.hold_next()
            await send(message)
            # `on_response_complete` closes the connection later; uvicorn would close it at once.
            # A connection beyond the limit is closed at once.
            cycle.keep_alive |= last and self._admission is Admission.SERVED
            self._watch_reading()
        elif message["type"] == "http.response.body":
            await self._send_body(cycle, send, message)
        else:
            await send(message)

    async def _send_body(
        self,
        cycle: RequestResponseCycle,
        send: ASGISendCallable,
        message: HTTPResponseBodyEvent,
    ) -> None:
        """Send a body, or a part of one, no faster than the client reads.

        uvicorn waits before each piece until the transport's buffer is below its mark. The pieces
        are copies, so that one that is not read does not keep the whole body.
        """
        body, more = message.get("body", b""), message.get("more_body", False)
        self._answer_bytes += len(body)
        self._reading_step = max(PROGRESS_BYTES, len(body) // PROGRESS_PERIODS)
        # An empty body too has a last piece.
        for start in range(0, max(len(body), 1), _PIECE_BYTES):
            piece = body[start : start + _PIECE_BYTES]
            more_pieces = start + _PIECE_BYTES < len(body)
            await send({"type": message["type"], "body": piece, "more_body": more or more_pieces})
            self._sent_bytes += len(piece)
            self._watch_reading()
            if more_pieces and cycle.disconnected:
                raise ClientDisconnect

    def _watch_reading(self) -> None:
        """Give the client `Settings.client_timeout_s` to read the next part of the answer."""
        waiting = self.transport.get_write_buffer_size()
        if self._write_timer is None and waiting:
            goal = min(self._answer_bytes, self._sent_bytes - waiting + self._reading_step)
            self._write_timer = self.loop.call_later(
                self._clients.timeout_s, self._check_reading, goal
            )

    def _check_reading(self, goal: int) -> None:
        """Abort the connection if the client has not read ``goal`` bytes of its answers."""
        self._write_timer = None
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._sent_bytes - waiting < goal:
            _log.info("the client does not read its answer", waiting_bytes=self._unread(waiting))
            self.transport.abort()
        else:
            self._watch_reading()

    def _unread(self, waiting: int) -> int:
        return self._answer_bytes - self._sent_bytes + waiting

    def _look_for_reset(self) -> None:
        """Abort a half-closed connection that the client has reset.

        The event loop no longer watches a connection whose input has ended.
        """
        if not self._answering or self.transport.is_closing():
            return
        connection: socket.socket = self.transport.get_extra_info("socket")
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._look_timer = self.loop.call_later(_LOOK_EVERY_S, self._look_for_reset)

    def _wait(self, seconds: float) -> None:
        """Restart the timer: the client has ``seconds`` for its next request."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )


def _too_many() -> Overloaded:
    return Overloaded("too many connections", 1.0)
