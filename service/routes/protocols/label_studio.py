"""``/label-studio``: Label Studio's protocol for ML backends; predictions are brush regions.

Sources: https://github.com/HumanSignal/label-studio-ml-backend, ``label_studio_ml/api.py``, and
https://labelstud.io/guide/predictions.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import structlog
from fastapi import Request, Response
from pydantic import Field

from service.artefact.contract import ModelContract
from service.artefact.labels import LabelSet
from service.errors import ImageError, MalformedRequest, RequestError
from service.http.dependencies import ReadyServiceDep
from service.http.disconnects import unless_gone
from service.http.problems import documented_errors
from service.http.routers import ServiceRouter
from service.http.uploads import read_body
from service.images.brush_rle import RowRuns
from service.images.decoding import decode
from service.inference.upsampling import Labels
from service.routes.protocols.label_config import (
    BrushControl,
    class_ids,
    parse_label_config,
)
from service.routes.protocols.label_studio_images import LabelStudioImages
from service.routes.protocols.messages import Message, parse, read_image_body, request_body
from service.runtime import Service
from service.schemas import Schema
from service.segmenter import Reading
from service.views import Scene

router = ServiceRouter(foreign_errors=True, prefix="/label-studio", tags=["label studio"])
health = ServiceRouter(
    foreign_errors=True, probe=True, prefix="/label-studio/health", tags=["label studio"]
)

# Tasks include all their annotations and predictions.
_ENVELOPE_BYTES: Final = 8 * 2**20

_log: Any = structlog.get_logger("service.label_studio")


class Task(Message):
    """One task of a project; ``data`` has its image under the key in the configuration."""

    data: dict[str, Any]


class PredictRequest(Message):
    """Tasks to pre-label."""

    tasks: list[Task]
    label_config: str = Field(description="the project's labelling configuration, XML")


class SetupRequest(Message):
    """A project to connect. Its host name and access token are not used."""

    label_schema: str | None = Field(
        None, alias="schema", description="the project's labelling configuration, XML"
    )


class BrushValue(Schema):
    """The pixels of one label."""

    format: Literal["rle"] = "rle"
    rle: list[int] = Field(description="the RGBA image, 255 or 0, encoded by rle-pack")
    brushlabels: list[str]


class BrushRegion(Schema):
    """The region of one label."""

    id: str
    type: Literal["brushlabels"] = "brushlabels"
    from_name: str
    to_name: str
    original_width: int
    original_height: int
    image_rotation: int = 0
    value: BrushValue
    score: float = Field(description="mean probability of the label over its pixels, 0 to 1")


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
    responses=documented_errors(400, 408, 413, 422, 503),
    openapi_extra=request_body(SetupRequest),
)
async def label_studio_setup(request: Request, service: ReadyServiceDep) -> SetupResponse:
    """Checks that a label of the project stands for a class. The service stores nothing."""
    setup = parse(SetupRequest, await read_body(request, _ENVELOPE_BYTES))
    if setup.label_schema is not None:
        parse_label_config(setup.label_schema, _contract(service).labels)
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
    body = await read_image_body(request, service.settings, _ENVELOPE_BYTES)
    message = await asyncio.to_thread(parse, PredictRequest, body)
    controls = parse_label_config(message.label_config, _contract(service).labels)
    predictions = await unless_gone(request, _predict(service, message.tasks, controls))
    content = b'{"results":[' + b",".join(predictions) + b"]}"
    return Response(content, media_type="application/json")


@router.post("/webhook", summary="Receive events")
async def label_studio_webhook() -> WebhookAnswer:
    """Label Studio reports changes of a project and requests training. Both are ignored."""
    return WebhookAnswer()


async def _predict(
    service: Service, tasks: Sequence[Task], controls: Sequence[BrushControl]
) -> list[bytes]:
    """A prediction as JSON for each task; an empty one for an image that failed.

    If all images failed, raises the error of the last.
    """
    images = LabelStudioImages.configured(service.settings)
    predictions = []
    failed: list[RequestError | ImageError] = []
    for number, task in enumerate(tasks):
        regions: list[BrushRegion] = []
        try:
            for key in dict.fromkeys(control.data_key for control in controls):
                data = await asyncio.to_thread(images.read, _reference(task, key))
                here = [control for control in controls if control.data_key == key]
                regions += (await service.segmenter.segment(_BrushJob(data, here))).content
        except (RequestError, ImageError) as exc:
            _log.warning("no prediction", task=number, reason=str(exc))
            failed.append(exc)
            regions = []
        score = sum(region.score for region in regions) / max(1, len(regions))
        prediction = Prediction(model_version=_version(service), score=score, result=regions)
        predictions.append(prediction.model_dump_json().encode())
    if failed and len(failed) == len(tasks):
        raise failed[-1]
    return predictions


def _reference(task: Task, key: str) -> str:
    """The reference to a task's image."""
    reference = task.data.get(key)
    if not isinstance(reference, str):
        raise MalformedRequest(f"tasks: data has no image in {key!r:.80}")
    return reference


@dataclass(frozen=True, slots=True)
class _BrushJob:
    """The labels found in an image file, in the configuration's order, as a `Job`."""

    data: bytes
    controls: Sequence[BrushControl]
    model: None = None

    def read(self, max_pixels: int, contract: ModelContract) -> Reading:
        side = contract.working_size
        photo = decode(self.data, max_pixels, side)
        return Reading(photo, side, with_confidence=True, file_bytes=len(self.data))

    def write(self, scene: Scene) -> list[BrushRegion]:
        # By the answering model's own classes: a reload may have replaced the one that the
        # configuration was checked against.
        return _regions(scene.labels, scene.contract.labels, self.controls)


def _regions(
    labels: Labels, label_set: LabelSet, controls: Sequence[BrushControl]
) -> list[BrushRegion]:
    height, width = labels.mask.shape
    runs = RowRuns.of(labels.mask)
    pixels = runs.counts()
    confidence = labels.class_confidence()
    regions = []
    for control in controls:
        for name, names in control.labels.items():
            ids = sorted(class_ids(names, label_set))
            if not pixels[ids].any():
                continue
            value = BrushValue(rle=list(runs.brush(ids)), brushlabels=[name])
            regions.append(
                BrushRegion(
                    id=uuid.uuid4().hex[:10],
                    from_name=control.from_name,
                    to_name=control.to_name,
                    original_width=width,
                    original_height=height,
                    value=value,
                    score=float(np.average(confidence[ids], weights=pixels[ids])),
                )
            )
    return regions


def _contract(service: Service) -> ModelContract:
    """The contract of the default model, which answers."""
    return service.engines.default.model.contract


def _version(service: Service) -> str:
    """The model version by which Label Studio groups predictions."""
    contract = _contract(service)
    return f"{contract.name}-{contract.version}"
