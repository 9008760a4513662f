"""The whole data path of one request, from bytes to bytes.

Decoding with preprocessing and upsampling with encoding run in a pool of threads, the network in
the batcher's threads; the event loop only waits.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

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
from service.inference.upsampling import Labels, upsample
from service.schemas import ModelName
from service.telemetry.metrics import Metrics
from service.telemetry.timings import note
from service.views import MediaType, Options, encode_answer

T = TypeVar("T")

POOL_THREAD_NAME: Final = "images"

REST_S: Final = 10.0
"""Without a photo for so long, the memory kept for the next one is given back."""

_log: Any = structlog.get_logger("service.segmenter")


@dataclass(frozen=True, slots=True)
class Result:
    """An encoded answer; ``timing_ms`` maps each stage, in order, to its milliseconds."""

    content: bytes
    media_type: MediaType
    model: ModelName
    timing_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a caller of `Segmenter.label` made of a request.

    ``max_side``: the longest side that the network sees, in pixels; ``with_confidence``: whether
    the answer says how sure the network is.
    """

    photo: DecodedPhoto
    max_side: int
    with_confidence: bool


@dataclass(frozen=True, slots=True)
class Labelled(Generic[T]):
    """An answer in its caller's own form; ``timing_ms`` as in `Result`."""

    content: T
    model: ModelName
    timing_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A photo on its way: the network's input, and what must outlast the network.

    ``photo``: ``(H, W, 3) uint8`` RGB, None where no answer needs it, so that a large photo does
    not wait for the network too. ``started_s``: when its stages so far began, by
    `time.perf_counter`.
    """

    task: DeviceTask
    photo: npt.NDArray[np.uint8] | None
    started_s: float
    timing_ms: dict[str, float]


class Segmenter:
    """Takes photos from bytes to encoded answers.

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

    async def segment(self, data: bytes, options: Options) -> Result:
        """Segment one photo.

        ``data``: an image file of an allowed type. Raises `ImageError`, `Overloaded`, `Draining`,
        `DeadlineExceeded`, `InferenceFailed`, `UnknownModel` or `ModelUnavailable`.
        """
        with self.hold():
            return await self.segment_held(data, options)

    async def segment_held(self, data: bytes, options: Options) -> Result:
        """`segment` in a place that the caller holds: never `Overloaded` for want of one."""
        async with self._deadline():
            return await self._segment(data, options)

    async def label(
        self,
        read: Callable[[int, int], Reading],
        write: Callable[[Labels, ModelName], T],
        model: str | None = None,
    ) -> Labelled[T]:
        """Label one photo for a protocol that has its own way to send photos and take answers.

        ``read(max_pixels, working_size)`` makes the photo of what was sent and
        ``write(labels, model)`` the answer; both run in the pool. Raises what `segment` does, and
        what these two raise.
        """
        async with self._place():
            async with self._engines.use(model) as engine:
                contract = engine.model.contract
                prepared = await self._in_pool(lambda: self._read(read, contract))
                answer = await _run(engine, prepared)
                contract = engine.model.contract
            labelled = await self._in_pool(lambda: self._write(prepared, answer, write, contract))
            self._answered(prepared, answer, labelled.timing_ms)
            return labelled

    @property
    def in_flight(self) -> int:
        """Photos that are worked on."""
        return self._in_flight

    @property
    def working_s(self) -> float:
        """How long the pool has been at the photo that it decodes or encodes longest, seconds."""
        return time.monotonic() - min(self._began.copy().values(), default=time.monotonic())

    @contextmanager
    def hold(self, wanted: int = 1) -> Iterator[int]:
        """Hold up to so many places among the photos in flight; gives their number.

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
        """Raises `Overloaded` while there is no place: then nobody need send a photo."""
        if self._in_flight >= self.max_in_flight:
            raise Overloaded(
                f"{self._in_flight} photos are being worked on",
                # By the deadline all of them are answered, one way or the other.
                min(
                    self._engines.default.batcher.retry_after_s(self._in_flight),
                    self._deadline_s,
                ),
            )

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """As long as one photo may take. Raises `DeadlineExceeded`."""
        try:
            async with asyncio.timeout(self._deadline_s):
                yield
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no answer within {self._deadline_s:g} s") from exc

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A place among the photos in flight, for as long as one may take."""
        with self.hold():
            async with self._deadline():
                yield

    async def _in_pool(self, work: Callable[[], T]) -> T:
        """Have a thread of the pool do it, watched by `working_s`."""

        def watched() -> T:
            thread = threading.get_ident()
            self._began[thread] = time.monotonic()
            try:
                return work()
            finally:
                del self._began[thread]

        return await asyncio.get_running_loop().run_in_executor(self._pool, watched)

    def _read(self, read: Callable[[int, int], Reading], contract: ModelContract) -> _Prepared:
        """Have the caller read its photo, and preprocess."""
        started = time.perf_counter()
        reading = read(self._max_pixels, contract.working_size)
        return _preprocess(reading, None, contract, started)

    def _write(
        self,
        prepared: _Prepared,
        answer: BatchResult[Output],
        write: Callable[[Labels, ModelName], T],
        contract: ModelContract,
    ) -> Labelled[T]:
        """Upsample, where the device has not, and have the caller write its answer."""
        labels, timing_ms = _upsample(prepared, answer)
        started = time.perf_counter()
        model = ModelName(name=contract.name, version=contract.version)
        content = write(labels, model)
        timing_ms["encode"] = (time.perf_counter() - started) * 1000
        return Labelled(content, model, timing_ms)

    async def _segment(self, data: bytes, options: Options) -> Result:
        # Two stages a task: each hop between the threads costs about a tenth of a millisecond.
        async with self._engines.use(options.model) as engine:
            contract = engine.model.contract
            prepared = await self._in_pool(lambda: self._prepare(data, options, contract))
            answer = await _run(engine, prepared)
            # Who answered: a cluster's devices may have taken up another model meanwhile.
            contract = engine.model.contract
        result = await self._in_pool(lambda: self._finish(prepared, answer, options, contract))
        self._metrics.file(len(data))
        self._answered(prepared, answer, result.timing_ms)
        return result

    def _answered(
        self, prepared: _Prepared, answer: BatchResult[Output], timing_ms: dict[str, float]
    ) -> None:
        """Note the stages that have just ended, and count the photo."""
        before = prepared.timing_ms.keys() | _device_ms(answer).keys()
        last = {stage: value for stage, value in timing_ms.items() if stage not in before}
        note(time.perf_counter() - sum(last.values()) / 1000, last)
        self._metrics.photo(math.prod(prepared.task.geometry.photo), timing_ms)

    def _prepare(self, data: bytes, options: Options, contract: ModelContract) -> _Prepared:
        """Decode and preprocess."""
        max_side = options.max_side or contract.working_size
        started = time.perf_counter()
        photo = decode(data, self._max_pixels, max_side)
        options.check_size(photo.size)
        pixels = None
        if options.shows_photo:
            # Twice is faster than bringing a whole large photo to the network's size, and the
            # overlay shows what the mask says.
            scaled = photo.pixels.shape[:2] != photo.size
            pixels = decode(data, self._max_pixels).pixels if scaled else photo.pixels
        reading = Reading(photo, max_side, options.wants_confidence)
        return _preprocess(reading, pixels, contract, started)

    def _finish(
        self,
        prepared: _Prepared,
        answer: BatchResult[Output],
        options: Options,
        contract: ModelContract,
    ) -> Result:
        """Upsample, where the device has not, and encode."""
        labels, timing_ms = _upsample(prepared, answer)
        upsampled = time.perf_counter()
        model = ModelName(name=contract.name, version=contract.version)
        content = encode_answer(prepared.photo, labels, options, model, timing_ms)
        timing_ms["encode"] = (time.perf_counter() - upsampled) * 1000
        return Result(content, options.media_type, model, timing_ms)


def _preprocess(
    reading: Reading,
    pixels: npt.NDArray[np.uint8] | None,
    contract: ModelContract,
    started: float,
) -> _Prepared:
    """Bring a photo to the network's size; ``pixels``: the photo that the answer shows, if any."""
    decoded = time.perf_counter()
    photo = reading.photo
    geometry = Geometry.plan(photo.size, reading.max_side, contract.shapes)
    image = preprocess(photo.pixels, geometry, contract.padding_color, photo.box)
    preprocessed = time.perf_counter()
    return _Prepared(
        DeviceTask(image, geometry, reading.with_confidence),
        pixels,
        started,
        {"decode": (decoded - started) * 1000, "preprocess": (preprocessed - decoded) * 1000},
    )


def _rest() -> None:
    give_back_freed()
    _log.debug("freed memory given back")


async def _run(engine: Engine, prepared: _Prepared) -> BatchResult[Output]:
    """Have the network run, and note the stages up to its end."""
    note(prepared.started_s, prepared.timing_ms)
    submitted_s = time.perf_counter()
    answer = await engine.batcher.submit(prepared.task, key=prepared.task.geometry.padded)
    note(submitted_s, _device_ms(answer))
    return answer


def _device_ms(answer: BatchResult[Output]) -> dict[str, float]:
    """Each stage's ms from the queue to the answer of a device, which upsamples if it is a GPU."""
    result = answer.result
    if not isinstance(result, Upsampled):
        return {"queue": answer.queue_s * 1000, "infer": answer.run_s * 1000}
    # Packing, the way up, and waiting for other batches on the device.
    queue_s = answer.queue_s + answer.run_s - result.infer_s - result.upsample_s
    return {
        "queue": queue_s * 1000,
        "infer": result.infer_s * 1000,
        "upsample": result.upsample_s * 1000,
    }


def _upsample(prepared: _Prepared, answer: BatchResult[Output]) -> tuple[Labels, dict[str, float]]:
    """The labels, upsampled here where the device has not done it, and each stage's ms so far."""
    timing_ms = {**prepared.timing_ms, **_device_ms(answer)}
    if isinstance(answer.result, Upsampled):
        return answer.result.labels, timing_ms
    started = time.perf_counter()
    task = prepared.task
    labels = upsample(answer.result, task.geometry, with_confidence=task.with_confidence)
    timing_ms["upsample"] = (time.perf_counter() - started) * 1000
    return labels, timing_ms
