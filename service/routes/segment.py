"""``POST /segment``: a photo in, its classes out."""

from __future__ import annotations

from typing import Final

from fastapi import Request, Response

from service.http.dependencies import ready_service
from service.http.disconnects import unless_gone
from service.http.negotiation import negotiate
from service.http.parameters import options_parameters, read_options
from service.http.problems import documented
from service.http.responses import BINARY, DOCUMENTED_HEADERS, answer_headers
from service.http.routers import ServiceRouter
from service.http.uploads import FIELD, MULTIPART, lease_of, read_image
from service.images.decoding import IMAGE_MEDIA_TYPES
from service.jobs.view import ViewJob
from service.schemas import Segmentation
from service.views import IMAGE_FORMATS, VIEWS, offers

router = ServiceRouter(tags=["segmentation"])


_REQUEST_BODY: Final = {
    "required": True,
    # One type for all images: the header is ignored, and few generators know `image/*`.
    "description": "The image file, as the form field `image` or as the whole body: "
    f"{', '.join(IMAGE_MEDIA_TYPES)}. Its bytes decide its type; its Content-Type is ignored.",
    "content": {
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: BINARY["schema"]},
            }
        },
        "application/octet-stream": BINARY,
    },
}
_RESPONSE: Final = {
    "description": "The segmentation, at the photo's size. By `Accept`: "
    + "; ".join(f"`{name}` as {', '.join(offers(name))}" for name in VIEWS),
    "content": dict.fromkeys(IMAGE_FORMATS, BINARY),
    "headers": {
        **DOCUMENTED_HEADERS,
        "Server-Timing": {"schema": {"type": "string"}, "description": "ms per stage"},
    },
    "model": Segmentation,
}


@router.post(
    "/segment",
    summary="Segment a photo",
    response_class=Response,
    responses={200: _RESPONSE, **documented(400, 404, 406, 408, 413, 415, 422, 503, 504)},
    openapi_extra={"parameters": options_parameters(), "requestBody": _REQUEST_BODY},
)
async def segment(request: Request) -> Response:
    """Label every pixel of a photo with one of the model's classes.

    With `Accept: application/json` the response of any view is statistics of each class that is
    present. The parameters may also be fields of the form.
    """
    service = ready_service(request)
    options = await read_options(request, service)
    data, fields = await read_image(request, service.settings.max_bytes)
    if fields:
        options = await read_options(request, service, fields)
    offered = offers(options.view)
    media_type = negotiate(request.headers.getlist("Accept"), tuple(offered))
    job = ViewJob(options, offered[media_type].name, media_type)
    result = await unless_gone(request, service.segmenter.segment(job, data, lease_of(request)))
    return Response(
        result.content,
        media_type=media_type,
        headers={**answer_headers(result), "Vary": "Accept"},
    )
