"""HTTP/1.1 connections that resist abuse: uvicorn's, with limits on size, number and time.

uvicorn's parser, llhttp, rejects request smuggling. This module adds what uvicorn lacks:

- limits on request targets, headers and trailers;
- exactly one Host header, and no transfer coding but chunked;
- a problem response to malformed HTTP, sent after the responses to earlier requests;
- timeouts for clients that send or read too slowly;
- a limit on the connections of one address.

A client that is still sending a body when the response is complete gets time to read it: closing a
socket with unread data resets the connection. Source: RFC 9112, sections 3, 5 to 7, 9.6 and 11.

uvicorn has no public interface for any of this, so `Connection` overrides parts of its protocol.
`tests/unit/test_private_seams.py` lists them.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeVar

import httptools
import structlog
import uvicorn
from starlette.exceptions import HTTPException
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.access import client_address
from service.errors import MalformedRequest, Overloaded, RequestTimeout, SegmentError
from service.http.problems import REFUSAL
from service.http.uploads import PROGRESS_BYTES
from service.settings import Settings

MAX_TARGET_BYTES: Final = 8192
"""Longest request target. RFC 9112, section 3, recommends at least 8000 octets."""

MAX_HEAD_BYTES: Final = 32_768
"""Longest header section; also the longest line in a head, before a chunk or in a trailer."""

MAX_HEADERS: Final = 100

MAX_PIPELINED: Final = 16
"""Pipelined requests that may wait for the response to an earlier one."""

# One address gets a quarter of the connections, so that it cannot lock out all others.
_SHARE: Final = 4
_LINGER_S: Final = 5.0

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


class Clients:
    """Counts connections, in total and by address (see `client_address`).

    One address may have a quarter of ``max_connections``. A trusted proxy forwards many clients and
    may have all of them.
    """

    def __init__(self, settings: Settings) -> None:
        self.timeout_s = settings.client_timeout_s
        self._most = settings.max_connections
        self._proxies = [
            ipaddress.ip_network(proxy.strip()) for proxy in settings.trusted_proxies.split(",")
        ]
        self._total = 0
        self._by_address: Counter[str] = Counter()

    def enter(self, host: str | None) -> bool:
        """Count a connection. Returns False, and does not count it, if it exceeds a limit."""
        address = client_address(host)
        share = self._most if self._is_proxy(host) else max(1, self._most // _SHARE)
        if self._total >= self._most or self._by_address[address] >= share:
            return False
        self._total += 1
        self._by_address[address] += 1
        return True

    def leave(self, host: str | None) -> None:
        """Stop counting a connection that `enter` counted."""
        address = client_address(host)
        self._total -= 1
        self._by_address[address] -= 1
        if self._by_address[address] == 0:
            del self._by_address[address]

    def _is_proxy(self, host: str | None) -> bool:
        try:
            address = ipaddress.ip_address(host or "")
        except ValueError:
            return False
        return any(address in network for network in self._proxies)


class Connection(HttpToolsProtocol):
    """One client's connection. ``options`` are the arguments that uvicorn gives a protocol."""

    def __init__(self, clients: Clients, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self._clients = clients
        self._host: str | None = None
        self._counted = False
        # Whether the parser is in a head, and whether the first byte of that head has arrived.
        self._in_head = True
        self._head_begun = False
        self._head_bytes = 0
        # Bytes since the parser last completed an element: limits the length of a line.
        self._line_bytes = 0
        # Whether all further input is discarded until the connection closes.
        self._deaf = False
        # What is wrong with the current body.
        self._body_error: Exception | None = None
        self._sent_bytes = 0
        self._write_timer: asyncio.TimerHandle | None = None

    # ---- uvicorn's protocol ----------------------------------------------------------------------

    @_overrides
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or respond that there are too many and close it."""
        super().connection_made(transport)
        self._host = self.client[0] if self.client is not None else None
        self._counted = self._clients.enter(self._host)
        if self._counted:
            self._wait(self._clients.timeout_s)
        else:
            self._refuse(Overloaded("too many connections", 1.0))

    @_overrides
    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._unset_keepalive_if_required()
        if self._write_timer is not None:
            self._write_timer.cancel()
        if self._counted:
            self._counted = False
            self._clients.leave(self._host)
        super().connection_lost(exc)

    @_overrides
    def data_received(self, data: bytes) -> None:
        """Parse input, unless the connection is about to close."""
        if self._deaf:
            return
        if self._in_head and not self._head_begun:
            self._head_begun = True
            self._wait(self._clients.timeout_s)
        self._line_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if self._line_bytes > MAX_HEAD_BYTES:
                self._fail(HTTPException(431 if self._in_head else 400, "a line is too long"))
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
        self._head_bytes = 0

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
        if not self._in_head:
            return
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:
            raise HTTPException(
                431, f"a head may have at most {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes"
            )

    @_overrides
    def on_headers_complete(self) -> None:
        """Check what llhttp does not, then start the request."""
        self._check_head()
        super().on_headers_complete()
        self._in_head = False
        self._line_bytes = 0
        self._unset_keepalive_if_required()

    @_overrides
    def on_body(self, body: bytes) -> None:
        """Handle a piece of the body."""
        self._line_bytes = 0
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
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and version == "1.0":
            raise MalformedRequest("HTTP/1.0 does not have transfer codings")
        if codings not in ([], [b"chunked"]):
            raise HTTPException(501, "chunked is the only supported transfer coding")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise HTTPException(429, f"at most {MAX_PIPELINED} requests may wait on a connection")

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
        """Send a piece of a response. The last one of a connection has ``Connection: close``."""
        if message["type"] == "http.response.start":
            last = cycle is self.cycle and (self._deaf or cycle.more_body)
            if last:
                self._deaf = True
                cycle.keep_alive = False
            await send(message)
            # `on_response_complete` closes the connection later; uvicorn would close it at once.
            # A connection beyond the limit is not counted: that one is closed at once.
            cycle.keep_alive |= last and self._counted
        else:
            await send(message)
        if message["type"] == "http.response.body":
            self._sent_bytes += len(message.get("body", b""))
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._write_timer is None:
            self._watch_writing(waiting)

    def _watch_writing(self, waiting: int) -> None:
        self._write_timer = self.loop.call_later(
            self._clients.timeout_s, self._check_writing, waiting, self._sent_bytes - waiting
        )

    def _check_writing(self, waited: int, taken: int) -> None:
        """Abort the connection if the client has not read enough since the last check.

        ``waited``: bytes that were buffered then; ``taken``: bytes that the client had read.
        """
        self._write_timer = None
        waiting = self.transport.get_write_buffer_size()
        if not waiting:
            return
        if self._sent_bytes - waiting - taken < min(waited, PROGRESS_BYTES):
            _log.info("the client does not read its answer", waiting_bytes=waiting)
            self.transport.abort()
        else:
            self._watch_writing(waiting)

    def _wait(self, seconds: float) -> None:
        """Restart the timer: the client has ``seconds`` for its next request."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )
