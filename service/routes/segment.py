"""``POST /segment``: a photo in, its classes out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from service import voc
from service.decoding import MEDIA_TYPES as IMAGE_TYPES
from service.errors import Draining, InvalidParameter
from service.routes.negotiation import negotiate
from service.routes.problems import documented
from service.routes.state import Phase, ServiceDep
from service.routes.uploads import FIELD, MULTIPART, read_image
from service.schemas import Segmentation
from service.segmenter import MEDIA_TYPES, MaskFormat, Options, View
from service.settings import Settings

T = TypeVar("T")

router = APIRouter(tags=["segmentation"])

_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY: Final = {
    "required": True,
    "description": "The image file: as the form field `image`, or as the whole body.",
    "content": {
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "string", "format": "binary"}},
            }
        },
        **dict.fromkeys([*IMAGE_TYPES.values(), "application/octet-stream"], _BINARY),
    },
}
_ANSWER: Final = {
    "description": "The segmentation, of the photo's own size",
    "content": {"image/png": _BINARY, "image/jpeg": _BINARY},
    "headers": {
        "X-Model": {"schema": {"type": "string"}, "description": "name/version"},
        "Server-Timing": {"schema": {"type": "string"}, "description": "ms per stage"},
        "X-Request-ID": {"schema": {"type": "string"}},
    },
    "model": Segmentation,
}


@router.post(
    "/segment",
    summary="Segment a photo",
    response_class=Response,
    responses={200: _ANSWER, **documented(400, 404, 406, 413, 415, 422, 503, 504)},
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def segment(
    request: Request,
    service: ServiceDep,
    view: Annotated[
        View, Query(description="palette PNG of class ids, or photo and colours blended")
    ] = "mask",
    alpha: Annotated[float, Query(ge=0, le=1, description="weight of an overlay's colours")] = 0.5,
    classes: Annotated[
        str | None,
        Query(description="names, comma-separated, that any view is limited to (default: all)"),
    ] = None,
    max_side: Annotated[
        int | None, Query(description="longest side that the network sees, pixels")
    ] = None,
    mask: Annotated[MaskFormat, Query(description="how JSON carries the mask")] = "rle",
    model: Annotated[
        str | None, Query(description="name of the model, of those that `GET /models` lists")
    ] = None,
) -> Response:
    """Label every pixel of a photo with one of PASCAL VOC's classes.

    `Accept: application/json` answers any view with statistics of each class that is present.
    """
    if service.phase is not Phase.READY:
        raise Draining(f"the service is {service.phase.value}")
    options = Options(
        view=view,
        media_type=negotiate(request.headers.get("Accept"), MEDIA_TYPES[view]),
        alpha=alpha,
        classes=_class_ids(classes),
        max_side=_side(max_side, service.settings),
        mask=mask,
        model=model,
    )
    data = await read_image(request, service.settings.max_bytes)
    result = await _unless_gone(request, service.segmenter.segment(data, options))
    timing = ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in result.timing_ms.items())
    return Response(
        result.content,
        media_type=result.media_type,
        headers={
            "X-Model": f"{result.model.name}/{result.model.version}",
            "Server-Timing": timing,
            "Vary": "Accept",
        },
    )


def _class_ids(names: str | None) -> frozenset[int] | None:
    if names is None:
        return None
    ids = set()
    for name in names.split(","):
        if name.strip() not in voc.CLASSES:
            raise InvalidParameter(
                f"classes: no class {name.strip()!r}; there are {', '.join(voc.CLASSES)}"
            )
        ids.add(voc.CLASSES.index(name.strip()))
    return frozenset(ids)


def _side(max_side: int | None, settings: Settings) -> int | None:
    if max_side is not None and not settings.min_side <= max_side <= settings.max_side:
        raise InvalidParameter(
            f"max_side: {max_side} is not in {settings.min_side} to {settings.max_side}"
        )
    return max_side


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, but cancel it when the client hangs up: its place is somebody else's."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
