"""Serving in this process: the server, its signals and its watchdog.

SIGTERM and SIGINT shut it down gracefully; SIGHUP reloads the models.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, Final

import structlog
import uvicorn
import uvloop

from service import system
from service.access import AllowedHosts
from service.app import create_app, with_state
from service.errors import SettingsError
from service.http.dependencies import LifespanState
from service.inference.engines import Engines
from service.server.connections import Clients, Connection
from service.server.peers import WorkerPeers
from service.server.watchdog import Watchdog
from service.server.worker import Parent
from service.settings import Settings

# Longer than a request travels to a connection that its client believes to be open.
_LINGER_S: Final = 0.5

_UNSENT_BYTES: Final = 131_072

_log: Any = structlog.get_logger("service.serving")


def keep_hangups() -> threading.Event:
    """Return an event that SIGHUP sets. By default the signal would end the process."""
    came = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: came.set())
    return came


def answer(
    listener: socket.socket,
    settings: Settings,
    hangup: threading.Event,
    parent: Parent | None = None,
) -> None:
    """Serve on ``listener`` until SIGTERM or SIGINT.

    ``hangup``: by `keep_hangups`, set if SIGHUP has arrived already; ``parent``: the supervisor, if
    there is one. Raises what opening the service raises.
    """
    system.hide_memory()
    # A crash in a library's native code then prints where it happened.
    faulthandler.enable()
    _allow_many_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_answer(listener, settings, hangup, parent))


def _allow_many_files() -> None:
    """Allow as many file descriptors as the system does: connections and files of forms use them.

    The usual limit of 1,024, which is meant for programs that use select(2), is below the default
    of ``max_connections`` with everything else that is open.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _answer(
    listener: socket.socket, settings: Settings, hangup: threading.Event, parent: Parent | None
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in flight.

    The lifespan runs here, not in uvicorn: uvicorn would wrap the one-line error of a failed start
    in a traceback and three lines of its own.
    """
    peers = WorkerPeers(parent.folder, parent.number) if parent is not None else None
    app = create_app(settings, peers=peers)
    hosts = AllowedHosts(settings.host_names, settings.host, listener.getsockname()[0])
    clients = Clients(settings, hosts)
    # Left last: closing the service may hang too.
    with contextlib.ExitStack() as watched:
        async with app.router.lifespan_context(app) as lifespan_state:
            state: LifespanState = lifespan_state  # type: ignore[assignment]
            service = state["service"]
            if parent is not None:
                service.metrics.restarted(parent.restarts)
            on_turn = parent.report_alive if parent is not None else lambda: None
            watched.enter_context(Watchdog(service, settings.hung_after_s, on_turn))
            config = uvicorn.Config(
                with_state(app, state),
                http=partial(Connection, clients),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                forwarded_allow_ips=settings.trusted_proxies,
                timeout_graceful_shutdown=int(settings.deadline_s) + 5,
            )
            url = _listen(listener, config.backlog)

            def on_start() -> None:
                # First: readers of the log expect a listening worker to be watched.
                if parent is not None:
                    parent.report_ready()
                _log.info("listening", url=url)

            server = _Server(config, on_start=on_start, on_stop=service.begin_draining)
            async with _reloading(service.engines, hangup):
                await server.serve(sockets=[listener])
    _log.info("stopped")


def _listen(listener: socket.socket, backlog: int) -> str:
    """Start listening; returns the URL. Raises `SettingsError`."""
    host, port = listener.getsockname()[:2]
    # Accepted connections inherit it. Without it the kernel keeps up to several MiB of an answer
    # that the client does not read.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    try:
        # Two processes may have bound the port at the same time; only one can listen.
        listener.listen(backlog)
    except OSError as exc:
        raise SettingsError(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.asynccontextmanager
async def _reloading(engines: Engines, hangup: threading.Event) -> AsyncIterator[None]:
    """Reload the models on each SIGHUP, one reload at a time; at once if one has arrived."""
    loop = asyncio.get_running_loop()
    wanted = asyncio.Event()

    async def reload() -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            try:
                await engines.reload()
            # This task must survive, to handle the next signal.
            except Exception:  # noqa: BLE001
                _log.exception("reload failed")
                engines.on_reload(False)

    signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(wanted.set))
    if hangup.is_set():
        wanted.set()
    reloads = asyncio.create_task(reload())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        reloads.cancel()
        await asyncio.wait([reloads])


class _Server(uvicorn.Server):
    """uvicorn's server, with callbacks.

    ``on_start`` is called when it accepts connections; ``on_stop`` when a stop begins, before it
    waits for the requests in flight.
    """

    def __init__(
        self, config: uvicorn.Config, on_start: Callable[[], None], on_stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_start = on_start
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then call ``on_start``."""
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop as uvicorn does, but reset no connection that has a request on its way.

        uvicorn closes the listening socket with the connections in its queue, and every idle
        connection even if a request is arriving. Here those requests get a response first, with
        ``Connection: close``.
        """
        for listener in sockets or ():
            await self._accept_all(listener)
        for server in self.servers:
            server.close()
        await asyncio.sleep(_LINGER_S)
        await super().shutdown(sockets)

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        """Make the protocol of a connection as uvicorn does."""
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT.

        uvicorn raises the signal again once it has stopped. That would end the process before the
        lifespan closes its resources.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            self._on_stop()
            self.handle_exit(number, frame)

        previous = {
            number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
