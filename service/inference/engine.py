"""One model that is served: its network, and the batcher that feeds it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from service.artefact.contract import ModelContract
from service.artefact.manifest import Manifest
from service.inference.batcher import Batcher, BatchResult
from service.inference.cuda import CudaDevice
from service.inference.lanes import DeviceTask, Lane, Upsampled
from service.inference.session import DeviceOptions, InferenceSession, Model, load_model
from service.settings import Settings
from service.telemetry.metrics import Metrics

_log: Any = structlog.get_logger("service.engine")

Logits = npt.NDArray[np.float32]
Output = Logits | Upsampled
"""What a device makes of a photo: a CPU its logits, which the pool upsamples; a GPU the labels."""

LANES: Final = 2
"""Batches on a GPU at once: one computes while the other comes and goes."""

GPU_BATCH: Final = 16
GPU_QUEUE: Final = 256
CPU_QUEUE: Final = 64
"""Defaults of the settings that depend on the device."""


class ServedModel(Protocol):
    """What is told of a model, wherever it runs; here that is a `session.Model`."""

    @property
    def contract(self) -> ModelContract:
        """What it promises."""

    @property
    def manifest(self) -> Manifest:
        """What its folder says."""

    @property
    def file_name(self) -> str:
        """The network file."""

    @property
    def provider(self) -> str:
        """What runs it."""

    @property
    def gpu(self) -> CudaDevice | None:
        """This process's GPU that it runs on."""


class Queue(Protocol):
    """The way to a device; here that is a `batcher.Batcher`, which says all about it."""

    @property
    def waiting(self) -> int:
        """Photos that wait in this process."""

    @property
    def capacity(self) -> int:
        """Photos that the device works on at once."""

    @property
    def running_s(self) -> float:
        """Seconds that the oldest of the running batches has been running."""

    def retry_after_s(self, ahead: int) -> float:
        """When so many photos should be done."""

    async def submit(self, item: DeviceTask, key: Hashable) -> BatchResult[Output]:
        """Queue a photo and wait for its result."""

    def abandon(self) -> None:
        """Refuse what is new, and fail what was taken."""

    async def close(self) -> None:
        """Refuse what is new, and answer what was taken."""


@dataclass(eq=False)
class Engine:
    """A model that is ready, and the way to its device.

    ``memory_bytes`` is what loading it took; ``users`` are the requests that hold it, and
    ``last_used`` counts up from one request to the next, over all engines.
    """

    model: ServedModel
    batcher: Queue
    memory_bytes: int = 0
    users: int = 0
    last_used: int = 0
    _given_back: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @contextmanager
    def held(self) -> Iterator[Engine]:
        """Use it; until then `retire` waits."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1
            self._given_back.set()

    async def retire(self) -> None:
        """Close it once nobody holds it any more."""
        while self.users:
            self._given_back.clear()
            await self._given_back.wait()
        await self.batcher.close()


async def open_engine(
    settings: Settings,
    metrics: Metrics,
    folder: Path,
    session: InferenceSession | None = None,
) -> Engine:
    """Load, check and warm up an artefact folder.

    Raises `ArtefactError` or `DeviceUnavailable`, with one line that says what differs.
    """
    max_batch = settings.max_batch or GPU_BATCH
    options = DeviceOptions(
        provider=settings.provider,
        graphs=settings.cuda_graphs,
        max_batch=max_batch,
        cache=settings.cache_dir,
        memory_bytes=settings.gpu_memory_mb * 2**20,
    )
    model = await asyncio.to_thread(
        load_model,
        folder,
        settings.device,
        settings.threads,
        session,
        settings.precision,
        options,
    )
    queue_size = settings.queue_size or (CPU_QUEUE if model.gpu is None else GPU_QUEUE)
    make_batcher = partial(
        Batcher[DeviceTask, Output],
        max_wait_s=settings.max_wait_ms / 1000,
        max_queue=queue_size,
        on_batch=metrics.batch,
    )
    if model.gpu is None:
        await asyncio.to_thread(model.warm_up)
        batcher = make_batcher(
            partial(run_batch, model, model.session),
            shares=[partial(run_batch, model, share) for share in model.shares],
            max_batch=settings.max_batch or 1,
        )
    else:
        lanes = await asyncio.to_thread(_open_lanes, model, model.gpu, settings, max_batch)
        batcher = make_batcher(None, shares=[lane.run for lane in lanes], max_batch=max_batch)
        for lane in lanes:
            await batcher.call_beside(lane.run, lane.warm_up)
    _log.info("model ready", **_describe(model))
    return Engine(model, batcher)


def run_batch(
    model: Model, session: InferenceSession, tasks: Sequence[DeviceTask]
) -> Sequence[Output]:
    """The batcher's work on a CPU: stack images of one shape, run them, unstack.

    Returns one ``(C, h/stride, w/stride) float32`` array of logits for each image.
    """
    images = [task.image for task in tasks]
    batch = images[0][None] if len(images) == 1 else np.stack(images)
    return list(model.run(batch, session))


def _open_lanes(model: Model, gpu: CudaDevice, settings: Settings, max_batch: int) -> list[Lane]:
    """The ways through a GPU, not warm yet."""
    lock = threading.Lock()
    return [
        Lane(
            number,
            gpu.open_channel,
            model,
            model.contract,
            max_batch=max_batch,
            max_side=settings.max_side,
            graphs=settings.cuda_graphs and settings.provider == "cuda",
            lock=lock,
        )
        for number in range(LANES)
    ]


def _describe(model: Model) -> dict[str, Any]:
    """What the log says of a model that is ready."""
    facts: dict[str, Any] = {
        "model": f"{model.contract.name}/{model.contract.version}",
        "file": model.file_name,
        "provider": model.provider,
    }
    if model.gpu is not None:
        free, total = model.gpu.memory()
        facts |= {"gpu": model.gpu.name, "gpu_memory_mb": f"{(total - free) >> 20}/{total >> 20}"}
    if model.why is not None:
        facts["no_gpu"] = model.why
    return facts
