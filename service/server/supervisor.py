"""Several workers behind one port: starts, watches, restarts and stops them.

The supervisor binds the port and never accepts connections. Each worker is a fresh process, not a
fork, because neither CUDA nor threads survive a fork. All workers inherit one listening socket, so
connections wait in its queue while a worker loads its model or restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from service.errors import SegmentError, SettingsError
from service.server.watchdog import EXIT_STATUS
from service.server.worker import WorkerProcess
from service.settings import Settings, default_memory_mb
from service.system import available_cores
from service.telemetry.metrics import DIED, HUNG

# Exit statuses of a process that refuses to start; any other is a crash.
_REFUSALS: Final = {1: SegmentError, 2: SettingsError}

# Beyond the deadline and uvicorn's own limit for requests in flight, a worker hangs.
_GRACE_S: Final = 10.0

_FIRST_DELAY_S: Final = 0.5
_LONGEST_DELAY_S: Final = 30.0
_STEADY_S: Final = 10.0

# A worker that hangs ends itself and logs why. The supervisor waits longer than that.
_PATIENCE: Final = 1.5
_LOOKS: Final = 10

_log: Any = structlog.get_logger("service.supervisor")


def plan(settings: Settings) -> list[dict[str, Any]]:
    """Return each worker's own settings, in the order of their numbers.

    Several workers share memory and cores evenly unless the settings say otherwise.
    """
    devices = [f"cuda:{number}" for number in settings.gpu_numbers] or [settings.device]
    count = len(devices) * settings.processes
    own: dict[str, Any] = {"processes": 1, "gpus": None}
    if count > 1:
        cores = max(1, available_cores() // count)
        own["threads"] = settings.threads or cores
        own["memory_mb"] = (settings.memory_mb or default_memory_mb()) // count
        # By default a process with a GPU decodes on all cores.
        if devices[0].startswith("cuda"):
            own["decode_workers"] = settings.decode_workers or cores
    return [{**own, "device": device} for device in devices for _ in range(settings.processes)]


def supervise(
    listener: socket.socket, workers: Sequence[Mapping[str, Any]], settings: Settings
) -> int:
    """Serve on ``listener`` with one process for each of ``workers`` until SIGTERM or SIGINT.

    ``workers``: each worker's overrides for `load_settings`. SIGHUP makes all workers reload their
    models. Returns the exit status: 0 if all stopped cleanly. Raises `SegmentError` or
    `SettingsError` if a worker cannot start.
    """
    # For the workers' sockets; accessible to their user only.
    with tempfile.TemporaryDirectory(prefix="fcn-segment-") as folder:

        async def start(index: int, restarts: Mapping[str, int]) -> WorkerProcess:
            return await WorkerProcess.start(
                index, workers[index], listener, Path(folder), restarts
            )

        supervisor = Supervisor(
            start,
            len(workers),
            grace_s=settings.deadline_s + _GRACE_S,
            patience_s=_PATIENCE * settings.hung_after_s,
            on_stop=listener.close,
        )
        return asyncio.run(supervisor.run())


class Backoff:
    """How long to wait before a worker is restarted."""

    def __init__(self) -> None:
        self._deaths = 0

    def next_s(self, served_s: float) -> float:
        """Seconds to wait after the exit of a worker that had been ready for ``served_s`` seconds.

        0 at first, and after `_STEADY_S` of service; then half a second, doubling up to half a
        minute.
        """
        if served_s >= _STEADY_S:
            self._deaths = 0
        self._deaths += 1
        if self._deaths == 1:
            return 0.0
        # The exponent is capped to avoid an overflow.
        return min(_FIRST_DELAY_S * 2.0 ** min(self._deaths - 2, 16), _LONGEST_DELAY_S)


class Worker(Protocol):
    """What the supervisor needs of a worker; tests pass their own."""

    pid: int
    ready: bool
    error: str | None
    signs_of_life: int

    @property
    def served_s(self) -> float:
        """Seconds since it became ready; 0 before."""

    async def ended(self) -> int:
        """Wait until it exits; returns the exit status, or minus the signal that killed it."""

    def reload(self) -> None:
        """Have it reload its models."""

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still running."""


class Supervisor:
    """Keeps ``count`` workers alive until it is stopped.

    ``start`` starts the worker of a number; its second argument is the worker's restarts so far by
    cause, `DIED` or `HUNG`, for its metrics. ``on_stop`` is called once when a stop begins. Workers
    that are still running ``grace_s`` seconds later are killed. So is a ready worker that gives no
    sign of life for ``patience_s`` seconds.
    """

    def __init__(
        self,
        start: Callable[[int, Mapping[str, int]], Awaitable[Worker]],
        count: int,
        *,
        grace_s: float,
        patience_s: float,
        on_stop: Callable[[], None],
    ) -> None:
        self._start = start
        self._count = count
        self._grace_s = grace_s
        self._patience_s = patience_s
        self._on_stop = on_stop
        self._workers: dict[int, Worker] = {}
        self._stopping = asyncio.Event()
        self._refusal: SegmentError | None = None
        self._clean = True

    async def run(self) -> int:
        """Run until stopped; returns the exit status. Raises the error of a failed first start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        async with asyncio.TaskGroup() as group:
            for index in range(self._count):
                group.create_task(self._keep(index))
        if self._refusal is not None:
            raise self._refusal
        _log.info("all workers stopped")
        return 0 if self._clean else 1

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Forward a signal to the workers, which drain, and restart none of them."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._on_stop()
            asyncio.get_running_loop().call_later(self._grace_s, self._kill)
        for worker in self._workers.values():
            # A starting worker has no handlers yet; SIGINT would make it print a traceback.
            worker.send_signal(number if worker.ready else signal.SIGTERM)

    def reload(self) -> None:
        """Have all workers reload their models."""
        for worker in self._workers.values():
            worker.reload()

    def _kill(self) -> None:
        for index, worker in self._workers.items():
            _log.error("worker hangs and is killed", worker=index, pid=worker.pid)
            worker.send_signal(signal.SIGKILL)

    async def _keep(self, index: int) -> None:
        """Restart a worker whenever it exits; stop all workers if its first start fails."""
        backoff = Backoff()
        restarts = Counter({DIED: 0, HUNG: 0})
        first = True
        while not self._stopping.is_set():
            end = await self._run_once(index, restarts)
            log = _log.bind(worker=index, **end.facts())
            if self._stopping.is_set():
                log.info("worker exited")
                self._clean &= end.clean
            elif first and end.status in _REFUSALS:
                reason = end.reason or f"worker {index} exited with status {end.status}"
                self._refusal = _REFUSALS[end.status](reason)
                self.stop()
            else:
                restarts[HUNG if end.hung else DIED] += 1
                delay_s = backoff.next_s(end.served_s)
                log.warning("worker exited", restart_in_s=delay_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), delay_s)
            first = False

    async def _run_once(self, index: int, restarts: Mapping[str, int]) -> _End:
        try:
            worker = await self._start(index, restarts)
        except OSError as exc:  # out of memory or processes: handled as an exit
            return _End(None, 1, f"cannot start worker {index}: {exc.strerror or exc}")
        self._workers[index] = worker
        _log.info("worker started", worker=index, pid=worker.pid)
        if self._stopping.is_set():  # the signal arrived while the worker was starting
            worker.send_signal(signal.SIGTERM)
        watch = asyncio.create_task(self._watch(index, worker))
        status = await worker.ended()
        # The watch finishes only if it has killed the worker.
        hung = watch.done() or status == EXIT_STATUS
        watch.cancel()
        del self._workers[index]
        return _End(worker.pid, status, worker.error, worker.served_s, hung)

    async def _watch(self, index: int, worker: Worker) -> None:
        """Kill a worker that gives no sign of life.

        This counts looks, not seconds: if all processes are suspended for a while, no sign of life
        is missed.
        """
        missed = 0
        while missed < _LOOKS:
            before = worker.signs_of_life
            await asyncio.sleep(self._patience_s / _LOOKS)
            missed = missed + 1 if worker.ready and worker.signs_of_life == before else 0
        _log.critical("worker hangs and is killed", worker=index, pid=worker.pid)
        worker.send_signal(signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _End:
    """How a worker exited. ``status``: its exit status, or minus the signal that killed it."""

    pid: int | None
    status: int
    reason: str | None
    served_s: float = 0.0
    hung: bool = False

    @property
    def clean(self) -> bool:
        """Whether a stopped worker shut down cleanly. SIGTERM kills one that does not serve."""
        return self.status in (0, -signal.SIGTERM)

    def facts(self) -> dict[str, Any]:
        """Values for the log."""
        facts: dict[str, Any] = {"pid": self.pid, "status": self.status}
        if self.status < 0:
            facts = {"pid": self.pid, "signal": signal.strsignal(-self.status)}
        return {**facts, "reason": self.reason} if self.reason is not None else facts
