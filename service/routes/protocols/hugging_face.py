"""``POST /hf/image-segmentation``: Hugging Face's task, for its ``InferenceClient``.

Source: https://huggingface.co/docs/inference-providers/tasks/image-segmentation.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Final, Literal

import numpy as np
from fastapi import Request, Response
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from service.artefact.contract import ModelContract
from service.errors import InvalidParameter, NoImage
from service.http.dependencies import ReadyServiceDep
from service.http.disconnects import unless_gone
from service.http.parameters import ModelQuery
from service.http.problems import documented_errors
from service.http.responses import answer_headers
from service.http.routers import ServiceRouter
from service.images.brush_rle import RowRuns
from service.images.decoding import IMAGE_MEDIA_TYPES, decode
from service.images.encoding import encode_binary_mask
from service.routes.protocols.messages import (
    DATA_URI,
    Message,
    check_size,
    complaint,
    decode_base64,
    decode_data_uri,
    parse,
    read_image_body,
    request_body,
)
from service.schemas import Schema
from service.segmenter import Reading
from service.settings import Settings
from service.views import Scene

router = ServiceRouter(foreign_errors=True, prefix="/hf", tags=["hugging face"])

_ENVELOPE_BYTES: Final = 64 * 1024

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
        json_schema_extra={
            "anyOf": [{"$ref": "#/components/schemas/SegmentationParameters"}, {"type": "null"}]
        },
    )


class Segment(Schema):
    """The pixels of one class."""

    label: str
    score: float = Field(description="mean probability of the class over its pixels, 0 to 1")
    mask: str = Field(description="greyscale PNG of the photo's size in base64, 255 or 0")


_ANSWER: Final = TypeAdapter(list[Segment])


class ImageSegmentation:
    """One request and its answer, as a `service.segmenter.Job`."""

    def __init__(self, body: bytes, settings: Settings, model: str | None) -> None:
        self.model = model
        self._body = body
        self._max_bytes = settings.max_bytes
        self._parameters = SegmentationParameters()

    def read(self, max_pixels: int, contract: ModelContract) -> Reading:
        """The photo. Raises `RequestError` or `ImageError`."""
        data = self._body
        # Content-Type is often missing or wrong; no image file begins like JSON.
        if data[:1].isspace() or data.startswith(b"{"):
            request = parse(SegmentationRequest, data)
            self._parameters = _parameters(request.parameters)
            is_uri = request.inputs.startswith(DATA_URI)
            data = (decode_data_uri if is_uri else decode_base64)(request.inputs, self._max_bytes)
        check_size(len(data), self._max_bytes)
        side = contract.working_size
        photo = decode(data, max_pixels, side)
        return Reading(photo, side, with_confidence=True, file_bytes=len(data))

    def write(self, scene: Scene) -> bytes:
        """The segments as JSON, most pixels first."""
        wanted, labels = self._parameters, scene.labels
        pixels, scores = RowRuns.of(labels.mask).counts(), labels.class_confidence()
        segments = []
        for class_id in np.argsort(-pixels, stable=True)[: np.count_nonzero(pixels)]:
            if scores[class_id] < (wanted.threshold or 0):
                continue
            chosen = labels.mask == class_id
            if wanted.mask_threshold is not None and labels.confidence is not None:
                chosen &= labels.confidence >= wanted.mask_threshold * 255
            segments.append(
                Segment(
                    label=scene.contract.labels.names[class_id],
                    score=float(scores[class_id]),
                    mask=base64.b64encode(encode_binary_mask(chosen)).decode(),
                )
            )
        return _ANSWER.dump_json(segments)


@router.post(
    "/image-segmentation",
    summary="Segment a photo with Hugging Face's protocol",
    response_class=Response,
    responses={
        200: {"description": "The segments, largest first", "model": list[Segment]},
        **documented_errors(400, 404, 408, 413, 415, 422, 503, 504),
    },
    openapi_extra=request_body(
        SegmentationRequest,
        binary=True,
        description=f"The image file ({', '.join(IMAGE_MEDIA_TYPES)}), or JSON that contains it. "
        "The service detects which from the bytes and ignores Content-Type.",
    ),
)
async def image_segmentation(
    request: Request,
    service: ReadyServiceDep,
    model: ModelQuery = None,
) -> Response:
    """`InferenceClient(model="http://.../hf/image-segmentation").image_segmentation(photo)`."""
    body = await read_image_body(request, service.settings, _ENVELOPE_BYTES)
    if not body:
        raise NoImage("the body is empty: send an image file, or JSON with inputs")
    job = ImageSegmentation(body, service.settings, model)
    result = await unless_gone(request, service.segmenter.segment(job))
    return Response(result.content, media_type="application/json", headers=answer_headers(result))


def _parameters(given: dict[str, Any] | None) -> SegmentationParameters:
    """Raises `InvalidParameter`."""
    try:
        return SegmentationParameters.model_validate(given or {})
    except ValidationError as exc:
        raise InvalidParameter(complaint(exc)) from exc
