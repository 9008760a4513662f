"""``/label-studio``: Label Studio's protocol for models that pre-label, with brush regions.

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
from service.errors import ImageError, MalformedRequest, RequestError
from service.http.dependencies import ReadyServiceDep
from service.http.disconnects import unless_gone
from service.http.problems import documented_errors
from service.http.routers import ServiceRouter
from service.http.uploads import read_body
from service.images.brush_rle import RowRuns
from service.images.decoding import decode
from service.inference.upsampling import Labels
from service.routes.protocols.label_config import BrushControl, parse_label_config
from service.routes.protocols.label_studio_images import LabelStudioImages
from service.routes.protocols.messages import Message, base64_bytes, parse
from service.runtime import Service
from service.schemas import Schema
from service.segmenter import Reading
from service.views import Scene

router = ServiceRouter(foreign_errors=True, prefix="/label-studio", tags=["label studio"])
health = ServiceRouter(
    foreign_errors=True, probe=True, prefix="/label-studio/health", tags=["label studio"]
)

# Tasks come with all their annotations and predictions.
_ENVELOPE_BYTES: Final = 8 * 2**20

_log: Any = structlog.get_logger("service.label_studio")


class Task(Message):
    """One task of a project; ``data`` holds its image under the key that the image's tag names."""

    data: dict[str, Any]


class PredictRequest(Message):
    """Tasks to pre-label."""

    tasks: list[Task]
    label_config: str = Field(description="the project's labelling configuration, XML")


class SetupRequest(Message):
    """A project that wants to be pre-labelled. Its host name and access token are not used."""

    label_schema: str | None = Field(
        None, alias="schema", description="the project's labelling configuration, XML"
    )


class BrushValue(Schema):
    """The pixels of one label."""

    format: Literal["rle"] = "rle"
    rle: list[int] = Field(description="rle-pack's bytes of the RGBA image, 255 or 0")
    brushlabels: list[str]


class BrushRegion(Schema):
    """One label that is present."""

    id: str
    type: Literal["brushlabels"] = "brushlabels"
    from_name: str
    to_name: str
    original_width: int
    original_height: int
    image_rotation: int = 0
    value: BrushValue
    score: float = Field(description="mean over the label's pixels of their probability, 0 to 1")


class Prediction(Schema):
    """What is in one task's image."""

    model_version: str
    score: float = Field(description="mean of its regions' scores, 0 to 1")
    result: list[BrushRegion]


class PredictResponse(Schema):
    """A prediction for each task, in order; an empty one where the image cannot be had."""

    results: list[Prediction]


class SetupResponse(Schema):
    """The model that will answer."""

    model_version: str


class BackendHealth(Schema):
    """Label Studio asks before it sends anything."""

    status: Literal["UP"] = "UP"
    model_class: str = "FCN Segment"


class WebhookAnswer(Schema):
    """Nothing is trained here."""

    status: Literal["ignored"] = "ignored"


_PREDICT_BODY: Final = {"$ref": f"#/components/schemas/{PredictRequest.__name__}"}
_SETUP_BODY: Final = {"$ref": f"#/components/schemas/{SetupRequest.__name__}"}


def _json_body(schema: dict[str, str]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@health.get("", summary="Ready, in Label Studio's words", responses=documented_errors(503))
async def label_studio_health(_: ReadyServiceDep) -> BackendHealth:
    """As `GET /readyz`."""
    return BackendHealth()


@router.post(
    "/setup",
    summary="Connect a project",
    responses=documented_errors(400, 408, 413, 422, 503),
    openapi_extra=_json_body(_SETUP_BODY),
)
async def label_studio_setup(request: Request, service: ReadyServiceDep) -> SetupResponse:
    """Checks that the project's configuration has something to pre-label; nothing is kept."""
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
    openapi_extra=_json_body(_PREDICT_BODY),
)
async def label_studio_predict(request: Request, service: ReadyServiceDep) -> Response:
    """A brush region for each label of the configuration that is found in a task's image.

    Images are `data:` URIs, or lie at the Label Studio that `FCN_LABEL_STUDIO_URL` names; nothing
    else is fetched.
    """
    body = await read_body(
        request,
        service.settings.max_bytes,
        base64_bytes(service.settings.max_bytes) - service.settings.max_bytes + _ENVELOPE_BYTES,
    )
    message = await asyncio.to_thread(parse, PredictRequest, body)
    controls = parse_label_config(message.label_config, _contract(service).labels)
    predictions = await unless_gone(request, _predict(service, message.tasks, controls))
    content = b'{"results":[' + b",".join(predictions) + b"]}"
    return Response(content, media_type="application/json")


@router.post("/webhook", summary="Hear of annotations")
async def label_studio_webhook() -> WebhookAnswer:
    """Label Studio tells each change of a project, and asks to train; both are ignored."""
    return WebhookAnswer()


async def _predict(
    service: Service, tasks: Sequence[Task], controls: Sequence[BrushControl]
) -> list[bytes]:
    """A prediction as JSON for each task.

    A bad image does not take the other tasks' predictions away: its own is empty. If all are bad,
    raises what is wrong with the last.
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
    """Where a task's image is."""
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
        return _regions(scene.labels, self.controls)


def _regions(labels: Labels, controls: Sequence[BrushControl]) -> list[BrushRegion]:
    height, width = labels.mask.shape
    runs = RowRuns.of(labels.mask)
    pixels = runs.counts()
    confidence = labels.class_confidence()
    regions = []
    for control in controls:
        for name, class_ids in control.labels.items():
            ids = sorted(class_ids)
            if not pixels[ids].any():
                continue
            value = BrushValue(rle=list(runs.brush(class_ids)), brushlabels=[name])
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
    """That of the model that answers, the default one."""
    return service.engines.default.model.contract


def _version(service: Service) -> str:
    """The version by which Label Studio distinguishes predictions."""
    contract = _contract(service)
    return f"{contract.name}-{contract.version}"
