"""``POST /segment/batch``: several photos in, an archive or JSON lines out.

The photos take as many of the free places among those in flight as they can use, at least one, and
go through them in turns. So a batch is refused where a single photo would be, and once it is taken
none of its photos is. As many answers wait to be sent as there are places, however slowly the
client reads.
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

from service.http.dependencies import ReadyServiceDep
from service.http.disconnects import unless_gone
from service.http.negotiation import negotiate
from service.http.parameters import OptionsDep
from service.http.problems import documented, embedded_problem
from service.http.routers import ServiceRouter
from service.http.uploads import FIELD, MULTIPART, Upload, open_images
from service.routes.archive import Archive
from service.runtime import Service
from service.schemas import BatchEntry, BatchIndex, BatchItem, ModelName, Problem
from service.segmenter import ViewJob
from service.views import VIEWS, Options

T = TypeVar("T")

BATCH_TYPES: Final[tuple[Literal["application/zip", "application/x-ndjson"], ...]] = (
    "application/zip",
    "application/x-ndjson",
)
"""What a batch can be answered as, the default first."""

INDEX_NAME: Final = "index.json"

_log: Any = structlog.get_logger("service.batch")

router = ServiceRouter(tags=["segmentation"])


class JsonLines(JSONResponse):
    """For OpenAPI alone: lines that are a `BatchItem` each."""

    media_type = "application/x-ndjson"


_REQUEST_BODY: Final = {
    "required": True,
    "description": f"The image files: the form field `{FIELD}`, once for each.",
    "content": {
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {
                    FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
            }
        }
    },
}
_ANSWER: Final = {
    "description": "By `Accept`, in the order of the images. An archive: the view of each in its "
    f"default form, named after its file, and `{INDEX_NAME}`, which maps images to files and "
    "problems. JSON lines: one `BatchItem` for each",
    "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {
        "X-Model": {"schema": {"type": "string"}, "description": "name/version"},
        "X-Request-ID": {"schema": {"type": "string"}},
    },
    "model": BatchItem,
}


@router.post(
    "/segment/batch",
    summary="Segment several photos",
    response_class=JsonLines,
    responses={200: _ANSWER, **documented(400, 404, 406, 408, 413, 422, 503)},
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def segment_batch(
    request: Request, service: ReadyServiceDep, options: OptionsDep
) -> Response:
    """Label every pixel of each photo.

    The answer begins with the first photo that is done. An image that cannot be answered does not
    stop the others: a problem stands in its place.
    """
    media_type = negotiate(request.headers.get("Accept"), BATCH_TYPES)
    engines, settings = service.engines, service.settings
    manifest = engines.manifest(options.model or engines.names[0])
    model = ModelName(name=manifest.name, version=manifest.version)
    async with AsyncExitStack() as resources:
        uploads = await resources.enter_async_context(
            open_images(request, settings.max_images, settings.max_images_bytes)
        )
        places = resources.enter_context(
            service.segmenter.hold(min(len(uploads), service.concurrency))
        )
        archived = media_type == "application/zip"
        if not archived:
            options = options.model_copy(update={"view": "json"})
        answers = await resources.enter_async_context(
            aclosing(
                in_order(
                    (_answer(request, service, upload, options) for upload in uploads),
                    places,
                )
            )
        )
        written = (
            _write_archive(answers, model, VIEWS[options.view].suffix)
            if archived
            else _write_lines(answers)
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
class _Answer:
    """An image's encoded answer or what was wrong with it; one of the two."""

    name: str
    content: bytes | None
    problem: Problem | None


async def _answer(request: Request, service: Service, upload: Upload, options: Options) -> _Answer:
    try:
        data = await upload.read(service.settings.max_bytes)
        result = await service.segmenter.segment_held(ViewJob.of(data, options))
    # One image must not fail the others, whatever it was.
    except Exception as exc:  # noqa: BLE001
        problem = embedded_problem(request.scope, exc)
        if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.exception("unforeseen error", image=upload.name)
        return _Answer(upload.name, None, problem)
    return _Answer(upload.name, result.content, None)


async def in_order(work: Iterable[Coroutine[Any, Any, T]], at_once: int) -> AsyncGenerator[T, None]:
    """The results of ``work`` in its order, so many of it running or waiting to be taken.

    The rest is cancelled when the iterator is closed.
    """
    running: deque[asyncio.Task[T]] = deque()
    try:
        for one in work:
            running.append(asyncio.create_task(one))
            if len(running) == at_once:
                yield await running[0]
                running.popleft()
        while running:
            yield await running[0]
            running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _write_lines(answers: AsyncIterator[_Answer]) -> AsyncGenerator[bytes, None]:
    index = 0
    async for answer in answers:
        item = BatchItem(index=index, name=answer.name, problem=answer.problem)
        line = item.model_dump_json(exclude_none=True).encode()
        if answer.content is not None:
            # Encoded already: reading it only to write it again would take as long as making it.
            line = line[:-1] + b',"segmentation":' + answer.content + b"}"
        yield line + b"\n"
        index += 1


async def _write_archive(
    answers: AsyncIterator[_Answer], model: ModelName, suffix: str
) -> AsyncGenerator[bytes, None]:
    archive = Archive()
    entries: list[BatchEntry] = []
    async for answer in answers:
        name = None
        if answer.content is not None:
            name = archive.name(answer.name, suffix)
            yield archive.add(name, answer.content)
        entries.append(
            BatchEntry(index=len(entries), name=answer.name, file=name, problem=answer.problem)
        )
    index = BatchIndex(model=model, images=entries)
    yield archive.add(INDEX_NAME, index.model_dump_json(indent=2, exclude_none=True).encode())
    yield archive.close()


class _Streamed(StreamingResponse):
    """A stream that ends when the client hangs up, and gives up ``resources`` when it ends."""

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
