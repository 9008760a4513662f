"""A job: decode a photo, and encode the answer. Both halves run in image workers.

Between them the photo is in the service, as the network's input and its logits. An answer that
shows the photo gets its pixels back, unless they were scaled while decoding: then it decodes again.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from service.artefact.contract import ModelContract
from service.artefact.preprocessing import Geometry, preprocess
from service.images.decoding import DecodedPhoto, decode, decode_inspected, inspect
from service.inference.upsampling import Labels, upsample
from service.telemetry.timings import Timings
from service.views import Scene
from service.workers.channel import Part, array
from service.workers.worker import Answer

_RGB: Final = 3


class Grant(NamedTuple):
    """What a photo may have. ``max_pixels``: by its header; ``memory_bytes``: in a worker."""

    max_pixels: int
    memory_bytes: int

    def require(self, memory_bytes: int, pixels: int) -> None:
        """Raise `NeedsMemory` if the photo needs more memory than it was granted."""
        if memory_bytes > self.memory_bytes:
            raise NeedsMemory(memory_bytes, pixels)

    def decode(
        self, data: bytes, needed_side: int, pixel_bytes: int, *, shown: bool = False
    ) -> DecodedPhoto:
        """Decode an image file, once there is memory for that and for the answer.

        ``needed_side``: see `service.images.decoding.decode`; ``pixel_bytes``: the most memory for
        each pixel while the answer is written and sent, without the photo; ``shown``: whether the
        answer shows the photo. Raises `ImageError` or `NeedsMemory`.
        """
        header = inspect(data, self.max_pixels)
        height, width = header.size
        pixels = height * width
        # What is sent is in the service, in the worker, and in the file between the two.
        sent = 2 * len(data)
        reading = header.bytes_needed(needed_side)
        writing = pixels * pixel_bytes
        if shown:
            reading += _RGB * pixels
            # Of its pixels that are sent, the service has one copy and the worker another, for a
            # moment the file between them a third. A photo that is decoded again is only there.
            writing = max(writing + 2 * _RGB * pixels, 3 * _RGB * pixels, header.bytes_needed())
        self.require(sent + max(reading, writing), pixels)
        return decode_inspected(header, needed_side)


class NeedsMemory(Exception):
    """The photo needs ``memory_bytes`` in a worker: the service asks again when it has them."""

    def __init__(self, memory_bytes: int, pixels: int) -> None:
        super().__init__(memory_bytes, pixels)
        self.memory_bytes = memory_bytes
        self.pixels = pixels


class Writer(Protocol):
    """The second half of a job. It is pickled between the halves."""

    @property
    def needs_photo(self) -> bool:
        """Whether `write` needs the photo at its own size."""

    def write(self, scene: Scene) -> Written:
        """Encode the answer. May raise any `RequestError` or `ImageError`."""


@dataclass(frozen=True, slots=True)
class Written:
    """An encoded answer. ``facts``: JSON about it, for the endpoint."""

    content: Part
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A decoded photo and what is needed to go on.

    ``max_side``: longest side that the network sees, pixels; ``with_confidence``: whether the
    answer needs the confidence; ``file_bytes``: size of the image file, None if the photo was sent
    as an array.
    """

    photo: DecodedPhoto
    max_side: int
    with_confidence: bool
    writer: Writer
    file_bytes: int | None = None


class Job(Protocol):
    """A photo to segment; the request's body is not part of it. It is pickled."""

    @property
    def model(self) -> str | None:
        """Name of the model; None: the default."""

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """Decode the photo. ``contract`` is the model's.

        May raise any `RequestError` or `ImageError`, or `NeedsMemory`.
        """

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """Check, in the service, what its writer says about an answer of ``size`` bytes.

        See `service.workers.replies.Check`.
        """


@lru_cache(maxsize=8)
def _contract(pickled: bytes) -> ModelContract:
    contract: ModelContract = pickle.loads(pickled)  # noqa: S301 - the service wrote it
    return contract


class Prepare(NamedTuple):
    """Decode and preprocess: the first half as a task of `service.workers`.

    ``contract``: pickled. Takes the body. Returns the network's input, the pickled writer and the
    photo's pixels, if the writer needs them and has no other way; or ``needs`` and ``pixels``, if
    the grant is too small.
    """

    job: Job
    contract: bytes
    grant: Grant

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        (body,) = parts
        timings, contract = Timings(), _contract(self.contract)
        try:
            with timings.stage("decode"):
                reading = self.job.read(body, self.grant, contract)
        except NeedsMemory as needs:
            return Answer({"needs": needs.memory_bytes, "pixels": needs.pixels})
        with timings.stage("preprocess"):
            photo = reading.photo
            geometry = Geometry.plan(photo.size, reading.max_side, contract.shapes)
            image = preprocess(photo.pixels, geometry, contract.padding_color, photo.box)
        shown: Part = b""
        decodes_again = False
        if reading.writer.needs_photo:
            decodes_again = photo.pixels.shape[:2] != photo.size
            shown = b"" if decodes_again else photo.pixels
        facts = {
            "geometry": [geometry.photo, geometry.resized, geometry.padded],
            "with_confidence": reading.with_confidence,
            "decodes_again": decodes_again,
            "file_bytes": reading.file_bytes,
            "stages": timings.stages,
        }
        return Answer(facts, [image, pickle.dumps(reading.writer), shown])


class Finish(NamedTuple):
    """Upsample and encode: the second half as a task of `service.workers`.

    ``stages``: those before it. Takes the pickled writer, the photo's pixels and the body (each
    empty if it is not needed), and either logits of the shape ``logits``, or the mask and the
    confidence (empty if there is none) at the photo's size. Returns the answer's content.
    """

    contract: bytes
    max_pixels: int
    geometry: Geometry
    with_confidence: bool
    logits: tuple[int, ...] | None
    stages: Sequence[tuple[str, float, float]]

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        pickled, shown, body, *outputs = parts
        writer: Writer = pickle.loads(pickled)  # noqa: S301 - `Prepare` wrote it
        timings = Timings()
        for stage in self.stages:
            timings.add(*stage)
        labels = self._labels(outputs, timings)
        with timings.stage("encode"):
            photo: npt.NDArray[np.uint8] | None = None
            if body:
                photo = decode(body, self.max_pixels).pixels
            elif shown:
                photo = array(shown, (*self.geometry.photo, 3), np.uint8)
            written = writer.write(Scene(labels, _contract(self.contract), timings, photo))
        facts = {"facts": written.facts, "stages": timings.stages[len(self.stages) :]}
        return Answer(facts, [written.content])

    def _labels(self, outputs: Sequence[bytes], timings: Timings) -> Labels:
        if self.logits is not None:
            with timings.stage("upsample"):
                logits: npt.NDArray[np.float32] = array(outputs[0], self.logits, np.float32)
                return upsample(logits, self.geometry, with_confidence=self.with_confidence)
        mask, confidence = (
            array(part, self.geometry.photo, np.uint8) if part else None for part in outputs
        )
        if mask is None:
            raise ValueError("there is no mask")
        return Labels(mask, confidence)
