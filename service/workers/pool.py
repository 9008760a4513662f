"""A pool of image workers over asyncio.

A worker has one task at a time. When one is free, it gets the task that finishes a photo before the
one that begins another, and the earlier before the later. A client whose slow tasks occupy all
workers but one gets no other until one of them ends. A worker that dies, exceeds a limit or is
no longer waited for is replaced; nothing else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Self

import structlog

from service import errors
from service.errors import (
    SegmentError,
    TooExpensive,
    UndecodableImage,
    WorkerLost,
    WorkersUnavailable,
)
from service.workers.channel import Memory, Part, receive, size_of
from service.workers.replies import Check, read_reply
from service.workers.template import TEMPLATE, Forked
from service.workers.worker import Order, Task

Lost = Callable[[str], None]

# Copying more than this would stop the event loop for milliseconds: a thread does it.
_LOOP_BYTES: Final = 2 * 2**20
_RETRY_S: Final = 1.0

SLOW_S: Final = 0.25
"""Seconds after which a task is a slow one."""

_ATTEMPTS: Final = 2

_CPU_SIGNALS: Final = frozenset({signal.SIGPROF, signal.SIGXCPU})
_CRASHES: Final = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
)

_log: Any = structlog.get_logger("service.workers")


class Rank(IntEnum):
    """The order of tasks that wait: a photo that is finished frees its memory."""

    FINISH = 0
    BEGIN = 1


@dataclass(frozen=True, slots=True)
class Done:
    """A task's answer. ``cpu_s`` and ``run_s``: CPU and wall seconds that it took."""

    facts: Mapping[str, Any]
    parts: Sequence[bytes]
    cpu_s: float
    run_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What one task may use: seconds of CPU time, of wall time, and bytes of memory."""

    cpu_s: float
    wall_s: float
    memory_bytes: int


class _Died(Exception):
    """The worker ended under its task. ``status``: its wait status, None if unknown."""

    def __init__(self, status: int | None, *, too_slow: bool) -> None:
        super().__init__(status)
        self.status = status
        self.too_slow = too_slow


@dataclass(eq=False)
class _Worker:
    """A worker and this end of its channel."""

    process: Forked
    control: socket.socket
    memory: Memory
    reply: asyncio.Future[bytes] | None = None
    client: str | None = None
    since_s: float = 0.0
    too_slow: bool = False

    def close(self) -> None:
        """Release the descriptors; the worker ends, if it has not yet."""
        self.control.close()
        self.memory.close()
        os.close(self.process.handle)


@dataclass(order=True, slots=True)
class _Waiting:
    rank: Rank
    number: int
    client: str | None = field(compare=False)
    worker: asyncio.Future[_Worker] = field(compare=False)


class WorkerPool:
    """``size`` workers. ``on_lost`` is called with the reason for each worker that was lost.

    Belongs to the event loop that opens it.
    """

    def __init__(self, size: int, on_lost: Lost = lambda reason: None) -> None:
        self.size = size
        self._on_lost = on_lost
        self._free: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        # One for each task in a worker's hands, done when the worker is free or replaced.
        self._in_hand: set[asyncio.Future[None]] = set()
        self._closed = False
        self._failing = False

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, size: int, on_lost: Lost = lambda reason: None) -> AsyncIterator[Self]:
        """A pool whose workers run. Raises `WorkersUnavailable`."""
        pool = cls(size, on_lost)
        try:
            for _ in range(size):
                pool._add(await asyncio.to_thread(_start))
            yield pool
        finally:
            await pool._close()

    @property
    def stranded(self) -> bool:
        """Whether no worker runs and the last attempt to start one failed."""
        return self._failing and not self._alive

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.process.pid for worker in self._alive]

    @property
    def all_pids(self) -> list[int]:
        """The process ids of this process, its template and the workers."""
        return [os.getpid(), TEMPLATE.pid, *self.pids]

    async def run(
        self,
        task: Task,
        parts: Sequence[Part],
        limits: Limits,
        rank: Rank = Rank.BEGIN,
        client: str | None = None,
        check: Check | None = None,
    ) -> Done:
        """Run a task in a worker. Cancelling ends the worker, and with it the work.

        ``client``: whose task it is, None for one that shares with nobody; ``check``: what the
        answer must pass.

        Raises what the task raises, `TooExpensive` if it exceeds a limit, `UndecodableImage` if it
        crashes the worker or ``check`` refuses the answer, `WorkerLost` if two workers were lost
        through no fault of its own, or `Draining` if the pool is closed.
        """
        order = pickle.dumps(Order(task, limits.cpu_s, limits.memory_bytes))
        message = [order, *parts]
        for _ in range(_ATTEMPTS):
            worker = await self._take(rank, client)
            worker.client, worker.since_s = client, time.monotonic()
            try:
                return await self._ask(worker, message, limits, check)
            except _Died as died:
                error = _blame(died, limits)
                reason = "killed" if error is None else type(error).__name__
                _log.warning("image worker lost", reason=reason, status=died.status)
                self._on_lost(reason)
                if error is not None:
                    raise error from None
        raise WorkerLost("the process that worked on this photo was lost, and so was the next")

    async def _take(self, rank: Rank, client: str | None) -> _Worker:
        if self._closed:
            raise _closing()
        if self._free and not self._occupies(client):
            return self._free.pop()
        turn: asyncio.Future[_Worker] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(rank, next(self._numbers), client, turn)
        self._waiting.append(waiting)
        try:
            return await waiting.worker
        except asyncio.CancelledError:
            given = waiting.worker
            if given.done() and not given.cancelled() and given.exception() is None:
                self._give(given.result())
            raise

    def _give(self, worker: _Worker) -> None:
        """Hand a free worker to the first task that waits."""
        if self._closed:
            self._replace(worker)
            return
        worker.client = None
        self._free.append(worker)
        for waiting in sorted(self._waiting):
            if not self._free:
                return
            if waiting.worker.done():
                self._waiting.remove(waiting)
            elif not self._occupies(waiting.client):
                self._waiting.remove(waiting)
                waiting.worker.set_result(self._free.pop())

    def _occupies(self, client: str | None) -> bool:
        """Whether a client's slow tasks occupy all workers but one, which is left to others."""
        if client is None or self.size == 1:
            return False
        before_s = time.monotonic() - SLOW_S
        slow = sum(one.client == client and one.since_s < before_s for one in self._alive)
        return slow >= self.size - 1

    async def _ask(
        self, worker: _Worker, message: Sequence[Part], limits: Limits, check: Check | None
    ) -> Done:
        """Give a worker its task and await the answer. Afterwards the worker is free or replaced.

        Raises `_Died` or what the task raised.
        """
        loop = asyncio.get_running_loop()
        started_s = time.monotonic()
        timer: asyncio.TimerHandle | None = None
        healthy = False
        in_hand: asyncio.Future[None] = loop.create_future()
        self._in_hand.add(in_hand)
        try:
            size = sum(map(size_of, message))
            if size > _LOOP_BYTES:
                # Not cancelled half-way: the file must not be written after its worker's end.
                packet = await _uninterrupted(asyncio.to_thread(worker.memory.put, message))
            else:
                packet = worker.memory.put(message)
            worker.reply = loop.create_future()
            if worker not in self._alive:
                raise _Died(None, too_slow=False)
            timer = loop.call_later(limits.wall_s, self._too_slow, worker)
            try:
                worker.control.send(packet)
            except OSError as exc:
                raise _Died(await self._status(worker), too_slow=False) from exc
            reply = await worker.reply
            if not reply:
                raise _Died(await self._status(worker), too_slow=worker.too_slow)
            lengths = worker.memory.lengths_of(reply, limits.memory_bytes + _LOOP_BYTES)
            if sum(lengths) > _LOOP_BYTES:
                content = await _uninterrupted(asyncio.to_thread(worker.memory.get, lengths))
            else:
                content = worker.memory.get(lengths)
            answer = read_reply(content, check)
            healthy = True
        except ValueError as exc:
            # What it decoded has taken it over, or a fault of ours: both end with the worker.
            _log.error("an image worker sent nonsense", reason=str(exc))
            raise UndecodableImage("the image crashed its decoder") from exc
        finally:
            worker.reply = None
            if timer is not None:
                timer.cancel()
            if healthy:
                self._give(worker)
            else:
                self._replace(worker)
            self._in_hand.remove(in_hand)
            in_hand.set_result(None)
        if answer.error is not None:
            raise answer.error
        run_s = time.monotonic() - started_s
        return Done(answer.facts, answer.parts, answer.cpu_s, run_s)

    def _too_slow(self, worker: _Worker) -> None:
        worker.too_slow = True
        worker.process.kill()

    def _readable(self, worker: _Worker) -> None:
        """A worker has answered or ended."""
        try:
            packet = receive(worker.control)
        except BlockingIOError:
            return
        if worker.reply is not None and not worker.reply.done():
            if not packet:
                self._forget(worker)
            worker.reply.set_result(packet)
        elif not packet:
            if worker in self._free:
                self._free.remove(worker)
                _log.warning("image worker lost", reason="idle")
                self._on_lost("killed")
                self._replace(worker)
            else:
                self._forget(worker)

    def _add(self, worker: _Worker) -> None:
        self._alive.add(worker)
        loop = asyncio.get_running_loop()
        loop.add_reader(worker.control.fileno(), self._readable, worker)
        self._give(worker)

    def _forget(self, worker: _Worker) -> None:
        if worker in self._alive:
            self._alive.remove(worker)
            asyncio.get_running_loop().remove_reader(worker.control.fileno())

    def _replace(self, worker: _Worker) -> None:
        """End a worker and start another."""
        self._forget(worker)
        worker.process.kill()
        self._in_background(self._bury_and_start(worker))

    async def _bury_and_start(self, worker: _Worker) -> None:
        await self._status(worker)
        worker.close()
        while not self._ended():
            try:
                started = await asyncio.to_thread(_start)
            except WorkersUnavailable as exc:
                self._failing = True
                _log.error("image worker not started", reason=str(exc))
                await asyncio.sleep(_RETRY_S)
                continue
            self._failing = False
            if not self._ended():
                self._add(started)
                return
            await asyncio.to_thread(_end, started)

    def _ended(self) -> bool:
        return self._closed

    async def _status(self, worker: _Worker) -> int | None:
        """End a worker, if it has not ended yet; returns its wait status."""
        # One that only closed its socket would keep the template waiting.
        worker.process.kill()
        known: int | None = await asyncio.to_thread(TEMPLATE.status, worker.process.pid)
        return known

    def _in_background(self, work: Any) -> None:  # noqa: ANN401
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        """End all workers. Tasks that wait or run fail with `Draining`."""
        self._closed = True
        for waiting in self._waiting:
            if not waiting.worker.done():
                waiting.worker.set_exception(_closing())
        self._waiting.clear()
        free, self._free = self._free, []
        for worker in [*self._alive]:
            self._forget(worker)
            if worker.reply is not None and not worker.reply.done():
                worker.reply.set_exception(_closing())
        for worker in free:
            await asyncio.to_thread(_end, worker)
        # So that a task that has just been given a worker takes it in its hands.
        await asyncio.sleep(0)
        while self._in_hand or self._tasks:
            await asyncio.wait([*self._in_hand, *self._tasks])


def _closing() -> errors.Draining:
    return errors.Draining("the service is shutting down")


def _start() -> _Worker:
    """Start a worker. Raises `WorkersUnavailable`."""
    with contextlib.ExitStack() as undo:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            with theirs:
                memory = Memory.create()
                undo.callback(memory.close)
                process = TEMPLATE.fork(theirs, memory.number)
        except OSError as exc:  # such as no file descriptor: it is tried again
            raise WorkersUnavailable(
                f"no image worker could be started: {exc.strerror or exc}"
            ) from exc
        undo.pop_all()
    ours.setblocking(False)
    return _Worker(process, ours, memory)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    TEMPLATE.status(worker.process.pid)
    worker.close()


async def _uninterrupted(work: Any) -> Any:  # noqa: ANN401
    """Await ``work``; if cancelled meanwhile, only after it has ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # cancelled again, by a deadline and a client that is gone
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


def _blame(died: _Died, limits: Limits) -> SegmentError | None:
    """The photo's error, if a worker's end was its fault; None if it was not."""
    if died.too_slow:
        return TooExpensive(f"decoding or encoding it takes more than {limits.wall_s:g} s")
    if died.status is None or not os.WIFSIGNALED(died.status):
        return None
    ended_by = os.WTERMSIG(died.status)
    if ended_by in _CPU_SIGNALS:
        return TooExpensive("decoding and encoding it takes more CPU time than one photo may have")
    if ended_by in _CRASHES:
        return UndecodableImage("the image crashed its decoder")
    return None  # an operator killed it, or the kernel when memory ran out
