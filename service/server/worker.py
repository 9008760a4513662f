"""Both ends of the link between a supervisor and one of its workers.

The link is a socket pair. The supervisor sends the worker's settings as a line of JSON, and later
an empty line for each reload of the models. The worker sends ``{"ready": true}`` or
``{"error": "why it cannot start"}``, then an empty line as each sign of life. When the supervisor
dies, for whatever reason, the socket closes and the worker stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from service.errors import SettingsError

WORKER_COMMAND: Final = "worker"


class WorkerProcess:
    """One worker, as its supervisor sees it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.pid = process.pid
        self.ready = False
        self.signs_of_life = 0
        self.error: str | None = None
        self._process = process
        self._reader = reader
        self._writer = writer
        self._ready_at = 0.0

    @classmethod
    async def start(
        cls,
        index: int,
        overrides: Mapping[str, Any],
        listener: socket.socket,
        folder: Path,
        restarts: Mapping[str, int],
    ) -> WorkerProcess:
        """Start a worker the way this process was started, so that it finds the same package."""
        own_arguments = len(sys.argv) - 1
        command = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - own_arguments]]
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo, theirs:
            undo.enter_context(ours)
            inherited = (listener.fileno(), theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                *command,
                WORKER_COMMAND,
                *map(str, inherited),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=inherited,
                # A terminal's Ctrl-C is for the supervisor, which passes it on.
                process_group=0,
            )
            undo.pop_all()
        reader, writer = await asyncio.open_connection(sock=ours)
        message = {
            "worker": index,
            "settings": overrides,
            "folder": str(folder),
            "restarts": restarts,
        }
        writer.write(json.dumps(message).encode() + b"\n")
        return cls(process, reader, writer)

    @property
    def served_s(self) -> float:
        """Seconds since it became ready; 0 before."""
        return time.monotonic() - self._ready_at if self.ready else 0.0

    async def ended(self) -> int:
        """Read the worker's messages until it exits; returns the status, or minus the signal."""
        # A worker that dies before it has read its settings resets the connection.
        with contextlib.suppress(ConnectionError):
            async for line in self._reader:
                self.signs_of_life += 1
                if line.strip():
                    self.error = json.loads(line).get("error")
                    self.ready = self.error is None
                    self._ready_at = time.monotonic()
        status = await self._process.wait()
        self._writer.close()
        return status

    def reload(self) -> None:
        """Have the worker reload its models; one that is starting does so once it serves."""
        self._writer.write(b"\n")

    def send_signal(self, number: int) -> None:
        """Send the worker a signal, if it is still running."""
        # Not asyncio's method: it polls first, and may take the exit status that `ended` awaits.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Parent:
    """A worker's supervisor, as the worker sees it.

    ``number``: the worker's own; ``overrides``: for `load_settings`; ``folder``: where it finds its
    peers; ``restarts``: its restarts so far, by cause. Once this object exists, the process gets
    SIGHUP for each reload of the models, and SIGTERM when the supervisor dies. Raises
    `SettingsError` if there is no supervisor.
    """

    def __init__(self, fd: int) -> None:
        try:
            self._connection = socket.socket(fileno=fd)
            self._lines = self._connection.makefile("rb")
            message = json.loads(self._lines.readline())
        except (OSError, ValueError) as exc:
            raise SettingsError(f"{WORKER_COMMAND}: only `serve` starts it") from exc
        self.number: int = message["worker"]
        self.overrides: dict[str, Any] = message["settings"]
        self.folder = Path(message["folder"])
        self.restarts: dict[str, int] = message["restarts"]
        self._died = False
        # A thread, because this must also work while a model is loading.
        threading.Thread(target=self._follow, name="parent", daemon=True).start()

    def report_ready(self) -> None:
        """Report that this worker serves requests, and shuts down gracefully on a signal."""
        self._report(ready=True)

    def report_alive(self) -> None:
        """Report that this worker's event loop is running. Never blocks."""
        with contextlib.suppress(OSError):  # the supervisor has died, or hangs
            self._connection.send(b"\n", socket.MSG_DONTWAIT)

    def report_error(self, line: str) -> None:
        """Report why this worker cannot start."""
        self._report(error=line)

    def _report(self, **message: object) -> None:
        with contextlib.suppress(OSError):  # the supervisor has died: the thread handles that
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def tidy_up(self) -> None:
        """Remove the folder that a killed supervisor left behind."""
        if self._died:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _follow(self) -> None:
        with contextlib.suppress(OSError):
            for _ in self._lines:
                os.kill(os.getpid(), signal.SIGHUP)
        self._died = True
        os.kill(os.getpid(), signal.SIGTERM)
