"""``fcn-segment serve`` and ``fcn-segment predict``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, get_args

import structlog
import uvicorn
import uvloop

from service import __version__, logs
from service.answers import MaskFormat
from service.app import create_app, with_state
from service.errors import SegmentError, SettingsError
from service.metrics import Peers
from service.predict import Format, Order, predict
from service.routes.state import LifespanState
from service.settings import Settings, env_name, load_settings
from service.siblings import Siblings
from service.supervisor import plan, supervise
from service.worker import WORKER_COMMAND, Parent

# mallopt's parameters, from glibc's malloc.h, and what they are set to.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BUFFER_BYTES: Final = 4 * 2**20
_KEPT_BYTES: Final = 64 * 2**20

_log: Any = structlog.get_logger("service.cli")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done; 1: it failed, or some photos did, one line each on stderr; 2: wrong usage.
    """
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "serve":
            return _serve(_given(parsed, Settings.model_fields))
        if parsed.command == WORKER_COMMAND:
            return _work(parsed.listener_fd, parsed.parent_fd)
        failed = _predict(parsed)
    except SegmentError as exc:
        print(f"fcn-segment: {exc}", file=sys.stderr)
        return _status(exc)
    except KeyboardInterrupt:
        return 130
    if failed:
        print(f"fcn-segment: {failed} photos failed", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fcn-segment", description="Label every pixel of a photo with PASCAL VOC's classes."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{serve,predict}")

    serve = commands.add_parser("serve", help="answer over HTTP")
    for name, field in Settings.model_fields.items():
        # The default None means "not given": then the environment or the field's default rules.
        default = "" if field.default is None else f", default {field.default}"
        serve.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="VALUE",
            help=f"{field.description} ({env_name(name)}{default})",
        )

    files = commands.add_parser("predict", help="segment files")
    files.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="file or folder")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    files.add_argument(
        "--format",
        "--view",
        choices=get_args(Format),
        default="mask",
        help="a palette PNG, overlay, cut-out or JSON for each photo; a folder of VOC's layout; or "
        "one COCO file (default mask)",
    )
    files.add_argument(
        "--mask",
        choices=get_args(MaskFormat),
        help="how json and coco carry the mask (default rle in json, polygons in coco)",
    )
    files.add_argument(
        "--classes", metavar="NAMES", help="comma-separated names that answers are limited to"
    )
    files.add_argument(
        "--max-side", type=int, metavar="N", help="longest side that the network sees, pixels"
    )
    files.add_argument("--jobs", type=_positive, metavar="N", help="photos at once")
    files.add_argument(
        "--overwrite", action="store_true", help="do again what is there (default: leave it alone)"
    )
    files.add_argument("--url", help="a running service, instead of a model in this process")
    files.add_argument(
        "--model",
        metavar="MODEL",
        help=f"artefact folder ({env_name('model')}), or with --url the name of a model there",
    )

    # Only `serve` starts it: without a help text it is not listed.
    worker = commands.add_parser(WORKER_COMMAND)
    worker.add_argument("listener_fd", type=int)
    worker.add_argument("parent_fd", type=int)
    return parser


def _positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _predict(parsed: argparse.Namespace) -> int:
    """How many photos failed."""
    settings = load_settings(_given(parsed, ["model"]) if parsed.url is None else {})
    logs.configure("warning", settings.log_format)
    order = Order(
        inputs=parsed.images,
        out=parsed.out,
        format=parsed.format,
        mask=parsed.mask,
        classes=parsed.classes,
        max_side=parsed.max_side,
        jobs=parsed.jobs,
        overwrite=parsed.overwrite,
    )
    return predict(settings, order, parsed.url, parsed.model if parsed.url else None)


def _given(parsed: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags that were given, by the names of the settings."""
    return {name: value for name in names if (value := getattr(parsed, name)) is not None}


def _status(error: SegmentError) -> int:
    return 2 if isinstance(error, SettingsError) else 1


def _serve(flags: Mapping[str, Any]) -> int:
    settings = load_settings(flags)
    logs.configure(settings.log_level, settings.log_format)
    workers = [{**flags, **own} for own in plan(settings)]
    # First of all: loading a model only to find the port taken wastes everybody's time.
    with _bind(settings.host, settings.port) as listener:
        if len(workers) > 1:
            return supervise(listener, workers, settings.deadline_s)
        _answer(listener, load_settings(workers[0]))
    return 0


def _work(listener_fd: int, parent_fd: int) -> int:
    """Be one of several processes that `serve` started; their reasons are told by it, once."""
    parent = Parent(parent_fd)
    try:
        settings = load_settings(parent.overrides)
        logs.configure(settings.log_level, settings.log_format, parent.number)
        with socket.socket(fileno=listener_fd) as listener:
            siblings = Siblings(parent.folder, parent.number)
            _answer(listener, settings, parent.tell_ready, siblings)
    except SegmentError as exc:
        parent.tell_error(str(exc))
        return _status(exc)
    return 0


def _answer(
    listener: socket.socket,
    settings: Settings,
    on_ready: Callable[[], None] = lambda: None,
    peers: Peers | None = None,
) -> None:
    """Serve in this process until SIGTERM or SIGINT; ``on_ready`` is called when it answers."""
    _keep_freed_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_on(listener, settings, on_ready, peers))


def _keep_freed_memory() -> None:
    """Have glibc keep the buffers of one photo for the next; elsewhere this does nothing.

    Left alone it gives each buffer of half a megabyte back to the kernel, and taking it again
    page by page is half the time of resizing a 500x375 photo. Larger ones are still given back.
    Source: glibc, ``mallopt(3)``.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BUFFER_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises `SettingsError` if that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            undo.pop_all()
    except OSError as exc:
        raise SettingsError(f"cannot listen on {host}:{port}: {exc.strerror or exc}") from exc
    return listener


async def _serve_on(
    listener: socket.socket,
    settings: Settings,
    on_ready: Callable[[], None],
    peers: Peers | None,
) -> None:
    """Serve until SIGTERM or SIGINT, and finish what is in flight.

    The lifespan runs here and not in uvicorn, which would wrap a start's one-line error into a
    traceback and three lines of its own.
    """
    app = create_app(settings, peers=peers)
    async with app.router.lifespan_context(app) as lifespan_state:
        state: LifespanState = lifespan_state  # type: ignore[assignment]
        config = uvicorn.Config(
            with_state(app, state),
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.deadline_s) + 5,
        )
        host, port = listener.getsockname()[:2]
        try:
            # Two starting at once may both have bound the port; only one may listen.
            listener.listen(config.backlog)
        except OSError as exc:
            raise SettingsError(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def on_start() -> None:
            _log.info("listening", url=url)
            on_ready()

        server = _Server(config, on_start=on_start, on_stop=state["service"].begin_draining)
        await server.serve(sockets=[listener])
    _log.info("stopped")


class _Server(uvicorn.Server):
    """uvicorn, telling when it answers, and of a stop before it waits for what is in flight."""

    def __init__(
        self, config: uvicorn.Config, on_start: Callable[[], None], on_stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_start = on_start
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then say so: from here on signals stop it in order."""
        await super().startup(sockets)
        self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT.

        uvicorn raises the signal again once it has stopped, which would end the process before
        the lifespan took down what it owns.
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


if __name__ == "__main__":
    sys.exit(main())
