"""``/label-studio``: Label Studio's protocol for ML backends; predictions are brush regions.

Sources: https://github.com/HumanSignal/label-studio-ml-backend, ``label_studio_ml/api.py``, and
https://labelstud.io/guide/predictions.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import structlog
from fastapi import Depends, Request, Response
from pydantic import Field

from service.artefact.contract import ModelContract
from service.errors import (
    DeadlineExceeded,
    ImageError,
    InvalidParameter,
    MalformedRequest,
    Overloaded,
    RequestError,
    SegmentError,
    WorkerLost,
)
from service.http.dependencies import ReadyServiceDep
from service.http.disconnects import unless_gone
from service.http.parameters import known_query
from service.http.problems import documented_errors
from service.http.routers import ServiceRouter
from service.http.uploads import lease_of, read_body
from service.jobs.label_studio import (
    BrushJob,
    BrushRegion,
    PredictRequest,
    ReadSetup,
    ReadTasks,
    SetupRequest,
)
from service.jobs.messages import DATA_URI, MAX_ANSWER_BYTES
from service.memory import Lease
from service.routes.protocols.label_studio_images import LabelStudioImages
from service.routes.protocols.messages import read_image_body, request_body
from service.runtime import Service
from service.schemas import Schema
from service.segmenter import SMALL_BYTES, Result
from service.workers.pool import Done

router = ServiceRouter(
    foreign_errors=True,
    prefix="/label-studio",
    tags=["label studio"],
    dependencies=[Depends(known_query)],
    responses=documented_errors(422),
)
health = ServiceRouter(
    foreign_errors=True, probe=True, prefix="/label-studio/health", tags=["label studio"]
)

# Tasks include all their annotations and predictions.
_ENVELOPE_BYTES: Final = 8 * 2**20

_log: Any = structlog.get_logger("service.label_studio")


class Prediction(Schema):
    """The regions of one task's image."""

    model_version: str
    score: float = Field(description="mean of its regions' scores, 0 to 1")
    result: list[BrushRegion]


class PredictResponse(Schema):
    """A prediction for each task, in order; an empty one for an image that failed."""

    results: list[Prediction]


class SetupResponse(Schema):
    """The model that predicts."""

    model_version: str


class BackendHealth(Schema):
    """Label Studio's health check."""

    status: Literal["UP"] = "UP"
    model_class: str = "FCN Segment"


class WebhookAnswer(Schema):
    """The service does not train on annotations."""

    status: Literal["ignored"] = "ignored"


@health.get("", summary="Ready, for Label Studio", responses=documented_errors(503))
async def label_studio_health(_: ReadyServiceDep) -> BackendHealth:
    """The same as `GET /readyz`."""
    return BackendHealth()


@router.post(
    "/setup",
    summary="Connect a project",
    responses=documented_errors(400, 408, 413, 422, 503, 504),
    openapi_extra=request_body(SetupRequest),
)
async def label_studio_setup(request: Request, service: ReadyServiceDep) -> SetupResponse:
    """Checks that a label of the project stands for a class. The service stores nothing."""
    body = await read_body(request, _ENVELOPE_BYTES)
    task = ReadSetup(_contract(service).labels, SMALL_BYTES)
    await unless_gone(request, _read(service, task, body, lease_of(request)))
    return SetupResponse(model_version=_version(service))


@router.post(
    "/predict",
    summary="Pre-label tasks",
    response_class=Response,
    responses={
        200: {"description": "The predictions", "model": PredictResponse},
        **documented_errors(400, 408, 413, 415, 422, 502, 503, 504),
    },
    openapi_extra=request_body(PredictRequest),
)
async def label_studio_predict(request: Request, service: ReadyServiceDep) -> Response:
    """Returns a brush region for each of the configuration's labels found in a task's image.

    Images are `data:` URIs or files of the Label Studio at `FCN_LABEL_STUDIO_URL`. The service
    fetches nothing else.
    """
    work = _predict(
        service,
        await read_image_body(request, service.settings, _ENVELOPE_BYTES),
        lease_of(request),
    )
    return Response(await unless_gone(request, work), media_type="application/json")


@router.post("/webhook", summary="Receive events")
async def label_studio_webhook() -> WebhookAnswer:
    """Label Studio reports changes of a project and requests training. Both are ignored."""
    return WebhookAnswer()


async def _read(service: Service, task: ReadSetup | ReadTasks, body: bytes, lease: Lease) -> Done:
    """Read a message in a worker, again with more memory if it needs more."""
    done = await service.segmenter.work(task, body, task.memory_bytes, lease)
    if "needs" not in done.facts:
        return done
    task = replace(task, memory_bytes=done.facts["needs"])
    done = await service.segmenter.work(task, body, task.memory_bytes, lease)
    if "needs" in done.facts:  # a worker under the control of what it read
        raise MalformedRequest("the JSON crashed its reader")
    return done


async def _predict(service: Service, body: bytes, lease: Lease) -> bytes:
    """A prediction for each task as JSON; an empty one for an image that failed.

    The request holds one place, so one image is segmented after the other. If all tasks failed,
    raises the error of the last.
    """
    with service.segmenter.hold(), _fetching_thread() as fetching:
        if service.settings.label_studio_url is not None:
            lease.take_body(service.settings.max_bytes)  # for the image that is fetched
        read = await _read(service, ReadTasks(_contract(service).labels, SMALL_BYTES), body, lease)
        del body  # its memory is now that of the images
        brush = _Brush(service, lease, fetching, controls=read.parts[1])
        tasks = read.facts["images"]
        answer: list[bytes] = []
        failed: list[SegmentError] = []
        for images in _images(read.parts[0], tasks):
            found: list[Result] = []
            try:
                for key, image in zip(read.facts["keys"], images, strict=True):
                    found.append(await brush.regions(key, image))
            except (RequestError, ImageError, Overloaded, WorkerLost, DeadlineExceeded) as exc:
                failed.append(exc)
                found = []
            answer += [b"," if answer else b"", *_prediction(service, found)]
            if sum(map(len, answer)) > MAX_ANSWER_BYTES:
                raise InvalidParameter(
                    f"tasks: an answer may have at most {MAX_ANSWER_BYTES >> 20} MiB: send fewer"
                )
    if failed:
        _log.warning("no predictions", tasks=len(failed), of=len(tasks), reason=str(failed[-1]))
    if failed and len(failed) == len(tasks):
        raise failed[-1]
    return b"".join([b'{"results": [', *answer, b"]}"])


@dataclass(frozen=True, slots=True)
class _Brush:
    """Finds regions in the images of one request. ``controls``: see `BrushJob`."""

    service: Service
    lease: Lease
    fetching: ThreadPoolExecutor
    controls: bytes

    async def regions(self, key: str, image: bytes | None) -> Result:
        """The regions in an image, which is a ``data:`` URI or a URL."""
        if image is None:
            raise MalformedRequest(f"tasks: data has no image in {key!r:.80}")
        settings = self.service.settings
        if not image.startswith(DATA_URI):
            fetch = LabelStudioImages.configured(settings).fetch
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(self.fetching, fetch, image)
        job = BrushJob(key, self.controls, settings.max_bytes)
        return await self.service.segmenter.segment_held(job, image, self.lease)


@contextmanager
def _fetching_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread that fetches images: a slow Label Studio must not take those that others use."""
    executor = ThreadPoolExecutor(1)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _images(texts: bytes, lengths: Sequence[Sequence[int | None]]) -> Iterator[list[bytes | None]]:
    """The images of each task; see `ReadTasks`."""
    offset = 0
    for task in lengths:
        images: list[bytes | None] = []
        for length in task:
            images.append(None if length is None else texts[offset : offset + length])
            offset += length or 0
        yield images


def _prediction(service: Service, found: Sequence[Result]) -> list[bytes]:
    """A `Prediction` of the regions found in a task's images, as pieces of JSON."""
    regions = sum(result.facts["regions"] for result in found)
    score = sum(result.facts["score"] for result in found) / max(1, regions)
    members = json.dumps({"model_version": _version(service), "score": score})
    pieces = [members[:-1].encode() + b', "result": [']
    for result in found:
        if result.content:
            # Its regions are JSON already.
            pieces += [b"," if len(pieces) > 1 else b"", result.content]
    return [*pieces, b"]}"]


def _contract(service: Service) -> ModelContract:
    """The contract of the default model, which answers."""
    return service.engines.default.model.contract


def _version(service: Service) -> str:
    """The model version by which Label Studio groups predictions."""
    contract = _contract(service)
    return f"{contract.name}-{contract.version}"
