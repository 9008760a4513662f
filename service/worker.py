"""One of several serving processes: as its supervisor sees it, and as it sees its supervisor.

A socket pair joins the two. Down it go the worker's settings, in a line of JSON; up come
``{"ready": true}`` or ``{"error": "why it cannot start"}``. Its end tells a worker that its
supervisor has died, however that happened, and then the worker stops too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
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
        self.error: str | None = None
        self._process = process
        self._reader = reader
        self._writer = writer
        self._ready_at = 0.0

    @classmethod
    async def start(
        cls, index: int, overrides: Mapping[str, Any], listener: socket.socket, folder: Path
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
        message = {"worker": index, "settings": overrides, "folder": str(folder)}
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
                self.error = json.loads(line).get("error")
                self.ready = self.error is None
                self._ready_at = time.monotonic()
        status = await self._process.wait()
        self._writer.close()
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        # Not asyncio's own: that polls first, and may take the status from whoever waits for it.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Parent:
    """A worker's supervisor, as the worker sees it: what it says, and whether it lives.

    ``number`` is the worker's own, ``overrides`` are for `load_settings`, in ``folder`` it meets
    the others. From here on this process gets SIGTERM when the supervisor dies. Raises
    `SettingsError` if there is none.
    """

    def __init__(self, fd: int) -> None:
        try:
            self._connection = socket.socket(fileno=fd)
            with self._connection.makefile("rb") as lines:
                message = json.loads(lines.readline())
        except (OSError, ValueError) as exc:
            raise SettingsError(f"{WORKER_COMMAND}: only `serve` starts one") from exc
        self.number: int = message["worker"]
        self.overrides: dict[str, Any] = message["settings"]
        self.folder = Path(message["folder"])
        # A thread, because this must work while a model is loading too.
        threading.Thread(target=self._outlive, name="parent", daemon=True).start()

    def tell_ready(self) -> None:
        """This worker answers requests, and stops in order when it is told to."""
        self._tell(ready=True)

    def tell_error(self, line: str) -> None:
        """This worker cannot start."""
        self._tell(error=line)

    def _tell(self, **message: object) -> None:
        with contextlib.suppress(OSError):  # it died: the thread sees to that
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _outlive(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.recv(1)  # nothing more ever comes but the end
        os.kill(os.getpid(), signal.SIGTERM)
