"""The whole data path of one request, from bytes to bytes.

Decoding with preprocessing and upsampling with encoding run in a pool of threads, the network in
the batcher's threads; the event loop only waits.
"""

from __future__ import annotations

import asyncio
import base64
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from service import voc
from service.batcher import Answer
from service.contract import ModelContract
from service.decoding import decode
from service.encoding import (
    ImageFormat,
    Runs,
    encode_image,
    encode_mask,
    limit_classes,
    overlay,
)
from service.engines import Engines, Output
from service.errors import DeadlineExceeded, Overloaded
from service.lanes import Task, Upsampled
from service.preprocessing import Geometry, preprocess
from service.schemas import ModelName, Rle, Segmentation, SegmentedClass
from service.upsampling import Labels, upsample

View = Literal["mask", "overlay"]
MaskFormat = Literal["rle", "png", "none"]
MediaType = Literal["image/png", "image/jpeg", "application/json"]

POOL_THREAD_NAME: Final = "images"

MEDIA_TYPES: Final[dict[View, tuple[MediaType, ...]]] = {
    "mask": ("image/png", "application/json"),
    "overlay": ("image/png", "image/jpeg", "application/json"),
}
"""What each view can be answered as, the default first."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller wants to have of a photo.

    ``classes`` are the ids that any view is limited to (None: all); ``max_side`` the longest side
    the network sees, in pixels (None: the contract's working size); ``alpha`` the weight of an
    overlay's colours in [0, 1]; ``mask`` how JSON carries the mask; ``model`` the name of the model
    (None: the default).
    """

    view: View = "mask"
    media_type: MediaType = "image/png"
    alpha: float = 0.5
    classes: frozenset[int] | None = None
    max_side: int | None = None
    mask: MaskFormat = "rle"
    model: str | None = None

    @property
    def wants_confidence(self) -> bool:
        """Whether the answer says how sure the network is."""
        return self.media_type == "application/json"

    @property
    def shows_photo(self) -> bool:
        """Whether the answer holds the photo's own pixels, all of them."""
        return self.view == "overlay" and self.media_type != "application/json"


@dataclass(frozen=True, slots=True)
class Result:
    """An encoded answer; ``timing_ms`` maps each stage, in order, to its milliseconds."""

    content: bytes
    media_type: MediaType
    model: ModelName
    timing_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A photo on its way: the network's input, and what must outlast the network.

    ``photo``: ``(H, W, 3) uint8`` RGB, None where no answer needs it, so that a large photo does
    not wait for the network too.
    """

    task: Task
    photo: npt.NDArray[np.uint8] | None
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
    ) -> None:
        self._engines = engines
        self._pool = pool
        self._max_pixels = max_pixels
        self._max_in_flight = max_in_flight
        self._deadline_s = deadline_s
        self._in_flight = 0

    async def segment(self, data: bytes, options: Options) -> Result:
        """Segment one photo.

        ``data``: an image file of an allowed type. Raises `ImageError`, `Overloaded`, `Draining`,
        `DeadlineExceeded`, `InferenceFailed`, `UnknownModel` or `ModelUnavailable`.
        """
        # Before decoding: a queue of decoded photos would take far more memory than one of files.
        if self._in_flight >= self._max_in_flight:
            raise Overloaded(
                f"{self._in_flight} photos are being worked on",
                self._engines.default.batcher.retry_after_s(),
            )
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._segment(data, options)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no answer within {self._deadline_s:g} s") from exc
        finally:
            self._in_flight -= 1

    async def _segment(self, data: bytes, options: Options) -> Result:
        # Two stages a task: each hop between the threads costs about a tenth of a millisecond.
        loop = asyncio.get_running_loop()
        async with self._engines.use(options.model) as engine:
            contract = engine.model.contract
            prepared = await loop.run_in_executor(
                self._pool, self._prepare, data, options, contract
            )
            answer = await engine.batcher.submit(prepared.task, key=prepared.task.geometry.padded)
        return await loop.run_in_executor(
            self._pool, self._finish, prepared, answer, options, contract
        )

    def _prepare(self, data: bytes, options: Options, contract: ModelContract) -> _Prepared:
        """Decode and preprocess."""
        max_side = options.max_side or contract.working_size
        started = time.perf_counter()
        photo = decode(data, self._max_pixels, max_side)
        pixels = None
        if options.shows_photo:
            # Twice is faster than bringing a whole large photo to the network's size, and the
            # overlay shows what the mask says.
            scaled = photo.pixels.shape[:2] != photo.size
            pixels = decode(data, self._max_pixels).pixels if scaled else photo.pixels
        decoded = time.perf_counter()
        geometry = Geometry.plan(photo.size, max_side, contract.shapes)
        image = preprocess(photo.pixels, geometry, contract.padding_color, photo.box)
        preprocessed = time.perf_counter()
        return _Prepared(
            Task(image, geometry, options.wants_confidence),
            pixels,
            {"decode": (decoded - started) * 1000, "preprocess": (preprocessed - decoded) * 1000},
        )

    def _finish(
        self,
        prepared: _Prepared,
        answer: Answer[Output],
        options: Options,
        contract: ModelContract,
    ) -> Result:
        """Upsample, where the device has not, and encode."""
        started = time.perf_counter()
        if isinstance(answer.result, Upsampled):
            labels = answer.result.labels
            infer_s, upsample_s = answer.result.infer_s, answer.result.upsample_s
            # Packing, the way up, and waiting for other batches on the device.
            queue_s = answer.queue_s + answer.run_s - infer_s - upsample_s
        else:
            task = prepared.task
            labels = upsample(answer.result, task.geometry, with_confidence=task.with_confidence)
            queue_s, infer_s = answer.queue_s, answer.run_s
            upsample_s = time.perf_counter() - started
        upsampled = time.perf_counter()
        timing_ms = {
            **prepared.timing_ms,
            "queue": queue_s * 1000,
            "infer": infer_s * 1000,
            "upsample": upsample_s * 1000,
        }
        model = ModelName(name=contract.name, version=contract.version)
        content = self._encode(prepared.photo, labels, options, model, timing_ms)
        timing_ms["encode"] = (time.perf_counter() - upsampled) * 1000
        return Result(content, options.media_type, model, timing_ms)

    def _encode(
        self,
        photo: npt.NDArray[np.uint8] | None,
        labels: Labels,
        options: Options,
        model: ModelName,
        timing_ms: dict[str, float],
    ) -> bytes:
        mask = labels.mask
        if options.classes is not None:
            mask = limit_classes(mask, options.classes)
        if options.media_type == "application/json":
            return self._describe(mask, labels, options, model, timing_ms)
        if photo is None:
            return encode_mask(mask)
        image_format: ImageFormat = "JPEG" if options.media_type == "image/jpeg" else "PNG"
        return encode_image(overlay(photo, mask, options.alpha), image_format)

    def _describe(
        self,
        mask: npt.NDArray[np.uint8],
        labels: Labels,
        options: Options,
        model: ModelName,
        timing_ms: dict[str, float],
    ) -> bytes:
        started = time.perf_counter()
        height, width = mask.shape
        # Of the whole mask: limiting the classes must not turn the others into background pixels.
        runs = Runs.of(labels.mask)
        confidence = labels.class_confidence()
        classes = [
            SegmentedClass(
                id=found.class_id,
                name=voc.CLASSES[found.class_id],
                color=voc.rgb(found.class_id),
                pixels=found.pixels,
                fraction=found.pixels / (height * width),
                bbox=found.bbox,
                confidence=float(confidence[found.class_id]),
                rle=Rle(size=(height, width), counts=runs.rle(found.class_id))
                if options.mask == "rle"
                else None,
            )
            for found in runs.statistics()
            if options.classes is None or found.class_id in options.classes
        ]
        png = base64.b64encode(encode_mask(mask)).decode() if options.mask == "png" else None
        encode_ms = (time.perf_counter() - started) * 1000
        body = Segmentation(
            width=width,
            height=height,
            model=model,
            classes=classes,
            mask=png,
            timing_ms={
                stage: round(value, 3)
                for stage, value in [*timing_ms.items(), ("encode", encode_ms)]
            },
        )
        # Without mask=rle the key would be null in every class; `mask` stays, null or not.
        exclude = None if options.mask == "rle" else {"classes": {"__all__": {"rle"}}}
        return body.model_dump_json(exclude=exclude).encode()
