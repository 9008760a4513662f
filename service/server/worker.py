"""One of several serving processes: as its supervisor sees it, and as it sees its supervisor.

A socket pair joins the two. Down it go the worker's settings, in a line of JSON, and later an empty
line whenever it is to reload its models. Up come ``{"ready": true}`` or ``{"error": "why it cannot
start"}``, and from then on empty lines, which say that the worker is alive. Its end tells a worker
that its supervisor has died, however that happened, and then the worker stops too.
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
        """Start one as this process was started, so that it finds the same package."""
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
        """Hear what it says until its end; returns the status, or minus the signal."""
        # One that dies before it has read its settings resets the connection.
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
        """Have it reload its models; one that still starts does so as soon as it serves."""
        self._writer.write(b"\n")

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        # Not asyncio's own: that polls first, and may take the status from whoever waits for it.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Parent:
    """A worker's supervisor, as the worker sees it: what it says, and whether it lives.

    ``number`` is the worker's own, ``overrides`` are for `load_settings`, in ``folder`` it meets
    the others, ``restarts`` are how often it was started anew so far, by cause. From here
    on this process gets SIGHUP when it is to reload its models, and SIGTERM when the supervisor
    dies. Raises `SettingsError` if there is none.
    """

    def __init__(self, fd: int) -> None:
        try:
            self._connection = socket.socket(fileno=fd)
            self._lines = self._connection.makefile("rb")
            message = json.loads(self._lines.readline())
        except (OSError, ValueError) as exc:
            raise SettingsError(f"{WORKER_COMMAND}: only `serve` starts one") from exc
        self.number: int = message["worker"]
        self.overrides: dict[str, Any] = message["settings"]
        self.folder = Path(message["folder"])
        self.restarts: dict[str, int] = message["restarts"]
        self._died = False
        # A thread, because this must work while a model is loading too.
        threading.Thread(target=self._obey, name="parent", daemon=True).start()

    def tell_ready(self) -> None:
        """This worker answers requests, and stops in order when it is told to."""
        self._tell(ready=True)

    def tell_alive(self) -> None:
        """This worker's event loop takes its turns. Never waits."""
        with contextlib.suppress(OSError):  # it died, or hangs itself
            self._connection.send(b"\n", socket.MSG_DONTWAIT)

    def tell_error(self, line: str) -> None:
        """This worker cannot start."""
        self._tell(error=line)

    def _tell(self, **message: object) -> None:
        with contextlib.suppress(OSError):  # it died: the thread sees to that
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def tidy_up(self) -> None:
        """Remove what a supervisor that was killed could not remove itself."""
        if self._died:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _obey(self) -> None:
        with contextlib.suppress(OSError):
            for _ in self._lines:
                os.kill(os.getpid(), signal.SIGHUP)
        self._died = True
        os.kill(os.getpid(), signal.SIGTERM)
