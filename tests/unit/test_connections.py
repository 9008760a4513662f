"""Connections: their number, in total and by address, and what one client may do on its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock, call

import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.access import AllowedHosts
from service.server.connections import (
    RESERVE,
    Admission,
    Clients,
    Connection,
    JoiningTransport,
    _overrides,
)
from service.settings import Settings

SERVED, PROBES, REFUSED = Admission

ANY_HOST = AllowedHosts(["*"], "127.0.0.1", "127.0.0.1")


@dataclass(eq=False)
class Peer:
    """A client's connection."""

    clients: Clients
    host: str | None
    evicted: bool = False

    def evict(self) -> None:
        """As a connection does."""
        self.evicted = True
        self.clients.leave(self)


@dataclass
class Door:
    """Connects peers to `Clients`."""

    clients: Clients

    def idle(self, host: str | None) -> Peer:
        """A peer that has connected."""
        peer = Peer(self.clients, host)
        assert self.clients.enter(peer) is SERVED
        return peer

    def busy(self, host: str | None) -> Peer:
        """One with a request in progress."""
        peer = self.idle(host)
        self.clients.set_busy(peer)
        return peer

    def admit(self, host: str | None) -> Admission:
        """What a new connection is good for, which then leaves."""
        peer = Peer(self.clients, host)
        found = self.clients.enter(peer)
        self.clients.leave(peer)
        return found


@pytest.fixture
def open_door(make_settings: Callable[..., Settings]) -> Callable[..., Door]:
    """Makes a door with these settings."""
    return lambda **settings: Door(Clients(make_settings(**settings), ANY_HOST))


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (["192.0.2.1", "::ffff:192.0.2.1"], "192.0.2.2"),
        (["2001:db8::1", "2001:db8::ffff:2"], "2001:db8:0:1::1"),
    ],
)
def test_an_address_has_a_quarter(
    open_door: Callable[..., Door], same: list[str], other: str
) -> None:
    """In any notation; an IPv6 network is one address. A closed connection frees a place."""
    door = open_door(max_connections=8)
    peers = [door.busy(host) for host in same]
    assert door.admit(same[0]) is PROBES
    assert door.admit(other) is SERVED
    door.clients.leave(peers[1])
    door.busy(same[0])
    assert door.admit(same[0]) is PROBES


def test_trusted_proxies_have_all_that_is_left(open_door: Callable[..., Door]) -> None:
    """A proxy forwards many clients; the total still limits it."""
    door = open_door(max_connections=4, trusted_proxies="127.0.0.1, 10.0.0.0/8")
    door.busy("192.0.2.1")
    proxies = [door.busy("10.1.2.3") for _ in range(3)]
    assert (door.admit("10.1.2.3"), door.admit("198.51.100.1")) == (PROBES, PROBES)
    door.clients.leave(proxies[0])
    assert door.admit("198.51.100.1") is SERVED


def test_few_connections_are_still_one_for_each(open_door: Callable[..., Door]) -> None:
    """A quarter of two is rounded up to one; clients without an address share one entry."""
    door = open_door(max_connections=2)
    door.busy(None)
    assert door.admit(None) is PROBES


def test_the_one_that_is_idle_longest_goes(open_door: Callable[..., Door]) -> None:
    """Of the same address if that has its share, of all if there are too many."""
    door = open_door(max_connections=8)
    strangers = [door.idle("192.0.2.1") for _ in range(2)]
    own = [door.idle("192.0.2.2") for _ in range(2)]
    for peer in (own[0], strangers[0]):
        door.clients.set_busy(peer)
        door.clients.set_idle(peer)
    door.busy("192.0.2.2")
    assert [peer.evicted for peer in (*strangers, *own)] == [False, False, False, True]
    for host in ("192.0.2.3", "192.0.2.4"):
        for _ in range(2):
            door.busy(host)
    door.busy("192.0.2.5")
    assert [peer.evicted for peer in (*strangers, *own)] == [False, True, False, True]


def test_the_reserve_is_for_one_request_each(open_door: Callable[..., Door]) -> None:
    """Connections that wait in it make room for others; when all are busy, none is let in."""
    door = open_door(max_connections=1)
    door.busy("192.0.2.1")
    waiting = [Peer(door.clients, "192.0.2.2") for _ in range(2 * RESERVE)]
    assert {door.clients.enter(peer) for peer in waiting} == {PROBES}
    assert [peer.evicted for peer in waiting] == [True] * RESERVE + [False] * RESERVE
    for peer in waiting[RESERVE:]:
        door.clients.set_busy(peer)
    assert door.admit("192.0.2.3") is REFUSED
    door.clients.leave(waiting[-1])
    assert door.admit("192.0.2.3") is PROBES


# ---- one connection, on a real socket ------------------------------------------------------------

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
SIZE = 2**22
PERIOD_S = 59.0
MARK_BYTES = 65_536
"""asyncio's high-water mark."""


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """A period for a client to make progress."""
    return make_settings(client_timeout_s=PERIOD_S)


class Timers:
    """A loop whose timers of `PERIOD_S` the test fires; all else is the running loop's."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.TimerHandle] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(asyncio.get_running_loop(), name)

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        """Keep a timer for the test, or start it."""
        loop = asyncio.get_running_loop()
        if delay != PERIOD_S:
            return loop.call_later(delay, callback, *args)
        self._waiting.append(asyncio.TimerHandle(0.0, callback, args, loop))
        return self._waiting[-1]

    def fire(self) -> None:
        """Let a period pass."""
        due, self._waiting = self._waiting, []
        for handle in due:
            if not handle.cancelled():
                handle._run()


@dataclass
class Served:
    """A client's socket, and the server's end of the connection."""

    client: socket.socket
    connection: Connection
    timers: Timers

    async def read(self, size: int) -> int:
        """Read exactly so many bytes, or up to the end."""
        loop, left = asyncio.get_running_loop(), size
        while left and (piece := await loop.sock_recv(self.client, min(left, 65_536))):
            left -= len(piece)
        return size - left


@contextlib.asynccontextmanager
async def served(settings: Settings, app: ASGIApp) -> AsyncIterator[Served]:
    """Connect to a server of ``app``, with small buffers in the kernel."""
    loop, timers, started = asyncio.get_running_loop(), Timers(), asyncio.Event()

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        await app(scope, receive, send)

    config = uvicorn.Config(noted, http=HttpToolsProtocol, log_config=None, access_log=False)
    config.load()
    accepted: list[Connection] = []

    def accept() -> Connection:
        options = {"config": config, "server_state": ServerState(), "app_state": {}}
        accepted.append(Connection(Clients(settings, ANY_HOST), **options, _loop=timers))
        return accepted[-1]

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        async with await loop.create_server(accept, sock=listener):
            await loop.sock_connect(client, listener.getsockname())
            await loop.sock_sendall(client, REQUEST)
            await started.wait()
            yield Served(client, accepted[0], timers)


def answering(body: bytes, outcomes: list[str]) -> ASGIApp:
    """An app that sends ``body`` and notes when that is over."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await send({"type": "http.response.body", "body": body})
        except ClientDisconnect:
            outcomes.append("gone")
        else:
            outcomes.append("sent")

    return app


@pytest.mark.anyio
async def test_an_answer_is_not_over_before_it_is_read(
    settings: Settings,
) -> None:
    """The request lasts until almost all is read; no more is buffered than the mark and a piece."""
    outcomes: list[str] = []
    app = answering(bytes(SIZE), outcomes)
    async with served(settings, app) as running:
        got = 0
        while got < SIZE - 4 * MARK_BYTES:
            assert outcomes == []
            assert running.connection.transport.get_write_buffer_size() <= 2 * MARK_BYTES
            got += await running.read(10_000)
        await running.read(4 * MARK_BYTES)
        assert outcomes == ["sent"]


@pytest.mark.anyio
async def test_an_answer_that_is_not_read(settings: Settings) -> None:
    """It is cut, and the request ends with the client gone; nothing stays buffered."""
    outcomes: list[str] = []
    async with served(settings, answering(bytes(SIZE), outcomes)) as running:
        await running.read(MARK_BYTES)
        running.timers.fire()
        assert outcomes == []
        running.timers.fire()
        await asyncio.wait(running.connection.tasks)
        assert outcomes == ["gone"]
        assert running.connection.transport.get_write_buffer_size() == 0
        assert await running.read(SIZE) < SIZE - MARK_BYTES


@pytest.mark.parametrize(("sixteenths", "outcome"), [(1.1, "sent"), (0.5, "gone")])
@pytest.mark.anyio
async def test_a_large_answer_must_be_read_in_proportion(
    settings: Settings, sixteenths: float, outcome: str
) -> None:
    """A sixteenth of it within each period; 64 KiB would hold it in memory for long."""
    outcomes: list[str] = []
    async with served(settings, answering(bytes(SIZE), outcomes)) as running:
        portion = int(SIZE * sixteenths / 16)
        assert portion > MARK_BYTES
        for _ in range(20):
            await running.read(portion)
            running.timers.fire()
        await asyncio.wait_for(asyncio.gather(*running.connection.tasks), PERIOD_S)
        assert outcomes == [outcome]


# ---- half-closed connections ---------------------------------------------------------------------


async def until_gone(_: Scope, receive: Receive, send: Send) -> None:
    """An app that answers only when it hears that its client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.mark.anyio
async def test_the_work_for_a_client_that_has_closed_ends(settings: Settings) -> None:
    """Although its connection looks like one that only sends no more."""
    async with served(settings, until_gone) as running:
        running.client.close()
        await asyncio.wait_for(asyncio.gather(*running.connection.tasks), PERIOD_S)


@pytest.mark.anyio
async def test_a_client_that_reads_on_is_not_gone(settings: Settings) -> None:
    """It gets an interim response, which tells it from one that has closed, then its answer."""

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        gone = asyncio.ensure_future(receive())
        await enough.wait()
        assert not gone.done()
        gone.cancel()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    enough = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with served(settings, app) as running:
        running.client.shutdown(socket.SHUT_WR)
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert await loop.sock_recv(running.client, 100) == interim
        enough.set()
        received = await loop.sock_recv(running.client, 100)
        assert received.startswith(b"HTTP/1.1 204")
        assert await loop.sock_recv(running.client, 100) == b""


# ---- uvicorn -------------------------------------------------------------------------------------


def test_a_uvicorn_without_an_overridden_method_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names the method; without it the guard would silently not run."""
    method = Connection._start_asgi_task
    assert _overrides(method) is method
    monkeypatch.delattr(HttpToolsProtocol, "_start_asgi_task")
    with pytest.raises(ImportError, match=r"uvicorn .* is not supported: .*_start_asgi_task"):
        _overrides(method)


@pytest.mark.anyio
async def test_a_head_is_written_with_the_body() -> None:
    """In one write, if the body comes in the same turn of the loop; alone otherwise."""
    written = Mock()
    transport = JoiningTransport(written, asyncio.get_running_loop())
    for body_follows in (True, False):
        transport.hold_next()
        transport.write(b"head ")
        if body_follows:
            transport.write(b"body")
        await asyncio.sleep(0)
        transport.write(b"later")
    transport.hold_next()
    transport.write(b"last")
    transport.close()
    writes = [one.args[0] for one in written.write.call_args_list]
    assert writes == [b"head body", b"later", b"head ", b"later", b"last"]
    assert written.method_calls[-1] == call.close()
