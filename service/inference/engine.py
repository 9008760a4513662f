"""One served model: its network, and the batcher that feeds it."""

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
"""A device's result for a photo: logits from a CPU (upsampled by a worker), labels from a GPU."""

LANES: Final = 2
"""Batches on a GPU at once: one computes while the other is copied."""

GPU_BATCH: Final = 16
GPU_QUEUE: Final = 256
CPU_QUEUE: Final = 64
"""Defaults of the settings that depend on the device."""


class ServedModel(Protocol):
    """Facts about a model, wherever it runs; in this process, a `session.Model`."""

    @property
    def contract(self) -> ModelContract:
        """The model's contract."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of its artefact folder."""

    @property
    def file_name(self) -> str:
        """The network file."""

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the execution provider that runs it."""

    @property
    def gpu(self) -> CudaDevice | None:
        """The GPU of this process that it runs on, if any."""


class Queue(Protocol):
    """The queue of a device; in this process, a `batcher.Batcher`, which documents each method."""

    @property
    def waiting(self) -> int:
        """Number of photos that wait in this process."""

    @property
    def capacity(self) -> int:
        """Number of photos that the device works on at once."""

    @property
    def running_s(self) -> float:
        """Seconds that the oldest of the running batches has been running."""

    @property
    def usual_s(self) -> float:
        """Seconds of the device that a photo usually takes; 0 if that is not known."""

    def retry_after_s(self, ahead: int) -> float:
        """Seconds until ``ahead`` photos are done."""

    async def submit(self, item: DeviceTask, key: Hashable) -> BatchResult[Output]:
        """Queue a photo and wait for its result."""

    def abandon(self) -> None:
        """Refuse new photos and fail all accepted ones."""

    async def close(self) -> None:
        """Refuse new photos and answer all accepted ones."""


@dataclass(eq=False)
class Engine:
    """A model that is ready, and the queue of its device.

    ``memory_bytes``: memory that loading took; ``users``: number of requests that hold the engine;
    ``last_used``: the serial number of the last request, counted over all engines.
    """

    model: ServedModel
    batcher: Queue
    memory_bytes: int = 0
    users: int = 0
    last_used: int = 0
    _given_back: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @contextmanager
    def held(self) -> Iterator[Engine]:
        """Hold the engine for a request; `retire` waits until the request ends."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1
            self._given_back.set()

    async def retire(self) -> None:
        """Close the engine as soon as no request holds it."""
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

    Raises `ArtefactError` or `DeviceUnavailable` with one line that states what is wrong.
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
    """Run a batch on a CPU: stack images of one shape, run the network, unstack.

    Returns one ``(C, h/stride, w/stride) float32`` array of logits for each image.
    """
    images = [task.image for task in tasks]
    batch = images[0][None] if len(images) == 1 else np.stack(images)
    return list(model.run(batch, session))


def _open_lanes(model: Model, gpu: CudaDevice, settings: Settings, max_batch: int) -> list[Lane]:
    """Open a GPU's lanes; the caller warms them up."""
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
    """Return the log's fields for a model that is ready."""
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
