"""The whole data path of one request, from an image file to an encoded answer.

Reading (decoding, preprocessing) and writing (upsampling, encoding) run in a pool of threads, the
network in the batcher's threads; the event loop only waits.
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

REST_S: Final = 10.0
"""Seconds without a photo after which the memory kept for the next one is given back."""

_log: Any = structlog.get_logger("service.segmenter")


@dataclass(frozen=True, slots=True)
class Reading:
    """A photo that was read.

    ``max_side``: longest side that the network sees, pixels; ``with_confidence``: whether the
    answer needs the network's confidence; ``shown``: ``(H, W, 3) uint8`` RGB at full size, None
    unless the answer shows the photo, so that a large photo does not wait for the network too;
    ``file_bytes``: size of the file it came in, None if it came as an array.
    """

    photo: DecodedPhoto
    max_side: int
    with_confidence: bool
    shown: npt.NDArray[np.uint8] | None = None
    file_bytes: int | None = None


class Job(Protocol[T_co]):
    """One photo to segment. Both methods run in the pool and may raise any error of the service."""

    @property
    def model(self) -> str | None:
        """Name of the model; None: the default."""

    def read(self, max_pixels: int, contract: ModelContract) -> Reading:
        """Decode the photo. ``contract`` is that of the model."""

    def write(self, scene: Scene) -> T_co:
        """Encode the answer."""


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """A job's answer, the model that gave it, and the stages it took."""

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
        """The view that ``options`` name, in its default form."""
        view = VIEWS[options.view]
        return cls(data, options, view, view.media_types[0])

    @property
    def model(self) -> str | None:
        """See `Job`."""
        return self.options.model

    def read(self, max_pixels: int, contract: ModelContract) -> Reading:
        """See `Job`."""
        max_side = self.options.max_side or contract.working_size
        contract.labels.ids(self.options.class_names)  # before the work, not after it
        photo = decode(self.data, max_pixels, max_side)
        self.view.check_size(photo.size, self.media_type)
        shown = None
        if self.view.needs_photo:
            # Decoding twice is faster than bringing a whole large photo to the network's size, and
            # the network sees the same pixels whatever the view.
            scaled = photo.pixels.shape[:2] != photo.size
            shown = decode(self.data, max_pixels).pixels if scaled else photo.pixels
        return Reading(photo, max_side, self.view.needs_confidence, shown, len(self.data))

    def write(self, scene: Scene) -> bytes:
        """See `Job`."""
        return self.view.render(scene, self.options, self.media_type)


class Segmenter:
    """Takes jobs from a photo to its answer.

    ``pool`` runs everything but the network; ``max_in_flight`` bounds the photos held at once;
    ``deadline_s`` the seconds for one.
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
        self._rest: asyncio.TimerHandle | None = None
        self._began: dict[int, float] = {}

    async def segment(self, job: Job[T]) -> Result[T]:
        """Segment one photo.

        Raises `ImageError`, `RequestError`, `Overloaded`, `Draining`, `DeadlineExceeded`,
        `InferenceFailed` or `ModelUnavailable`.
        """
        with self.hold():
            return await self.segment_held(job)

    async def segment_held(self, job: Job[T]) -> Result[T]:
        """`segment` in a place that the caller holds: never `Overloaded` for want of one."""
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._segment(job)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no answer within {self._deadline_s:g} s") from exc

    async def _segment(self, job: Job[T]) -> Result[T]:
        timings = Timings.of_photo()
        # Two stages a task: each hop between the threads costs about a tenth of a millisecond.
        async with self._engines.use(job.model) as engine:
            contract = engine.model.contract
            prepared = await self._in_pool(lambda: self._prepare(job, contract, timings))
            outcome = await _run(engine, prepared.task, timings)
            # That of the answer: a cluster's device may have loaded another model meanwhile.
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
        """Seconds that the pool's oldest unfinished decoding or encoding has been running."""
        return time.monotonic() - min(self._began.copy().values(), default=time.monotonic())

    @contextmanager
    def hold(self, wanted: int = 1) -> Iterator[int]:
        """Hold up to ``wanted`` places among the photos in flight; yields how many.

        Raises `Overloaded` if there is none.
        """
        # Before decoding: a queue of decoded photos would take far more memory than one of files.
        self.require_place()
        held = min(wanted, self.max_in_flight - self._in_flight)
        self._in_flight += held
        if self._rest is not None:
            self._rest.cancel()
        try:
            yield held
        finally:
            self._in_flight -= held
            if not self._in_flight:
                loop = asyncio.get_running_loop()
                self._rest = loop.call_later(REST_S, loop.run_in_executor, None, _rest)

    def require_place(self) -> None:
        """Raise `Overloaded` while there is no place, so that nobody sends a photo in vain."""
        if self._in_flight >= self.max_in_flight:
            raise Overloaded(
                f"{self._in_flight} photos are being worked on",
                # By the deadline all of them are answered, one way or the other.
                min(
                    self._engines.default.batcher.retry_after_s(self._in_flight),
                    self._deadline_s,
                ),
            )

    async def _in_pool(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread of the pool, watched by `working_s`."""

        def watched() -> T:
            thread = threading.get_ident()
            self._began[thread] = time.monotonic()
            try:
                return work()
            finally:
                del self._began[thread]

        return await asyncio.get_running_loop().run_in_executor(self._pool, watched)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What remains of a `Reading` while the network runs."""

    task: DeviceTask
    shown: npt.NDArray[np.uint8] | None
    file_bytes: int | None


async def _run(engine: Engine, task: DeviceTask, timings: Timings) -> Output:
    """Run the network, on a GPU the upsampling too; record the stages from the queue on."""
    started_s = time.perf_counter()
    outcome = await engine.batcher.submit(task, key=task.geometry.padded)
    for name, seconds in _device_stages(outcome).items():
        timings.add(name, started_s, seconds)
        started_s += seconds
    return outcome.result


def _device_stages(outcome: BatchResult[Output]) -> dict[str, float]:
    """Seconds of each stage from the queue to the device's answer, in order."""
    result = outcome.result
    if not isinstance(result, Upsampled):
        return {"queue": outcome.queue_s, "infer": outcome.run_s}
    # Packing, the upload, and waiting for other batches on the device count as queue.
    queue_s = outcome.queue_s + outcome.run_s - result.infer_s - result.upsample_s
    return {"queue": queue_s, "infer": result.infer_s, "upsample": result.upsample_s}


def _finish(
    job: Job[T], prepared: _Prepared, outcome: Output, contract: ModelContract, timings: Timings
) -> T:
    """Upsample, where the device has not, and encode."""
    if isinstance(outcome, Upsampled):
        labels = outcome.labels
    else:
        task = prepared.task
        with timings.stage("upsample"):
            labels = upsample(outcome, task.geometry, with_confidence=task.with_confidence)
    with timings.stage("encode"):
        return job.write(Scene(labels, contract, prepared.shown, timings))


def _rest() -> None:
    give_back_freed()
    _log.debug("freed memory given back")
