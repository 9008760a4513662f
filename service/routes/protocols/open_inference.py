"""``/v2``: the Open Inference Protocol over REST, for the clients of Triton and KServe.

Sources: https://github.com/kserve/open-inference-protocol, ``inference_rest.md``, and Triton's
``extension_binary_data.md`` and ``extension_model_repository.md``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Depends, Header, Request, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from service import __version__
from service.errors import Draining, MalformedRequest, ModelUnavailable, UnknownModel
from service.http.dependencies import ReadyServiceDep, ServiceDep
from service.http.disconnects import unless_gone
from service.http.parameters import known_query
from service.http.problems import documented_errors
from service.http.responses import answer_headers
from service.http.routers import ServiceRouter
from service.http.uploads import lease_of, read_body
from service.jobs.messages import Message, parse
from service.jobs.open_inference import (
    CONFIDENCE,
    IMAGE,
    MASK,
    InferenceJob,
    InferenceRequest,
    InferenceResponse,
)
from service.routes.protocols.messages import BINARY, read_image_body, request_body
from service.runtime import Service
from service.schemas import Schema

router = ServiceRouter(
    foreign_errors=True,
    prefix="/v2",
    tags=["open inference protocol"],
    dependencies=[Depends(known_query)],
    responses=documented_errors(422),
)
health = ServiceRouter(
    foreign_errors=True, probe=True, prefix="/v2/health", tags=["open inference protocol"]
)

JSON_LENGTH: Final = "Inference-Header-Content-Length"

# The JSON around a tensor: ids and parameters are short.
_ENVELOPE_BYTES: Final = 64 * 1024
_INDEX_BYTES: Final = 4096

_INFER: Final[dict[str, Any]] = {
    "response_class": Response,
    "responses": {
        200: {
            "description": "The outputs; with binary data, the tensors after the JSON",
            "model": InferenceResponse,
            "content": {"application/json": {}, "application/octet-stream": BINARY},
            "headers": {
                JSON_LENGTH: {
                    "schema": {"type": "integer"},
                    "description": "bytes of JSON before the binary data, if there is any",
                }
            },
        },
        **documented_errors(400, 404, 408, 413, 415, 422, 503, 504),
    },
    "openapi_extra": request_body(InferenceRequest, binary=True),
}


class ServerMetadata(Schema):
    """The server's name and version, and its extensions of the protocol."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(Schema):
    """Whether the server is alive."""

    live: bool


class ServerReady(Schema):
    """Whether the server accepts photos."""

    ready: bool


class ModelReady(Schema):
    """Whether a model accepts photos."""

    name: str
    ready: bool


class TensorMetadata(Schema):
    """An input or an output; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Schema):
    """A model's inputs, outputs and classes."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, str] = Field(
        description="`classes`: the names of the mask's values in order, comma-separated, of a "
        "model that is in memory"
    )


class IndexRequest(Message):
    """Which models to list."""

    ready: bool = Field(False, description="only models that accept photos")


class IndexEntry(Schema):
    """A model of the repository. A model that is not loaded is ready: a request loads it."""

    name: str
    version: str
    state: str = Field(description="READY or UNAVAILABLE")
    reason: str


@router.get("", summary="The server's metadata")
async def server_metadata() -> ServerMetadata:
    """Name, version and the extensions of the protocol."""
    return ServerMetadata(
        name="fcn-segment", version=__version__, extensions=["binary_tensor_data"]
    )


@health.get("/live", summary="Alive")
async def server_live() -> ServerLive:
    """The same as `GET /healthz`."""
    return ServerLive(live=True)


@health.get("/ready", summary="Ready", responses=documented_errors(503))
async def server_ready(_: ReadyServiceDep) -> ServerReady:
    """The same as `GET /readyz`."""
    return ServerReady(ready=True)


@router.get("/models/{name}", summary="A model's metadata", responses=documented_errors(404, 503))
async def model_metadata(service: ServiceDep, name: str) -> ModelMetadata:
    """The model's inputs and outputs. `image` may also be BYTES `[1]`, an image file."""
    return _metadata(service, name)


@router.get(
    "/models/{name}/versions/{version}",
    summary="A model version's metadata",
    responses=documented_errors(404, 503),
)
async def model_version_metadata(service: ServiceDep, name: str, version: str) -> ModelMetadata:
    """The metadata of a model's only version."""
    _check_version(service, name, version)
    return _metadata(service, name)


@router.get(
    "/models/{name}/ready", summary="A model is ready", responses=documented_errors(404, 503)
)
async def model_ready(service: ReadyServiceDep, name: str) -> ModelReady:
    """The model accepts photos. The first photo loads a model that is not in memory."""
    service.engines.manifest(name)
    return ModelReady(name=name, ready=True)


@router.get(
    "/models/{name}/versions/{version}/ready",
    summary="A model version is ready",
    responses=documented_errors(404, 503),
)
async def model_version_ready(service: ReadyServiceDep, name: str, version: str) -> ModelReady:
    """The readiness of a model's only version."""
    _check_version(service, name, version)
    return ModelReady(name=name, ready=True)


@router.post("/models/{name}/infer", summary="Segment a photo with a model", **_INFER)
async def infer(
    request: Request,
    service: ReadyServiceDep,
    name: str,
    json_length: Annotated[
        str | None, Header(alias=JSON_LENGTH, description="bytes of JSON before binary data")
    ] = None,
) -> Response:
    """One photo in, `mask` and `confidence` out: UINT8 of the photo's size.

    `image` is UINT8 `[H, W, 3]` RGB, with or without a leading 1, or BYTES `[1]`, an image file in
    a format that `POST /segment` accepts (in JSON as base64). Without a list of outputs the answer
    has both; `mask` alone is faster.
    """
    return await _infer(request, service, name, json_length)


@router.post(
    "/models/{name}/versions/{version}/infer",
    summary="Segment a photo with a version of a model",
    **_INFER,
)
async def infer_version(
    request: Request,
    service: ReadyServiceDep,
    name: str,
    version: str,
    json_length: Annotated[
        str | None, Header(alias=JSON_LENGTH, description="bytes of JSON before binary data")
    ] = None,
) -> Response:
    """The same as without a version: a model has only one."""
    _check_version(service, name, version)
    return await _infer(request, service, name, json_length)


@router.post(
    "/repository/index",
    summary="All models",
    responses=documented_errors(400, 408, 413, 503),
    openapi_extra=request_body(IndexRequest, required=False),
)
async def repository_index(request: Request, service: ServiceDep) -> list[IndexEntry]:
    """The models of `GET /models`, the default first."""
    wanted = parse(IndexRequest, await read_body(request, _INDEX_BYTES) or b"{}")
    entries = [_entry(service, name) for name in service.engines.names]
    return [entry for entry in entries if entry.state == "READY" or not wanted.ready]


async def _infer(
    request: Request, service: Service, name: str, json_length: str | None
) -> Response:
    service.engines.manifest(name)  # an unknown model is refused before its body is read
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise HTTPException(415, "Content-Encoding: the request must not be compressed")
    body = await read_image_body(request, service.settings, _ENVELOPE_BYTES)
    settings = service.settings
    json_bytes = _json_bytes(json_length, len(body))
    job = InferenceJob(name, json_bytes, settings.max_bytes, settings.max_side)
    result = await unless_gone(request, service.segmenter.segment(job, body, lease_of(request)))
    answered, headers = result.facts["json_bytes"], answer_headers(result)
    if answered is None:
        return Response(result.content, media_type="application/json", headers=headers)
    headers[JSON_LENGTH] = str(answered)
    return Response(result.content, media_type="application/octet-stream", headers=headers)


def _json_bytes(header: str | None, body_bytes: int) -> int | None:
    if header is None:
        return None
    # No body needs more digits, and parsing thousands of them is slow.
    if not (header.isascii() and header.isdecimal() and len(header) < 20):
        raise MalformedRequest(f"{JSON_LENGTH}: must be a number of bytes")
    if int(header) > body_bytes:
        raise MalformedRequest(f"{JSON_LENGTH}: exceeds the body's {body_bytes} bytes")
    return int(header)


def _check_version(service: Service, name: str, version: str) -> None:
    served = service.engines.manifest(name).version
    if version != served:
        raise UnknownModel(f"model {name} has no version {version!r:.80}; its version is {served}")


def _metadata(service: Service, name: str) -> ModelMetadata:
    model = service.engines.loaded(name)
    return ModelMetadata(
        name=name,
        versions=[service.engines.manifest(name).version],
        platform="onnxruntime_onnx",
        inputs=[TensorMetadata(name=IMAGE, datatype="UINT8", shape=[-1, -1, 3])],
        outputs=[
            TensorMetadata(name=output, datatype="UINT8", shape=[-1, -1])
            for output in (MASK, CONFIDENCE)
        ],
        parameters={} if model is None else {"classes": ",".join(model.contract.labels.names)},
    )


def _entry(service: Service, name: str) -> IndexEntry:
    version, reason = "", ""
    try:
        version = service.engines.manifest(name).version
        service.require_ready()
    except (ModelUnavailable, Draining) as exc:
        reason = str(exc)
    state = "UNAVAILABLE" if reason else "READY"
    return IndexEntry(name=name, version=version, state=state, reason=reason)
