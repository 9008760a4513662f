"""The data path of one photo, from a request's body to an encoded answer.

Image workers decode and encode (see `service.jobs`), the network runs in the batcher's threads, and
the event loop only waits. Memory is reserved before it is needed: see `service.memory`.
"""

from __future__ import annotations

import asyncio
import math
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import structlog

from service.artefact.contract import ModelContract
from service.backlog import Backlog, Expected
from service.errors import DeadlineExceeded, Overloaded, TooExpensive
from service.inference.batcher import BatchResult
from service.inference.engine import Engine, Output
from service.inference.engines import Engines
from service.inference.lanes import DeviceTask, Upsampled
from service.jobs.base import Finish, Grant, Job, Prepare
from service.jobs.checks import check_finished, check_prepared, geometry_of
from service.memory import Lease, MemoryAccount
from service.schemas import ModelName
from service.system import give_back_freed
from service.telemetry.metrics import Metrics
from service.telemetry.timings import Timings
from service.workers.channel import Part, array
from service.workers.pool import Done, Limits, Rank, WorkerPool
from service.workers.replies import Check
from service.workers.worker import CheckedTask, Task

SMALL_BYTES: Final = 24 * 2**20
"""Memory that each photo may have in a worker without asking: enough for three megapixels."""

IDLE_S: Final = 10.0
"""Seconds without a photo after which freed memory is given back to the operating system."""

# The part of the deadline that accepted photos may need by estimate: an estimate may be wrong.
_FILLED: Final = 0.7
# A task that waits for something takes no CPU time: it ends after this many times its CPU time.
_WALL_PER_CPU: Final = 3.0
_LEAST_CPU_S: Final = 0.1

_log: Any = structlog.get_logger("service.segmenter")


@dataclass(frozen=True, slots=True)
class Result:
    """A job's answer, the model that segmented the photo, and the time of each stage.

    ``facts``: what the job says about ``content``.
    """

    content: bytes
    facts: Mapping[str, Any]
    model: ModelName
    timings: Timings


@dataclass(frozen=True, slots=True)
class PhotoLimits:
    """Limits of one photo.

    ``max_pixels``: by its header; ``max_side``: longest side that the network sees, unless the
    model's own is longer; ``cpu_s``: CPU seconds of decoding and encoding together;
    ``deadline_s``: seconds until the answer.
    """

    max_pixels: int
    max_side: int
    cpu_s: float
    deadline_s: float


class Segmenter:
    """Runs jobs.

    ``workers`` run every stage except the network; ``memory`` is what photos and answers may take;
    ``max_in_flight``: the limit of concurrent photos.
    """

    def __init__(
        self,
        engines: Engines,
        workers: WorkerPool,
        memory: MemoryAccount,
        limits: PhotoLimits,
        *,
        max_in_flight: int,
        metrics: Metrics | None = None,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.memory = memory
        self._metrics = metrics or Metrics()
        self._engines = engines
        self._workers = workers
        self._limits = limits
        self._backlog = Backlog(limits.deadline_s * _FILLED, workers.size)
        self._in_flight = 0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._pickled: dict[str, tuple[ModelContract, bytes]] = {}

    async def segment(self, job: Job, body: bytes, lease: Lease | None = None) -> Result:
        """Segment the photo in a body. ``lease`` keeps the answer's memory until it is closed.

        Raises `ImageError`, `RequestError`, `Overloaded`, `Draining`, `DeadlineExceeded`,
        `InferenceFailed`, `WorkerLost` or `ModelUnavailable`.
        """
        with self.hold():
            return await self.segment_held(job, body, lease)

    async def segment_held(self, job: Job, body: bytes, lease: Lease | None = None) -> Result:
        """`segment` in a place that the caller holds, so that no free place is needed."""
        kind = getattr(job, "view", type(job).__name__)
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                with self._backlog.photo(kind) as expected:
                    if lease is not None:
                        return await self._segment(job, body, _Use(lease, expected))
                    with self.memory.lease() as own:
                        return await self._segment(job, body, _Use(own, expected))
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no answer within {self._limits.deadline_s:g} s") from exc

    async def work(self, task: CheckedTask, body: bytes, memory_bytes: int, lease: Lease) -> Done:
        """Run a task that is no photo, such as reading a large message, in a worker.

        Raises what `segment` raises.
        """
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                await lease.take(memory_bytes)
                try:
                    limits = self._worker_limits(memory_bytes, self._limits.cpu_s)
                    return await self._workers.run(
                        task, [body], limits, Rank.BEGIN, lease.client, task.check
                    )
                finally:
                    lease.give(memory_bytes)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no answer within {self._limits.deadline_s:g} s") from exc

    async def _segment(self, job: Job, body: bytes, use: _Use) -> Result:
        timings = Timings.of_photo()
        try:
            # Each switch to a worker costs about a tenth of a millisecond: two stages per task.
            async with self._engines.use(job.model) as engine:
                prepared = await self._prepare(job, body, engine, use)
                task = _device_task(prepared)
                _, writer, shown = prepared.parts
                _record(prepared, timings)
                outcome = await _run(engine, task, timings)
                use.expected.device_s = 0.0
                # Read again: a cluster's device may have loaded another model meanwhile.
                contract = engine.model.contract
            written = await self._finish(
                job,
                [writer, shown, body if prepared.facts["decodes_again"] else b""],
                task,
                outcome,
                self._pickle(contract),
                timings,
                use,
            )
            _record(written, timings)
            (content,) = written.parts
            use.expected.done()
            use.answer(len(content))
        except BaseException:
            use.give()
            raise
        pixels = math.prod(task.geometry.photo)
        self._metrics.photo(pixels, prepared.facts["file_bytes"], timings.ms())
        model = ModelName(name=contract.name, version=contract.version)
        return Result(content, written.facts["facts"], model, timings)

    async def _prepare(self, job: Job, body: bytes, engine: Engine, use: _Use) -> Done:
        """Decode and preprocess, as soon as there is memory for it."""
        use.expected.device_s = engine.batcher.usual_s
        contract = engine.model.contract
        pickled = self._pickle(contract)
        max_side = max(self._limits.max_side, contract.working_size)
        await use.take(SMALL_BYTES)
        while True:
            grant = Grant(self._limits.max_pixels, use.granted)
            check = partial(check_prepared, contract.shapes, max_side, grant, len(body))
            prepare = Prepare(job, pickled, grant)
            done = await self._in_worker(prepare, [body], use, Rank.BEGIN, check)
            if "needs" not in done.facts:
                return done
            use.expected.grow(done.facts["pixels"])
            # Given back first: who waits for more while holding some would block others.
            use.give()
            await use.take(done.facts["needs"])

    async def _finish(
        self,
        job: Job,
        parts: Sequence[Part],
        task: DeviceTask,
        outcome: Output,
        contract: bytes,
        timings: Timings,
        use: _Use,
    ) -> Done:
        """Upsample, unless the device has done it, and encode."""
        if isinstance(outcome, Upsampled):
            shape = None
            confidence = outcome.labels.confidence
            outputs: list[Part] = [
                outcome.labels.mask,
                b"" if confidence is None else confidence,
            ]
        else:
            shape, outputs = outcome.shape, [np.ascontiguousarray(outcome)]
        finish = Finish(
            contract,
            self._limits.max_pixels,
            task.geometry,
            task.with_confidence,
            shape,
            [*timings.stages],
        )
        check = partial(check_finished, job, shape is None)
        return await self._in_worker(finish, [*parts, *outputs], use, Rank.FINISH, check)

    async def _in_worker(
        self, task: Task, parts: Sequence[Part], use: _Use, rank: Rank, check: Check
    ) -> Done:
        cpu_s = self._limits.cpu_s - use.cpu_s
        if cpu_s < _LEAST_CPU_S:
            raise TooExpensive(f"decoding it takes more than {use.cpu_s:.1f} s of CPU time")
        limits = self._worker_limits(use.granted, cpu_s)
        done = await self._workers.run(task, parts, limits, rank, use.client, check)
        use.cpu_s += done.cpu_s
        use.expected.took(done.run_s)
        return done

    def _worker_limits(self, memory_bytes: int, cpu_s: float) -> Limits:
        return Limits(cpu_s, cpu_s * _WALL_PER_CPU, memory_bytes)

    def _pickle(self, contract: ModelContract) -> bytes:
        """A contract, pickled: once for each model, not for each photo."""
        found = self._pickled.get(contract.name)
        if found is None or found[0] is not contract:
            found = self._pickled[contract.name] = contract, pickle.dumps(contract)
        return found[1]

    @property
    def pids(self) -> list[int]:
        """The process ids of this process and of all that work for it."""
        return self._workers.all_pids

    @property
    def stranded(self) -> bool:
        """Whether no image worker runs and none can be started."""
        return self._workers.stranded

    @property
    def in_flight(self) -> int:
        """The number of photos in progress."""
        return self._in_flight

    @contextmanager
    def hold(self, wanted: int = 1) -> Iterator[int]:
        """Hold up to ``wanted`` of the free places for photos in flight; yields their number.

        Raises `Overloaded` if none is free, or if there is no time for another photo.
        """
        self.require_place()
        held = min(wanted, self.max_in_flight - self._in_flight)
        self._in_flight += held
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        try:
            yield held
        finally:
            self._in_flight -= held
            if not self._in_flight:
                loop = asyncio.get_running_loop()
                self._idle_timer = loop.call_later(
                    IDLE_S, loop.run_in_executor, None, _give_back_memory
                )

    def require_place(self) -> None:
        """Raise `Overloaded` as `hold` does. Uploads call it before they read the body."""
        if self._in_flight >= self.max_in_flight:
            raise Overloaded(
                f"{self._in_flight} photos are being worked on",
                # By the deadline each of them is answered or has failed.
                min(
                    max(
                        self._engines.default.batcher.retry_after_s(self._in_flight),
                        self._backlog.left_s,
                    ),
                    self._limits.deadline_s,
                ),
            )
        self._backlog.check()


class _Use:
    """What one photo uses: memory of its request's lease, CPU time, and what is expected of it."""

    def __init__(self, lease: Lease, expected: Expected) -> None:
        self.expected = expected
        self.granted = 0
        self.cpu_s = 0.0
        self.client = lease.client
        self._lease = lease

    async def take(self, size: int) -> None:
        """Take bytes of memory; waits in order."""
        await self._lease.take(size)
        self.granted += size

    def give(self) -> None:
        """Give back all."""
        self._lease.give(self.granted)
        self.granted = 0

    def answer(self, size: int) -> None:
        """Give back all but ``size`` bytes, which are the answer's."""
        self._lease.answer(self.granted, size)
        self.granted = 0


def _device_task(prepared: Done) -> DeviceTask:
    """The photo for the device."""
    image = prepared.parts[0]
    geometry = geometry_of(prepared.facts)
    pixels = array(image, (*geometry.padded, 3), np.uint8)
    return DeviceTask(pixels, geometry, prepared.facts["with_confidence"])


def _record(done: Done, timings: Timings) -> None:
    """Record the stages that a worker measured; its clock is ours."""
    for name, started_s, seconds in done.facts["stages"]:
        timings.add(name, started_s, seconds)


async def _run(engine: Engine, task: DeviceTask, timings: Timings) -> Output:
    """Run the network and, on a GPU, the upsampling; record the stages from ``queue`` on."""
    started_s = time.perf_counter()
    outcome = await engine.batcher.submit(task, key=task.geometry.padded)
    for name, seconds in _device_stages(outcome).items():
        timings.add(name, started_s, seconds)
        started_s += seconds
    return outcome.result


def _device_stages(outcome: BatchResult[Output]) -> dict[str, float]:
    """Seconds of each stage from the queue to the device's result, in order."""
    result = outcome.result
    if not isinstance(result, Upsampled):
        return {"queue": outcome.queue_s, "infer": outcome.run_s}
    # Packing, the upload to the device and the wait for other batches count as queue.
    queue_s = outcome.queue_s + outcome.run_s - result.infer_s - result.upsample_s
    return {"queue": queue_s, "infer": result.infer_s, "upsample": result.upsample_s}


def _give_back_memory() -> None:
    give_back_freed()
    _log.debug("freed memory given back")
