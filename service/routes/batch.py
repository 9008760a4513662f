"""``POST /segment/batch``: several photos in, a zip archive or JSON lines out.

A batch holds as many free places in flight as it can use, at least one, and its photos share them.
So a batch is refused if a single photo would be; once it is accepted, only its large photos can be
refused, if there is no time for them. The number of places also limits the results that wait for a
slow client.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, TypeVar

import structlog
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.http.dependencies import ready_service
from service.http.disconnects import unless_gone
from service.http.negotiation import negotiate
from service.http.parameters import options_parameters, read_options
from service.http.problems import documented, embedded_problem
from service.http.responses import BINARY, DOCUMENTED_HEADERS
from service.http.routers import ServiceRouter
from service.http.uploads import FIELD, MULTIPART, Upload, lease_of, read_images
from service.jobs.view import ViewJob
from service.memory import Lease
from service.routes.archive import Archive
from service.runtime import Service
from service.schemas import BatchEntry, BatchIndex, BatchItem, ModelName, Problem
from service.views import VIEWS, Options

T = TypeVar("T")

BATCH_TYPES: Final[tuple[Literal["application/zip", "application/x-ndjson"], ...]] = (
    "application/zip",
    "application/x-ndjson",
)
"""The media types of a batch's response, the default first."""

INDEX_NAME: Final = "index.json"

_log: Any = structlog.get_logger("service.batch")

router = ServiceRouter(tags=["segmentation"])


class JsonLines(JSONResponse):
    """For OpenAPI only: each line is a `BatchItem`."""

    media_type = "application/x-ndjson"


_REQUEST_BODY: Final = {
    "required": True,
    "description": f"The image files, each in a form field `{FIELD}`.",
    "content": {
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "array", "items": BINARY["schema"]}},
            }
        }
    },
}
_RESPONSE: Final = {
    "description": "By `Accept`, in the order of the images. Zip archive: each image's view in its "
    f"default media type, named after the image, and `{INDEX_NAME}`, which maps images to files "
    "and problems. JSON lines: one `BatchItem` per image",
    "content": {"application/zip": BINARY},
    "headers": DOCUMENTED_HEADERS,
    "model": BatchItem,
}


@router.post(
    "/segment/batch",
    summary="Segment several photos",
    response_class=JsonLines,
    responses={200: _RESPONSE, **documented(400, 404, 406, 408, 413, 422, 503)},
    openapi_extra={"parameters": options_parameters(), "requestBody": _REQUEST_BODY},
)
async def segment_batch(request: Request) -> Response:
    """Label every pixel of each photo.

    The response starts as soon as the first photo is done. An image that fails does not stop the
    others: its entry is a problem. The parameters may also be fields of the form.
    """
    service = ready_service(request)
    options = await read_options(request, service)
    media_type = negotiate(request.headers.getlist("Accept"), BATCH_TYPES)
    engines, settings = service.engines, service.settings
    uploads, fields = await read_images(request, settings.max_images, settings.max_images_bytes)
    if fields:
        options = await read_options(request, service, fields)
    manifest = engines.manifest(options.model or engines.names[0])
    model = ModelName(name=manifest.name, version=manifest.version)
    async with AsyncExitStack() as resources:
        places = resources.enter_context(
            service.segmenter.hold(min(len(uploads), service.concurrency))
        )
        archived = media_type == "application/zip"
        if not archived:
            options = options.model_copy(update={"view": "json"})
        results = await resources.enter_async_context(
            aclosing(
                in_order(
                    (_segment(request, service, upload, options) for upload in uploads),
                    places,
                )
            )
        )
        sent = _giving_back(results, lease_of(request))
        written = (
            _write_archive(sent, model, VIEWS[options.view].suffix)
            if archived
            else _write_lines(sent)
        )
        content = await resources.enter_async_context(aclosing(written))
        return _Streamed(
            request,
            content,
            resources.pop_all(),
            media_type=media_type,
            headers={"X-Model": f"{model.name}/{model.version}", "Vary": "Accept"},
        )


@dataclass(frozen=True, slots=True)
class _ImageResult:
    """An image's encoded view or its problem; the other one is None."""

    name: str
    content: bytes | None
    problem: Problem | None


async def _segment(
    request: Request, service: Service, upload: Upload, options: Options
) -> _ImageResult:
    try:
        data = upload.read(service.settings.max_bytes)
        job = ViewJob.of(options)
        result = await service.segmenter.segment_held(job, data, lease_of(request))
    # No error of one image may fail the others.
    except Exception as exc:  # noqa: BLE001
        problem = embedded_problem(request.scope, exc)
        if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.exception("unforeseen error", image=upload.name)
        return _ImageResult(upload.name, None, problem)
    return _ImageResult(upload.name, result.content, None)


async def in_order(work: Iterable[Coroutine[Any, Any, T]], limit: int) -> AsyncGenerator[T, None]:
    """The results of ``work`` in its order.

    At most ``limit`` of them run or wait to be consumed. Closing the iterator cancels the rest.
    """
    running: deque[asyncio.Task[T]] = deque()
    try:
        for one in work:
            running.append(asyncio.create_task(one))
            if len(running) == limit:
                yield await running[0]
                running.popleft()
        while running:
            yield await running[0]
            running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _giving_back(
    results: AsyncIterator[_ImageResult], lease: Lease
) -> AsyncGenerator[_ImageResult, None]:
    """The same results; each one's memory is given back when the next is wanted: it is sent."""
    async for result in results:
        yield result
        lease.sent(len(result.content or b""))


async def _write_lines(results: AsyncIterator[_ImageResult]) -> AsyncGenerator[bytes, None]:
    index = 0
    async for result in results:
        item = BatchItem(index=index, name=result.name, problem=result.problem)
        line = item.model_dump_json(exclude_none=True).encode()
        if result.content is not None:
            # It is JSON already: parsing it to write it again would take as long as encoding it.
            line = line[:-1] + b',"segmentation":' + result.content + b"}"
        yield line + b"\n"
        index += 1


async def _write_archive(
    results: AsyncIterator[_ImageResult], model: ModelName, suffix: str
) -> AsyncGenerator[bytes, None]:
    archive = Archive()
    entries: list[BatchEntry] = []
    async for result in results:
        name = None
        if result.content is not None:
            name = archive.name(result.name, suffix)
            yield archive.add(name, result.content)
        entries.append(
            BatchEntry(index=len(entries), name=result.name, file=name, problem=result.problem)
        )
    index = BatchIndex(model=model, images=entries)
    yield archive.add(INDEX_NAME, index.model_dump_json(indent=2, exclude_none=True).encode())
    yield archive.close()


class _Streamed(StreamingResponse):
    """A stream that stops when the client disconnects and closes ``resources`` at its end."""

    def __init__(
        self,
        request: Request,
        content: AsyncIterator[bytes],
        resources: AsyncExitStack,
        *,
        media_type: str,
        headers: dict[str, str],
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._request = request
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            await unless_gone(self._request, self.stream_response(send))
