"""A running service without HTTP: opening, draining, and its metrics.

`service.app` puts FastAPI in front of it; ``fcn-segment predict`` uses it directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final

from service.errors import Draining, SettingsError
from service.images.headers import WORKING_BYTES
from service.inference.engine import CPU_QUEUE, GPU_QUEUE, Engine, open_engine
from service.inference.engines import Engines
from service.inference.session import InferenceSession
from service.memory import MemoryAccount, resident_bytes
from service.segmenter import SMALL_BYTES, PhotoLimits, Segmenter
from service.settings import Settings, default_memory_mb
from service.system import available_cores
from service.telemetry.metrics import (
    EngineFacts,
    Families,
    Metrics,
    Peers,
)
from service.workers.pool import WorkerPool

if TYPE_CHECKING:  # needs the extra `tracing`
    from service.telemetry.tracing import Traces

OpenEngines = Callable[[Settings, Metrics], Awaitable[Engines]]
"""Opens the engines of a service."""

CPU_WORKERS: Final = 3
"""Image workers beside a network on the CPU, which needs the cores. Between two tasks a worker
waits for the event loop: two workers cannot keep two cores busy."""


class Phase(Enum):
    """The phases of a service's life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(slots=True)
class Service:
    """Every resource of a running service, owned by `open_service`.

    ``concurrency``: the number of concurrent photos that keeps both the pool and the device busy;
    ``peers``: the other processes behind the same address, if any; ``traces``: records spans, if
    configured; ``requests``: ids of the requests in progress.
    """

    settings: Settings
    engines: Engines
    segmenter: Segmenter
    concurrency: int
    metrics: Metrics
    peers: Peers | None = None
    traces: Traces | None = None
    phase: Phase = Phase.STARTING
    requests: list[str] = field(default_factory=list)

    def require_ready(self) -> None:
        """Raise `Draining` unless the service accepts photos."""
        if self.phase is not Phase.READY:
            raise Draining(f"the service is {self.phase.value}")
        if self.segmenter.stranded:
            raise Draining("no image worker can be started")

    def begin_draining(self) -> None:
        """Become unready; requests in progress continue."""
        self.phase = Phase.DRAINING

    async def families(self) -> Families:
        """This process's current metrics."""
        # In a thread: the kernel walks through all pages.
        in_use = await asyncio.to_thread(resident_bytes, self.segmenter.pids)
        self.metrics.look_at_service(
            ready=self.phase is Phase.READY,
            in_flight=self.segmenter.in_flight,
            limit=self.segmenter.max_in_flight,
            deadline_s=self.settings.deadline_s,
            memory=(in_use, *self.segmenter.memory.state),
        )
        return await engine_families(self.metrics, self.engines.opened)


@asynccontextmanager
async def open_service(
    settings: Settings,
    session: InferenceSession | None = None,
    *,
    open_engines: OpenEngines | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[Service]:
    """Load, check and warm up the default model; yield a ready service; drain it at the end.

    ``session`` replaces ONNX Runtime's, ``open_engines`` the loading of models in this process.
    Raises `ArtefactError` or `DeviceUnavailable` with a one-line reason.
    """
    metrics = metrics or Metrics()
    if open_engines is None:
        engines = await _load_engines(settings, metrics, session)
    else:
        engines = await open_engines(settings, metrics)
    # No variable refers to the default engine: that would keep it alive after a reload.
    on_gpu = engines.default.model.gpu is not None
    queue_size = settings.queue_size or (GPU_QUEUE if on_gpu else CPU_QUEUE)
    # With a GPU all cores decode, so that it never waits; without one the network needs them.
    size = settings.decode_workers or (available_cores() if on_gpu else CPU_WORKERS)
    try:
        async with WorkerPool.open(size, metrics.worker_lost) as workers:
            segmenter = Segmenter(
                engines,
                workers,
                MemoryAccount(_memory_for_requests(settings, workers)),
                PhotoLimits(
                    settings.max_pixels,
                    settings.max_side,
                    settings.photo_cpu_s,
                    settings.deadline_s,
                ),
                max_in_flight=queue_size,
                metrics=metrics,
            )
            concurrency = min(size + engines.default.batcher.capacity, queue_size)
            service = Service(settings, engines, segmenter, concurrency, metrics)
            service.phase = Phase.READY
            try:
                yield service
            finally:
                service.begin_draining()
                # Before the workers end: they finish what the engines still answer.
                await engines.close()
    finally:
        await engines.close()


def _memory_for_requests(settings: Settings, workers: WorkerPool) -> int:
    """The bytes that requests may take: what the settings allow less what the service needs itself.

    Raises `SettingsError` if it is too little for two photos.
    """
    limit = (settings.memory_mb or default_memory_mb()) * 2**20
    at_rest = resident_bytes(workers.all_pids) + workers.size * WORKING_BYTES
    least = 4 * SMALL_BYTES
    if limit - at_rest < least:
        raise SettingsError(
            f"FCN_MEMORY_MB: {limit >> 20} MiB are too few; model and image workers need "
            f"{at_rest >> 20} MiB, and photos at least {least >> 20} MiB"
        )
    return limit - at_rest


async def _load_engines(
    settings: Settings, metrics: Metrics, session: InferenceSession | None
) -> Engines:
    """Load the default model in this process; other models are loaded on demand."""
    return Engines(
        await open_engine(settings, metrics, settings.model, session),
        settings.model,
        partial(open_engine, settings, metrics),
        settings.models_memory_mb * 2**20,
        metrics.reload,
    )


async def engine_families(metrics: Metrics, engines: Iterable[Engine]) -> Families:
    """The current metrics of a process with these engines."""
    metrics.look_at_engines([await _facts(engine) for engine in engines])
    return metrics.families()


async def _facts(engine: Engine) -> EngineFacts:
    model, contract = engine.model, engine.model.contract
    gpu, memory = None, None
    if model.gpu is not None:
        # In a thread, because the driver call may block.
        free, total = await asyncio.to_thread(model.gpu.memory)
        gpu, memory = model.gpu.ordinal, (total - free, total)
    return EngineFacts(
        contract.name,
        contract.version,
        contract.precision,
        model.provider,
        engine.batcher.waiting,
        gpu,
        memory,
    )
