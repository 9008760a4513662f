"""A running service without HTTP: opening, draining, and its metrics.

`service.app` puts FastAPI in front of it; ``fcn-segment predict`` uses it directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from service.errors import Draining
from service.images.decoding import keep_readers_quiet
from service.inference.engine import CPU_QUEUE, GPU_QUEUE, Engine, open_engine
from service.inference.engines import Engines
from service.inference.session import InferenceSession, available_cores
from service.segmenter import POOL_THREAD_NAME, Segmenter
from service.settings import Settings
from service.telemetry.metrics import EngineFacts, Families, Metrics, Peers

if TYPE_CHECKING:  # needs the extra `tracing`
    from service.telemetry.tracing import Traces

OpenEngines = Callable[[Settings, Metrics], Awaitable[Engines]]
"""Opens the engines of a service."""


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
    configured; ``requests``: ids of the requests in progress; ``body_bytes``: bytes of request
    bodies in memory.
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
    body_bytes: int = 0

    def require_ready(self) -> None:
        """Raise `Draining` unless the service accepts photos."""
        if self.phase is not Phase.READY:
            raise Draining(f"the service is {self.phase.value}")

    def begin_draining(self) -> None:
        """Become unready; requests in progress continue."""
        self.phase = Phase.DRAINING

    async def families(self) -> Families:
        """This process's current metrics."""
        self.metrics.look_at_service(
            ready=self.phase is Phase.READY,
            in_flight=self.segmenter.in_flight,
            limit=self.segmenter.max_in_flight,
            deadline_s=self.settings.deadline_s,
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
    keep_readers_quiet()
    metrics = metrics or Metrics()
    if open_engines is None:
        engines = await _load_engines(settings, metrics, session)
    else:
        engines = await open_engines(settings, metrics)
    # No variable refers to the default engine: that would keep it alive after a reload.
    on_gpu = engines.default.model.gpu is not None
    queue_size = settings.queue_size or (GPU_QUEUE if on_gpu else CPU_QUEUE)
    # With a GPU all cores decode, so that it never waits; without one the network needs them.
    workers = settings.decode_workers or (available_cores() if on_gpu else 2)
    with ThreadPoolExecutor(workers, thread_name_prefix=POOL_THREAD_NAME) as pool:
        segmenter = Segmenter(
            engines,
            pool,
            max_pixels=settings.max_pixels,
            max_in_flight=queue_size,
            deadline_s=settings.deadline_s,
            metrics=metrics,
        )
        concurrency = min(workers + engines.default.batcher.capacity, queue_size)
        service = Service(settings, engines, segmenter, concurrency, metrics, phase=Phase.READY)
        try:
            yield service
        finally:
            service.begin_draining()
            await engines.close()


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
