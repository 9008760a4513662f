"""The data path of one photo, from an image file to an encoded answer.

Decoding, preprocessing, upsampling and encoding run in a pool of threads, the network in the
batcher's threads. The event loop only waits.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from service.artefact.contract import ModelContract
from service.artefact.preprocessing import Geometry, preprocess
from service.errors import DeadlineExceeded, Overloaded
from service.images.decoding import DecodedPhoto, decode
from service.inference.batcher import BatchResult
from service.inference.engine import Engine, Output
from service.inference.engines import Engines
from service.inference.lanes import DeviceTask, Upsampled
from service.inference.memory import give_back_freed
from service.inference.upsampling import upsample
from service.schemas import ModelName
from service.telemetry.metrics import Metrics
from service.telemetry.timings import Timings
from service.views import VIEWS, MediaType, Options, Scene, View

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

POOL_THREAD_NAME: Final = "images"

IDLE_S: Final = 10.0
"""Seconds without a photo after which freed memory is given back to the operating system."""

_log: Any = structlog.get_logger("service.segmenter")


@dataclass(frozen=True, slots=True)
class Reading:
    """A decoded photo and what its job needs.

    ``max_side``: longest side that the network sees, pixels; ``with_confidence``: whether the
    answer needs the confidence; ``shown``: ``(H, W, 3) uint8`` RGB at full size, None unless the
    answer shows the photo, to save memory while the network runs; ``file_bytes``: size of the image
    file, None if the photo was sent as an array.
    """

    photo: DecodedPhoto
    max_side: int
    with_confidence: bool
    shown: npt.NDArray[np.uint8] | None = None
    file_bytes: int | None = None


class Job(Protocol[T_co]):
    """A photo to segment. Both methods run in the pool and may raise any `SegmentError`."""

    @property
    def model(self) -> str | None:
        """Name of the model; None: the default."""

    def read(self, max_pixels: int, contract: ModelContract) -> Reading:
        """Decode the photo. ``contract`` is the model's."""

    def write(self, scene: Scene) -> T_co:
        """Encode the answer."""


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """A job's answer, the model that segmented the photo, and the time of each stage."""

    content: T
    model: ModelName
    timings: Timings


@dataclass(frozen=True, slots=True)
class ViewJob:
    """A view of the photo in an image file, encoded as ``media_type``."""

    data: bytes
    options: Options
    view: View
    media_type: MediaType

    @classmethod
    def of(cls, data: bytes, options: Options) -> Self:
        """The view that ``options`` name, in its default media type."""
        view = VIEWS[options.view]
        return cls(data, options, view, view.media_types[0])

    @property
    def model(self) -> str | None:
        """See `Job`."""
        return self.options.model

    def read(self, max_pixels: int, contract: ModelContract) -> Reading:
        """See `Job`."""
        max_side = self.options.max_side or contract.working_size
        contract.labels.ids(self.options.class_names)  # unknown names fail before decoding
        photo = decode(self.data, max_pixels, max_side)
        self.view.check_size(photo.size, self.media_type)
        shown = None
        if self.view.needs_photo:
            # Decoding twice is faster than resizing the full-size photo to the network's size, and
            # the network sees the same pixels in every view.
            scaled = photo.pixels.shape[:2] != photo.size
            shown = decode(self.data, max_pixels).pixels if scaled else photo.pixels
        return Reading(photo, max_side, self.view.needs_confidence, shown, len(self.data))

    def write(self, scene: Scene) -> bytes:
        """See `Job`."""
        return self.view.render(scene, self.options, self.media_type)


class Segmenter:
    """Runs jobs.

    ``pool`` runs every stage except the network; ``max_in_flight``: the limit of concurrent photos;
    ``deadline_s``: the time limit of one photo, seconds.
    """

    def __init__(
        self,
        engines: Engines,
        pool: Executor,
        *,
        max_pixels: int,
        max_in_flight: int,
        deadline_s: float,
        metrics: Metrics | None = None,
    ) -> None:
        self.max_in_flight = max_in_flight
        self._metrics = metrics or Metrics()
        self._engines = engines
        self._pool = pool
        self._max_pixels = max_pixels
        self._deadline_s = deadline_s
        self._in_flight = 0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._started_at_s: dict[int, float] = {}  # by thread

    async def segment(self, job: Job[T]) -> Result[T]:
        """Segment one photo.

        Raises `ImageError`, `RequestError`, `Overloaded`, `Draining`, `DeadlineExceeded`,
        `InferenceFailed` or `ModelUnavailable`.
        """
        with self.hold():
            return await self.segment_held(job)

    async def segment_held(self, job: Job[T]) -> Result[T]:
        """`segment` in a place that the caller holds, so that no free place is needed."""
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._segment(job)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no answer within {self._deadline_s:g} s") from exc

    async def _segment(self, job: Job[T]) -> Result[T]:
        timings = Timings.of_photo()
        # Two stages per task: each switch between threads costs about a tenth of a millisecond.
        async with self._engines.use(job.model) as engine:
            contract = engine.model.contract
            prepared = await self._in_pool(lambda: self._prepare(job, contract, timings))
            outcome = await _run(engine, prepared.task, timings)
            # Read again: a cluster's device may have loaded another model meanwhile.
            contract = engine.model.contract
        content = await self._in_pool(lambda: _finish(job, prepared, outcome, contract, timings))
        pixels = math.prod(prepared.task.geometry.photo)
        self._metrics.photo(pixels, prepared.file_bytes, timings.ms())
        return Result(content, ModelName(name=contract.name, version=contract.version), timings)

    def _prepare(self, job: Job[T], contract: ModelContract, timings: Timings) -> _Prepared:
        """Decode and preprocess."""
        with timings.stage("decode"):
            reading = job.read(self._max_pixels, contract)
        with timings.stage("preprocess"):
            photo = reading.photo
            geometry = Geometry.plan(photo.size, reading.max_side, contract.shapes)
            image = preprocess(photo.pixels, geometry, contract.padding_color, photo.box)
        task = DeviceTask(image, geometry, reading.with_confidence)
        return _Prepared(task, reading.shown, reading.file_bytes)

    @property
    def in_flight(self) -> int:
        """The number of photos in progress."""
        return self._in_flight

    @property
    def working_s(self) -> float:
        """Seconds since the start of the oldest task that runs in the pool; 0 if none does."""
        now_s = time.monotonic()
        return now_s - min(self._started_at_s.copy().values(), default=now_s)

    @contextmanager
    def hold(self, wanted: int = 1) -> Iterator[int]:
        """Hold up to ``wanted`` of the free places for photos in flight; yields their number.

        Raises `Overloaded` if none is free.
        """
        # Before decoding: a queue of decoded photos needs far more memory than one of files.
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
        """Raise `Overloaded` if no place is free. Uploads call it before they read the body."""
        if self._in_flight >= self.max_in_flight:
            raise Overloaded(
                f"{self._in_flight} photos are being worked on",
                # By the deadline each of them is answered or has failed.
                min(
                    self._engines.default.batcher.retry_after_s(self._in_flight),
                    self._deadline_s,
                ),
            )

    async def _in_pool(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread of the pool; `working_s` measures it."""

        def measured() -> T:
            thread = threading.get_ident()
            self._started_at_s[thread] = time.monotonic()
            try:
                return work()
            finally:
                del self._started_at_s[thread]

        return await asyncio.get_running_loop().run_in_executor(self._pool, measured)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The parts of a `Reading` that are kept while the network runs, preprocessed."""

    task: DeviceTask
    shown: npt.NDArray[np.uint8] | None
    file_bytes: int | None


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


def _finish(
    job: Job[T], prepared: _Prepared, outcome: Output, contract: ModelContract, timings: Timings
) -> T:
    """Upsample, unless the device has done it, and encode."""
    if isinstance(outcome, Upsampled):
        labels = outcome.labels
    else:
        task = prepared.task
        with timings.stage("upsample"):
            labels = upsample(outcome, task.geometry, with_confidence=task.with_confidence)
    with timings.stage("encode"):
        return job.write(Scene(labels, contract, prepared.shown, timings))


def _give_back_memory() -> None:
    give_back_freed()
    _log.debug("freed memory given back")
