"""The job of ``POST /hf/image-segmentation``: Hugging Face's task.

Source: https://huggingface.co/docs/inference-providers/tasks/image-segmentation.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from service.artefact.contract import ModelContract
from service.errors import InvalidParameter
from service.images.encoding import encode_binary_mask
from service.jobs.base import Grant, Reading, Written
from service.jobs.messages import (
    Message,
    check_answer,
    check_names,
    check_size,
    complaint,
    decode_image_text,
    json_memory,
    parse,
)
from service.schemas import Schema
from service.views import Scene
from service.workers.replies import require

# Measured memory for each pixel, bytes: mask, confidence, and one segment that is encoded.
_PIXEL_BYTES: Final = 7

Fraction = Annotated[float, Field(ge=0, le=1)]


class SegmentationParameters(Message):
    """Which segments to return."""

    model_config = ConfigDict(extra="forbid")

    subtask: Literal["semantic"] | None = Field(None, description="the only subtask")
    threshold: Fraction | None = Field(None, description="lowest score of a segment")
    mask_threshold: Fraction | None = Field(
        None, description="lowest probability of its class at which a pixel belongs to a mask"
    )
    overlap_mask_area_threshold: Fraction | None = Field(
        None, description="has no effect: masks do not overlap"
    )


class SegmentationRequest(Message):
    """A photo and the parameters of its segmentation."""

    inputs: str = Field(description="the image file, in base64 or as a data: URI")
    # Validated later: an invalid parameter is 422, malformed JSON is 400.
    parameters: dict[str, Any] | None = Field(
        None,
        max_length=16,
        json_schema_extra={
            "anyOf": [{"$ref": "#/components/schemas/SegmentationParameters"}, {"type": "null"}]
        },
    )


class Segment(Schema):
    """The pixels of one class."""

    label: str
    score: float = Field(description="mean probability of the class over its pixels, 0 to 1")
    mask: str = Field(description="greyscale PNG of the photo's size in base64, 255 or 0")


@dataclass(frozen=True, slots=True)
class ImageSegmentationJob:
    """One request: an image file or JSON. ``max_bytes``: largest image file."""

    model: str | None
    max_bytes: int

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """See `service.jobs.base.Job`."""
        data, writer = body, _SegmentsWriter(SegmentationParameters())
        # Content-Type is often missing or wrong; no image file begins like JSON.
        if body[:1].isspace() or body.startswith(b"{"):
            grant.require(json_memory(body), pixels=0)
            request = parse(SegmentationRequest, body)
            writer = _SegmentsWriter(_parameters(request.parameters))
            data = decode_image_text(request.inputs.encode(), self.max_bytes)
            del request  # the photo may take the memory that the JSON took
        check_size(len(data), self.max_bytes)
        side = contract.working_size
        photo = grant.decode(data, side, _PIXEL_BYTES)
        return Reading(photo, side, True, writer, len(data))

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """See `service.jobs.base.Job`."""
        require(not facts, "there are no facts")


@dataclass(frozen=True, slots=True)
class _SegmentsWriter:
    """Writes the segments as JSON, most pixels first."""

    parameters: SegmentationParameters

    @property
    def needs_photo(self) -> bool:
        """See `service.jobs.base.Writer`."""
        return False

    def write(self, scene: Scene) -> Written:
        """See `service.jobs.base.Writer`."""
        labels, confidence = scene.labels, scene.require_confidence()
        threshold, mask_threshold = self.parameters.threshold, self.parameters.mask_threshold
        pixels, scores = labels.class_pixels(), labels.class_confidence()
        content = bytearray(b"[")
        for class_id in np.argsort(-pixels, stable=True)[: np.count_nonzero(pixels)]:
            if scores[class_id] < (threshold or 0):
                continue
            chosen = labels.mask == class_id
            if mask_threshold is not None:
                chosen &= confidence >= mask_threshold * 255
            name, score = scene.contract.labels.names[class_id], float(scores[class_id])
            segment = json.dumps({"label": name, "score": score})
            # The mask is appended as text: copies of it would take megabytes.
            content += segment[:-1].encode() + b', "mask": "'
            content += base64.b64encode(encode_binary_mask(chosen)) + b'"},'
            check_answer(len(content))
        if content.endswith(b","):
            del content[-1:]
        content += b"]"
        return Written(content)


def _parameters(given: dict[str, Any] | None) -> SegmentationParameters:
    """Raises `InvalidParameter`."""
    check_names(given or {}, SegmentationParameters.model_fields)
    try:
        return SegmentationParameters.model_validate(given or {})
    except ValidationError as exc:
        raise InvalidParameter(complaint(exc)) from exc
