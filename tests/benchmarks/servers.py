"""Start a server, wait until it answers, and stop all of its processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import psutil

from tests.benchmarks import usage
from tests.benchmarks.bench import ROOT
from tests.benchmarks.load import Load, Measurement, measure
from tests.benchmarks.wire import HOST, Answer, Connection, multipart, request_bytes

_START_TIMEOUT_S: Final = 180.0
_STOP_TIMEOUT_S: Final = 10.0

# No peer sends telemetry, checks for updates or logs every request.
_QUIET: Final = {
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "RAY_AUTH_MODE": "disabled",  # it would leave a token in the user's home
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(ROOT),
}


@dataclass(frozen=True, slots=True)
class Side:
    """A contender: one of the compared servers.

    ``command`` may contain ``{port}``. ``field`` is the name of its endpoint's form field.
    ``ready`` is the path of its readiness check; without one it is ready once it answers a photo.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    field: str = "image"
    path: str = "/segment"
    ready: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    """A started side. ``start_s``: seconds from its start until it was ready."""

    side: Side
    port: int
    pid: int
    start_s: float

    def closed(
        self,
        photos: Sequence[Path],
        connections: int,
        seconds: float,
        *,
        warm_up_s: float = 1.0,
        requests: int = 100_000,
        paths: tuple[str, ...] = (),
        generators: int = 1,
    ) -> Measurement:
        """Measure a closed loop; the load generators share the connections."""
        wanted = self._load(photos, connections, seconds)
        load = replace(wanted, warm_up_s=warm_up_s, requests=requests, paths=paths or wanted.paths)
        return measure(load, generators)

    def open(self, photos: Sequence[Path], rate_per_s: float, seconds: float) -> Measurement:
        """Measure an open loop."""
        return measure(replace(self._load(photos, 64, seconds), rate_per_s=rate_per_s))

    def _load(self, photos: Sequence[Path], connections: int, seconds: float) -> Load:
        return Load(
            port=self.port,
            paths=(self.side.path,),
            field=self.side.field,
            photos=tuple(map(str, photos)),
            connections=connections,
            seconds=seconds,
            pid=self.pid,
        )

    def is_ready(self, photo: Path) -> None:
        """Ask once whether it is ready. Raises the same errors as `answer`."""
        if self.side.ready:
            self._exchange(request_bytes(self.port, self.side.ready))
        else:
            self.answer(photo)

    def answer(self, photo: Path) -> bytes:
        """The answer to one photo. Raises `OSError`, `EOFError` or `RuntimeError`."""
        form = multipart(self.side.field, photo.read_bytes())
        return self._exchange(request_bytes(self.port, self.side.path, *form))

    def _exchange(self, request: bytes) -> bytes:
        status, _, body = asyncio.run(_exchange(self.port, request))
        if status != 200:
            raise RuntimeError(f"{self.side.name} answers {status}: {body[:300]!r}")
        return body


@contextlib.contextmanager
def running(side: Side, photo: Path, logs: Path) -> Iterator[Running]:
    """Start a side on a free port, wait until it is ready, and stop it at the end.

    Its output goes to a file in ``logs``. Raises `RuntimeError` if it exits or never gets ready.
    """
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{side.name.replace(' ', '_').replace('+', 'and')}.log"
    # The path must be short, because Ray creates Unix sockets in it.
    scratch = tempfile.TemporaryDirectory(prefix="b-", ignore_cleanup_errors=True)
    with scratch as folder, log.open("ab") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [part.format(port=port) for part in side.command],
            cwd=ROOT,
            env={**os.environ, **_QUIET, "TMPDIR": folder, "BENTOML_HOME": folder}
            | dict(side.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_for_answer(Running(side, port, process.pid, 0.0), process, photo, log)
            yield Running(side, port, process.pid, time.perf_counter() - started)
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and all of its descendants: SIGTERM first, then SIGKILL.

    The tree is read before, because daemons that outlive their parent (Ray's) drop out of it.
    """
    everyone = usage.tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everyone, timeout=_STOP_TIMEOUT_S)


def free_port() -> int:
    """A port on which nothing is listening."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_answer(
    server: Running, process: subprocess.Popen[bytes], photo: Path, log: Path
) -> None:
    deadline = time.perf_counter() + _START_TIMEOUT_S
    reason: Exception | None = None
    while time.perf_counter() < deadline and process.poll() is None:
        try:
            server.is_ready(photo)
        except (OSError, EOFError, RuntimeError, TimeoutError) as exc:
            reason = exc
            time.sleep(0.02)
        else:
            return
    tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise RuntimeError(f"{server.side.name} did not get ready ({reason}):\n{tail}")


async def _exchange(port: int, request: bytes) -> Answer:
    connection = Connection(port)
    try:
        async with asyncio.timeout(60):
            return await connection.exchange(request)
    finally:
        connection.close()
