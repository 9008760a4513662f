"""CPU time and memory of all the service's processes, and the clients beside an attack.

Source: proc_pid_stat(5), proc_pid_smaps_rollup(5) and memfd_create(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import numpy as np

from service.workers import template
from tests.attack.exchange import CUT, Answer, Request, exchange
from tests.benchmarks.wire import HOST, request_bytes
from tests.reliability.resources import tree

SAMPLE_EVERY_S: Final = 0.02
PROBES: Final = ("/healthz", "/readyz")
MIB: Final = 2**20

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PSS: Final = re.compile(r"^Pss: +(\d+) kB", re.MULTILINE)
_PROBE_EVERY_S: Final = 0.1
_BYSTANDER: Final = "127.0.0.77"
_BEGIN: Final = "begin"
_END: Final = "end"
_GONE: Final = (FileNotFoundError, ProcessLookupError, PermissionError)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants, with those that have ended."""
    ticks = 0
    for folder in tree(Path(f"/proc/{pid}")):
        with contextlib.suppress(*_GONE):
            # After the name, which may contain spaces: utime, stime, cutime and cstime.
            after = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += sum(map(int, after[11:15]))
    return ticks / _TICKS_PER_S


def memory_bytes(pid: int) -> int:
    """Memory of a process and its descendants.

    What they share counts once. Files in memory count too, whether they are mapped or not.
    """
    total = 0
    files: dict[int, int] = {}
    for folder in tree(Path(f"/proc/{pid}")):
        with contextlib.suppress(*_GONE):
            found = _PSS.search((folder / "smaps_rollup").read_text(encoding="ascii"))
            total += int(found[1]) * 1024 if found is not None else 0
        with contextlib.suppress(*_GONE):
            for handle in (folder / "fd").iterdir():
                with contextlib.suppress(*_GONE):
                    if str(handle.readlink()).startswith("/memfd:"):
                        status = handle.stat()
                        files[status.st_ino] = status.st_blocks * 512
    return total + sum(files.values())


def image_workers(pid: int) -> list[int]:
    """The process ids of the image workers of a service."""
    found = []
    for folder in tree(Path(f"/proc/{pid}")):
        if _is_template(folder):
            found += [int(child.name) for child in tree(folder) if child != folder]
    return sorted({*found})


def _is_template(folder: Path) -> bool:
    # Its workers have the same command line, and no child.
    with contextlib.suppress(*_GONE):
        command = (folder / "cmdline").read_bytes().split(b"\0")
        return template.__name__.encode() in command
    return False


class MemoryWatch:
    """Samples the memory of a service in a thread; ``peak_bytes`` is the highest since `reset`."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._end = threading.Event()

    @classmethod
    @contextlib.contextmanager
    def of(cls, pid: int) -> Iterator[MemoryWatch]:
        """Watch while the context lasts."""
        watch = cls(pid)
        thread = threading.Thread(target=watch._sample)
        thread.start()
        try:
            yield watch
        finally:
            watch._end.set()
            thread.join()

    def reset(self) -> None:
        """Begin again with what is used now."""
        self.peak_bytes = memory_bytes(self._pid)

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_EVERY_S):
            # Looked at first: meanwhile `reset` may lower the peak.
            found = memory_bytes(self._pid)
            self.peak_bytes = max(self.peak_bytes, found)


@dataclass(slots=True)
class Seen:
    """What clients beside an attack saw: the answers to photos, and to probes by path."""

    photos: list[Answer] = field(default_factory=list)
    probes: dict[str, list[Answer]] = field(default_factory=lambda: {path: [] for path in PROBES})

    def photo_p99_ms(self) -> float:
        """p99 latency of the photos."""
        return p99_ms(self.photos)

    def probe_p99_ms(self) -> float:
        """p99 latency of the slower probe."""
        return max(p99_ms(answers) for answers in self.probes.values())

    def statuses(self) -> dict[str, int]:
        """How often a photo had each status."""
        return dict(Counter(str(one.status) for one in self.photos))

    def failed(self) -> int:
        """The number of answers that are not 200."""
        answers = [*self.photos, *(one for found in self.probes.values() for one in found)]
        return sum(one.status != 200 for one in answers)


def p99_ms(answers: list[Answer]) -> float:
    """p99 latency from the time at which each request was due; nan without answers."""
    seconds = [one.seconds if one.status != CUT else float("inf") for one in answers]
    return 1000 * float(np.percentile(seconds, 99, method="lower")) if seconds else float("nan")


@dataclass(frozen=True, slots=True)
class _Clients:
    """Clients beside an attack: probes, and one that sends ``photo`` every ``every_s``, if any."""

    port: int
    photo: Request | None
    every_s: float

    async def run(self, over: Connection) -> Seen:
        """Send until there is something to receive from ``over``."""
        seen = Seen()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(over.fileno(), ended.set)
        async with asyncio.TaskGroup() as group:
            for path, answers in seen.probes.items():
                head = request_bytes(self.port, path, "", b"", "Connection: close")
                probe = Request(path, head)
                group.create_task(self._repeat(probe, _PROBE_EVERY_S, answers, ended))
            if self.photo is not None:
                group.create_task(self._repeat(self.photo, self.every_s, seen.photos, ended))
        return seen

    async def _repeat(
        self, request: Request, every_s: float, answers: list[Answer], ended: asyncio.Event
    ) -> None:
        due_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not ended.is_set():
                group.create_task(self._send(request, due_s, answers))
                due_s += every_s
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), max(0.0, due_s - time.monotonic()))

    async def _send(self, request: Request, due_s: float, answers: list[Answer]) -> None:
        try:
            status = (await exchange(self.port, request, source=_BYSTANDER)).status
        except OSError:  # no connection
            status = CUT
        answers.append(Answer(status, time.monotonic() - due_s))


class Bystanders:
    """An ordinary client and an orchestrator's probes, in a process of their own.

    There nothing delays their clocks. Each request has a connection of its own, and is sent when it
    is due, whether the last one has been answered or not: so no slow time is left out.
    """

    def __init__(self, commands: Connection) -> None:
        self._commands = commands

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, port: int, photo: Request | None = None, every_s: float = 0.1
    ) -> Iterator[Bystanders]:
        """Start the process; its clients wait for `watching`."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        clients = _Clients(port, photo, every_s)
        process = context.Process(target=_stand_by, args=(theirs, clients), daemon=True)
        process.start()
        try:
            yield cls(ours)
        finally:
            ours.send(_END)
            process.join()
            ours.close()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Seen]:
        """Let the clients send; what is yielded is complete when the context has ended."""
        self._commands.send(_BEGIN)
        self._commands.recv()
        seen = Seen()
        try:
            yield seen
        finally:
            self._commands.send(_END)
            found: Seen = self._commands.recv()
            seen.photos = found.photos
            seen.probes = found.probes


def _stand_by(commands: Connection, clients: _Clients) -> None:
    """The bystanders' process."""
    while commands.recv() == _BEGIN:
        commands.send(_BEGIN)
        seen = asyncio.run(clients.run(commands))
        commands.recv()
        commands.send(seen)


def loopback(number: int) -> str:
    """One of many addresses of this machine, for clients that must not count as one."""
    return f"127.0.1.{number + 1}" if number else HOST
