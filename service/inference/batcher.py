"""Dynamic batching over asyncio: many waiting callers, one device.

An item that arrives while the device is idle runs at once. While the device is busy, items gather
in groups of one key (a shape). When the device falls idle, the next batch comes from

1. the group whose first item has waited ``max_wait_s`` or more, the longest wait first;
2. otherwise a group that fills a batch;
3. otherwise the group whose first item arrived first.

So no item waits while the device is idle, and ``max_wait_s`` bounds how long full batches may
overtake a small group.

A device can be split. A batch that is alone gets the whole device, for the lowest latency. While
more batches wait, each gets a share, for the highest throughput. A device may also consist of
shares only. This module knows neither HTTP nor ONNX Runtime.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import structlog

from service.errors import (
    DeviceMemoryExhausted,
    Draining,
    InferenceFailed,
    Overloaded,
    SegmentError,
)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Run = Callable[[list[ItemT]], Sequence[ResultT]]
"""Runs a batch."""

THREAD_NAME: Final = "device"

# Weight of the latest run in the usual run time. A batch of small shapes, or one that the machine
# delayed, must not set the estimate. Source: RFC 6298, section 2, which smooths round-trip times.
_WEIGHT_OF_LAST: Final = 1 / 8

_log: Any = structlog.get_logger("service.batcher")


@dataclass(frozen=True, slots=True)
class BatchResult(Generic[ResultT]):
    """One item's result, the seconds that it waited, and the seconds that its batch ran."""

    result: ResultT
    queue_s: float
    run_s: float


@dataclass(slots=True, eq=False)
class _Entry(Generic[ItemT, ResultT]):
    item: ItemT
    future: asyncio.Future[BatchResult[ResultT]]
    arrived_s: float
    request_id: str | None


@dataclass(frozen=True, slots=True, eq=False)
class _Batch(Generic[ItemT, ResultT]):
    """A running batch."""

    run: Run[ItemT, ResultT]
    entries: list[_Entry[ItemT, ResultT]]
    started_s: float

    def facts(self) -> dict[str, Any]:
        """Return the log's fields: the number of photos, and their requests."""
        requests = [entry.request_id for entry in self.entries if entry.request_id is not None]
        return {"photos": len(self.entries), "requests": requests}


class Batcher(Generic[ItemT, ResultT]):
    """Groups items into batches, and runs one on the whole device or one on each share of it.

    ``run`` takes the items of one batch, all of one key, and returns one result per item in the
    same order. Each of ``shares`` does the same on its part of the device. If ``run`` is None, all
    batches run on the shares. Each of them has its own thread. ``max_queue`` bounds the waiting
    items; ``clock`` returns seconds and never goes back; ``on_batch`` is called with each batch's
    size. A batcher belongs to the event loop that first uses it.

    A batch that the device has no memory for fails as `Overloaded`. Later batches have at most half
    its size.
    """

    def __init__(
        self,
        run: Run[ItemT, ResultT] | None,
        *,
        shares: Sequence[Run[ItemT, ResultT]] = (),
        max_batch: int = 1,
        max_wait_s: float = 0.0,
        max_queue: int = 64,
        clock: Callable[[], float] = time.monotonic,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run = run
        self._shares = shares
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._max_queue = max_queue
        self._clock = clock
        self._on_batch = on_batch
        runs = [*shares] if run is None else [run, *shares]
        self._threads = {
            one: ThreadPoolExecutor(1, thread_name_prefix=f"{THREAD_NAME}-{number}")
            for number, one in enumerate(runs)
        }
        # Each group in order of arrival; no group is empty.
        self._groups: dict[Hashable, deque[_Entry[ItemT, ResultT]]] = {}
        self._running: dict[asyncio.Task[None], _Batch[ItemT, ResultT]] = {}
        self._dispatching = False
        self._closing = False
        self._usual_run_s: float | None = None

    @property
    def waiting(self) -> int:
        """Number of items that wait for the device."""
        return sum(len(group) for group in self._groups.values())

    @property
    def capacity(self) -> int:
        """Number of items that the device works on at once."""
        return self._max_batch * max(1, len(self._shares))

    @property
    def running_s(self) -> float:
        """Seconds that the oldest running batch has been running; 0 if none runs."""
        now = self._clock()
        return max((now - batch.started_s for batch in self._running.values()), default=0.0)

    @property
    def usual_s(self) -> float:
        """Seconds of the device that an item usually takes; 0 before the first."""
        return (self._usual_run_s or 0.0) / self.capacity

    def retry_after_s(self, ahead: int) -> float:
        """Seconds until ``ahead`` items are done, if runs take as long as usual; at least 1."""
        return max(1.0, math.ceil(ahead / self.capacity) * (self._usual_run_s or 0.0))

    async def submit(self, item: ItemT, key: Hashable) -> BatchResult[ResultT]:
        """Queue an item and wait for its result. Cancelling drops it from the queue.

        Raises `Overloaded` (queue full, nothing queued), `Draining` or `InferenceFailed` (``run``
        raised; its error is the cause).
        """
        if self._closing:
            raise Draining("the service is shutting down")
        if self.waiting >= self._max_queue:
            ahead = self.waiting + sum(len(batch.entries) for batch in self._running.values())
            raise Overloaded(f"{self.waiting} photos are waiting", self.retry_after_s(ahead))
        future: asyncio.Future[BatchResult[ResultT]] = asyncio.get_running_loop().create_future()
        request_id = structlog.contextvars.get_contextvars().get("request_id")
        entry = _Entry(item, future, self._clock(), request_id)
        self._groups.setdefault(key, deque()).append(entry)
        if not self._dispatching:
            # One loop iteration later, so that callers that arrive together run together.
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)
        try:
            return await future
        except asyncio.CancelledError:
            self._forget(entry, key)
            raise

    async def close(self) -> None:
        """Refuse new items, answer all accepted items, then end the device's threads."""
        self._closing = True
        if self._dispatching:
            self._dispatch()
        while self._running:
            await asyncio.wait(self._running)
            # The end of a batch may start the next one.
            await asyncio.sleep(0)
        for thread in self._threads.values():
            thread.shutdown(wait=True)

    def abandon(self) -> None:
        """Refuse new items and fail all accepted items: the device hangs."""
        self._closing = True
        waiting = [entry for group in self._groups.values() for entry in group]
        self._groups.clear()
        running = [entry for batch in self._running.values() for entry in batch.entries]
        _fail([*running, *waiting], None, lambda: InferenceFailed("the device does not answer"))

    async def call_beside(self, run: Run[ItemT, ResultT], work: Callable[[], None]) -> None:
        """Call ``work`` in the thread of ``run``: a warm-up may be bound to its thread."""
        await asyncio.get_running_loop().run_in_executor(self._threads[run], work)

    def _dispatch(self) -> None:
        """Start batches while there are any and part of the device is free."""
        self._dispatching = False
        while (run := self._free()) and (entries := self._next_batch()):
            batch = _Batch(run, entries, self._clock())
            # An empty context: the batch belongs to no single request. The reference in _running
            # keeps the task from being garbage-collected.
            task = asyncio.create_task(self._run_batch(batch), context=contextvars.Context())
            self._running[task] = batch
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._dispatch()

    def _free(self) -> Run[ItemT, ResultT] | None:
        """Return the function for the next batch: the whole device's, a share's, or None."""
        busy = [batch.run for batch in self._running.values()]
        if not busy:
            batches = sum(-(-len(group) // self._max_batch) for group in self._groups.values())
            alone = self._run is not None and batches <= 1
            return self._run if alone or not self._shares else self._shares[0]
        if self._run in busy:
            return None
        return next((share for share in self._shares if share not in busy), None)

    def _next_batch(self) -> list[_Entry[ItemT, ResultT]]:
        """Take the next batch from the queue; empty if no items wait."""
        while self._groups:
            key = self._pick_group()
            group = self._groups.pop(key)
            batch: list[_Entry[ItemT, ResultT]] = []
            while group and len(batch) < self._max_batch:
                entry = group.popleft()
                if not entry.future.done():
                    batch.append(entry)
            if group:
                self._groups[key] = group
            if batch:
                return batch
        return []

    def _pick_group(self) -> Hashable:
        by_arrival = sorted(self._groups, key=lambda key: self._groups[key][0].arrived_s)
        oldest = by_arrival[0]
        if self._clock() - self._groups[oldest][0].arrived_s >= self._max_wait_s:
            return oldest
        full = (key for key in by_arrival if len(self._groups[key]) >= self._max_batch)
        return next(full, oldest)

    async def _run_batch(self, batch: _Batch[ItemT, ResultT]) -> None:
        entries = batch.entries
        self._on_batch(len(entries))
        items = [entry.item for entry in entries]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._threads[batch.run], batch.run, items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} items gave {len(results)} results")
        except (DeviceMemoryExhausted, MemoryError) as exc:
            self._max_batch = max(1, len(entries) // 2)
            retry_after_s = self.retry_after_s(self.waiting)
            _log.error("no memory for a batch", reason=str(exc), **batch.facts())
            _fail(entries, exc, lambda: Overloaded("the device is short of memory", retry_after_s))
            return
        # Every caller of this batch must get an error, whatever the device raises.
        except Exception as exc:  # noqa: BLE001
            _log.exception("the batch failed", **batch.facts())
            _fail(entries, exc, lambda: InferenceFailed("the network failed on this photo's batch"))
            return
        run_s = self._clock() - batch.started_s
        usual_s = run_s if self._usual_run_s is None else self._usual_run_s
        self._usual_run_s = usual_s + _WEIGHT_OF_LAST * (run_s - usual_s)
        for entry, result in zip(entries, results, strict=True):
            if not entry.future.done():
                answer = BatchResult(result, batch.started_s - entry.arrived_s, run_s)
                entry.future.set_result(answer)

    def _forget(self, entry: _Entry[ItemT, ResultT], key: Hashable) -> None:
        group = self._groups.get(key)
        if group is not None and entry in group:
            group.remove(entry)
            if not group:
                del self._groups[key]


def _fail(
    entries: Sequence[_Entry[ItemT, ResultT]],
    cause: Exception | None,
    failure: Callable[[], SegmentError],
) -> None:
    """Set a new exception for each entry that still waits."""
    for entry in entries:
        if not entry.future.done():
            raised = failure()
            raised.__cause__ = cause
            entry.future.set_exception(raised)
