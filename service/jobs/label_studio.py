"""What image workers do for ``/label-studio``: read the requests, and draw brush regions.

Sources: https://github.com/HumanSignal/label-studio-ml-backend, ``label_studio_ml/api.py``, and
https://labelstud.io/guide/predictions.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field

from service.artefact.contract import ModelContract
from service.artefact.labels import LabelSet
from service.errors import InvalidParameter
from service.images.brush_rle import RowRuns
from service.jobs.base import Grant, Reading, Written
from service.jobs.label_config import MAX_LABELS, BrushControl, class_ids, parse_label_config
from service.jobs.messages import (
    DATA_URI,
    MAX_JSON_MEMORY,
    Message,
    check_answer,
    check_size,
    decode_data_uri,
    json_memory,
    parse,
    write_numbers,
)
from service.schemas import Schema
from service.views import Scene
from service.workers.replies import number, require, whole
from service.workers.worker import Answer

MAX_IMAGES: Final = 250
"""Most images in one request.

By default Label Studio asks for 100 tasks at once (``MLBackendPredictionJob.batch_size``) and waits
100 s for the answer (``ML_TIMEOUT_PREDICT``).
"""

# Measured memory for each pixel, bytes: mask, confidence and runs.
_PIXEL_BYTES: Final = 6


class Task(Message):
    """One task of a project; ``data`` has its image under the key in the configuration."""

    data: dict[str, Any]


class PredictRequest(Message):
    """Tasks to pre-label."""

    tasks: list[Task] = Field(max_length=MAX_IMAGES, fail_fast=True)
    label_config: str = Field(description="the project's labelling configuration, XML")


class SetupRequest(Message):
    """A project to connect. Its host name and access token are not used."""

    label_schema: str | None = Field(
        None, alias="schema", description="the project's labelling configuration, XML"
    )


class BrushValue(Schema):
    """The pixels of one label."""

    format: Literal["rle"] = "rle"
    brushlabels: list[str]
    rle: list[int] = Field(description="the RGBA image, 255 or 0, encoded by rle-pack")


class BrushRegion(Schema):
    """The region of one label."""

    id: str
    type: Literal["brushlabels"] = "brushlabels"
    from_name: str
    to_name: str
    original_width: int
    original_height: int
    image_rotation: int = 0
    score: float = Field(description="mean probability of the label over its pixels, 0 to 1")
    value: BrushValue


@dataclass(frozen=True, slots=True)
class ReadSetup:
    """Check a setup request, as a task of `service.workers`; it returns nothing.

    ``label_set``: the model's. Returns ``needs`` if that is more than ``memory_bytes``.
    """

    label_set: LabelSet
    memory_bytes: int

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        (body,) = parts
        if (needs := json_memory(body)) > self.memory_bytes:
            return Answer({"needs": needs})
        setup = parse(SetupRequest, body)
        if setup.label_schema is not None:
            parse_label_config(setup.label_schema, self.label_set)
        return Answer()

    def check(self, facts: Mapping[str, Any], parts: Sequence[bytes]) -> None:
        """See `service.workers.worker.CheckedTask`."""
        if "needs" in facts:
            whole(facts["needs"], self.memory_bytes + 1, MAX_JSON_MEMORY)


@dataclass(frozen=True, slots=True)
class ReadTasks:
    """Read a predict request, as a task of `service.workers`.

    Returns ``keys``, the keys of images in a task's data, and ``images``, for each task the length
    of the text of each of its images, None if there is none. The parts are these texts, one after
    the other, and the pickled controls. ``label_set`` and ``needs``: see `ReadSetup`.
    """

    label_set: LabelSet
    memory_bytes: int

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        (body,) = parts
        if (needs := json_memory(body)) > self.memory_bytes:
            return Answer({"needs": needs})
        request = parse(PredictRequest, body)
        controls = parse_label_config(request.label_config, self.label_set)
        keys = list(dict.fromkeys(control.data_key for control in controls))
        if len(request.tasks) * len(keys) > MAX_IMAGES:
            raise InvalidParameter(f"tasks: must have at most {MAX_IMAGES} images in all")
        texts = bytearray()
        images = []
        for task in request.tasks:
            lengths: list[int | None] = []
            for key in keys:
                text = task.data.get(key)
                encoded = text.encode() if isinstance(text, str) else None
                lengths.append(None if encoded is None else len(encoded))
                texts += encoded or b""
            images.append(lengths)
        return Answer({"keys": keys, "images": images}, [texts, pickle.dumps(controls)])

    def check(self, facts: Mapping[str, Any], parts: Sequence[bytes]) -> None:
        """See `service.workers.worker.CheckedTask`."""
        if "needs" in facts:
            whole(facts["needs"], self.memory_bytes + 1, MAX_JSON_MEMORY)
            return
        texts, _ = parts
        keys = [str(key) for key in facts["keys"]]
        require(keys == facts["keys"], "the keys are no text")
        require(
            len(facts["images"]) <= MAX_IMAGES >= len(facts["images"]) * len(keys),
            "too many images",
        )
        for images in facts["images"]:
            require(len(images) == len(keys), "there is not an image for each key")
        lengths = [one for one in chain.from_iterable(facts["images"]) if one is not None]
        require(sum(whole(one, 0, len(texts)) for one in lengths) == len(texts), "wrong lengths")


@dataclass(frozen=True, slots=True)
class BrushJob:
    """The labels found in an image file or ``data:`` URI, in the configuration's order.

    ``controls``: pickled, for the images under ``key`` and others; ``max_bytes``: largest image
    file. The facts of the answer are the number of ``regions`` and their total ``score``.
    """

    key: str
    controls: bytes
    max_bytes: int

    @property
    def model(self) -> str | None:
        """See `service.jobs.base.Job`."""
        return None

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """See `service.jobs.base.Job`."""
        data = decode_data_uri(body, self.max_bytes) if body.startswith(DATA_URI) else body
        check_size(len(data), self.max_bytes)
        side = contract.working_size
        photo = grant.decode(data, side, _PIXEL_BYTES)
        controls: Sequence[BrushControl] = pickle.loads(self.controls)  # noqa: S301 - `ReadTasks`
        writer = RegionsWriter([one for one in controls if one.data_key == self.key])
        return Reading(photo, side, True, writer, len(data))

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """See `service.jobs.base.Job`."""
        # A mean is at most 1, but for rounding.
        number(facts["score"], 2 * whole(facts["regions"], 0, MAX_LABELS))


@dataclass(frozen=True, slots=True)
class RegionsWriter:
    """Writes the regions as JSON, separated by commas."""

    controls: Sequence[BrushControl]

    @property
    def needs_photo(self) -> bool:
        """See `service.jobs.base.Writer`."""
        return False

    def write(self, scene: Scene) -> Written:
        """See `service.jobs.base.Writer`."""
        mask = scene.labels.mask
        height, width = mask.shape
        runs = RowRuns.of(mask)
        pixels = runs.counts()
        confidence = scene.labels.class_confidence()
        content = bytearray()
        scores: list[float] = []
        drawn: dict[frozenset[int], bytes] = {}
        for control in self.controls:
            for name, names in control.labels.items():
                # By the answering model's own classes: a reload may have replaced the one that the
                # configuration was checked against.
                ids = class_ids(names, scene.contract.labels)
                chosen = sorted(ids)
                if not pixels[chosen].any():
                    continue
                if ids not in drawn:
                    drawn[ids] = _numbers(runs.brush(chosen))
                scores.append(float(np.average(confidence[chosen], weights=pixels[chosen])))
                region = BrushRegion(
                    id=uuid.uuid4().hex[:10],
                    from_name=control.from_name,
                    to_name=control.to_name,
                    original_width=width,
                    original_height=height,
                    score=scores[-1],
                    value=BrushValue(brushlabels=[name], rle=[]),
                )
                # `rle` is last. Its numbers are appended as text: there may be millions.
                head = region.model_dump_json().removesuffix("]}}")
                content += b"," * (len(scores) > 1) + head.encode()
                content += drawn[ids]
                content += b"]}}"
                check_answer(len(content))
        return Written(content, {"regions": len(scores), "score": sum(scores)})


def _numbers(values: bytes) -> bytes:
    text = bytearray()
    write_numbers(text, np.frombuffer(values, dtype=np.uint8))
    return bytes(text)
