"""``POST /hf/image-segmentation``: Hugging Face's task, for its ``InferenceClient``.

Source: https://huggingface.co/docs/inference-providers/tasks/image-segmentation.
"""

from __future__ import annotations

from typing import Final

from fastapi import Depends, Request, Response

from service.errors import NoImage
from service.http.dependencies import ReadyServiceDep
from service.http.disconnects import unless_gone
from service.http.parameters import ModelQuery, known_query
from service.http.problems import documented_errors
from service.http.responses import answer_headers
from service.http.routers import ServiceRouter
from service.http.uploads import lease_of
from service.images.decoding import IMAGE_MEDIA_TYPES
from service.jobs.hugging_face import ImageSegmentationJob, Segment, SegmentationRequest
from service.routes.protocols.messages import read_image_body, request_body

router = ServiceRouter(
    foreign_errors=True,
    prefix="/hf",
    tags=["hugging face"],
    dependencies=[Depends(known_query)],
    responses=documented_errors(422),
)

_ENVELOPE_BYTES: Final = 64 * 1024


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
    job = ImageSegmentationJob(model, service.settings.max_bytes)
    result = await unless_gone(request, service.segmenter.segment(job, body, lease_of(request)))
    return Response(result.content, media_type="application/json", headers=answer_headers(result))
