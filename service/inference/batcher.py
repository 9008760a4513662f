"""Dynamic batching over asyncio: many waiting callers, one device.

An item that comes while the device is idle runs at once. While the device is busy, items gather
in groups of one key (a shape), and when it falls idle the next batch is

1. of the group whose first item has waited ``max_wait_s`` or more, the longest first;
2. else of a group that fills a batch;
3. else of the group whose first item came first.

So nothing ever waits beside an idle device, and ``max_wait_s`` bounds how long a small group is
passed over in favour of full batches.

A device can be split: a batch that is alone gets all of it, which answers soonest, and while more
wait each gets a share, which answers most. Shares can also be ways through a device that is never
given away as a whole. Knows neither HTTP nor ONNX Runtime.
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
"""What runs a batch."""

THREAD_NAME: Final = "device"

# Batches of small shapes, and one that the machine held up, must not make the others' time.
# Source: RFC 6298, section 2, which smooths round-trip times so.
_WEIGHT_OF_LAST: Final = 1 / 8

_log: Any = structlog.get_logger("service.batcher")


@dataclass(frozen=True, slots=True)
class BatchResult(Generic[ResultT]):
    """One item's result, the seconds it waited, and the seconds its batch ran."""

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
    """What runs, and where."""

    run: Run[ItemT, ResultT]
    entries: list[_Entry[ItemT, ResultT]]
    started_s: float

    def facts(self) -> dict[str, Any]:
        """What the log says of it: how many photos, and whose."""
        requests = [entry.request_id for entry in self.entries if entry.request_id is not None]
        return {"photos": len(self.entries), "requests": requests}


class Batcher(Generic[ItemT, ResultT]):
    """Groups items into batches, and runs one on the whole device or one on each share of it.

    ``run`` takes the items of one batch, all of one key, and returns as many results in their
    order; so does each of ``shares`` with its part of the device. None for ``run`` leaves all
    batches to the shares. Each is called in a thread of its own, and always in that one.
    ``max_queue`` bounds the items that wait; ``clock`` gives seconds and never goes back;
    ``on_batch`` hears of each batch's size. Belongs to the event loop it is first used in.

    A batch that the device has no memory for fails as `Overloaded`, and from then on batches are
    at most half its size.
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
        # Each group in order of arrival; none is ever empty.
        self._groups: dict[Hashable, deque[_Entry[ItemT, ResultT]]] = {}
        self._running: dict[asyncio.Task[None], _Batch[ItemT, ResultT]] = {}
        self._dispatching = False
        self._closing = False
        self._usual_run_s: float | None = None

    @property
    def waiting(self) -> int:
        """Items that wait for the device."""
        return sum(len(group) for group in self._groups.values())

    @property
    def capacity(self) -> int:
        """Items that the device works on at once."""
        return self._max_batch * max(1, len(self._shares))

    @property
    def running_s(self) -> float:
        """Seconds that the oldest of the batches on the device has been running; 0 without any."""
        now = self._clock()
        return max((now - batch.started_s for batch in self._running.values()), default=0.0)

    def retry_after_s(self, ahead: int) -> float:
        """When so many items should be done, if runs take as long as usual; at least 1 second."""
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
            # One turn of the loop later, so that callers that arrived together run together.
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)
        try:
            return await future
        except asyncio.CancelledError:
            self._forget(entry, key)
            raise

    async def close(self) -> None:
        """Refuse new items, answer all that were taken, then end the device's thread."""
        self._closing = True
        if self._dispatching:
            self._dispatch()
        while self._running:
            await asyncio.wait(self._running)
            # A turn for what follows a batch, which may be the next.
            await asyncio.sleep(0)
        for thread in self._threads.values():
            thread.shutdown(wait=True)

    def abandon(self) -> None:
        """Refuse new items, and fail all that were taken: the device hangs."""
        self._closing = True
        waiting = [entry for group in self._groups.values() for entry in group]
        self._groups.clear()
        running = [entry for batch in self._running.values() for entry in batch.entries]
        _fail([*running, *waiting], None, lambda: InferenceFailed("the device does not answer"))

    async def call_beside(self, run: Run[ItemT, ResultT], work: Callable[[], None]) -> None:
        """Do ``work`` in the thread of ``run``: for a warm-up that is bound to the thread."""
        await asyncio.get_running_loop().run_in_executor(self._threads[run], work)

    def _dispatch(self) -> None:
        """Start batches while there are any and some of the device is free."""
        self._dispatching = False
        while (run := self._free()) and (entries := self._next_batch()):
            batch = _Batch(run, entries, self._clock())
            # In the context of none of its requests; the reference keeps it from being collected.
            task = asyncio.create_task(self._run_batch(batch), context=contextvars.Context())
            self._running[task] = batch
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._dispatch()

    def _free(self) -> Run[ItemT, ResultT] | None:
        """What the next batch may run on: all of the device, a share of it, or nothing."""
        busy = [batch.run for batch in self._running.values()]
        if not busy:
            batches = sum(-(-len(group) // self._max_batch) for group in self._groups.values())
            alone = self._run is not None and batches <= 1
            return self._run if alone or not self._shares else self._shares[0]
        if self._run in busy:
            return None
        return next((share for share in self._shares if share not in busy), None)

    def _next_batch(self) -> list[_Entry[ItemT, ResultT]]:
        """The live items to run next; empty once nothing is left."""
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
        # Whatever else the device raises, every caller of this batch must hear of it.
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
    """Tell all who still wait, each with an exception of their own."""
    for entry in entries:
        if not entry.future.done():
            raised = failure()
            raised.__cause__ = cause
            entry.future.set_exception(raised)
