"""The composition root: builds every resource, and takes each down again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import SettingsError
from service.http import problems
from service.http.access import Access
from service.http.dependencies import LifespanState, Phase, Service
from service.http.middleware import RequestContext
from service.http.observation import is_probe
from service.images.decoding import keep_readers_quiet
from service.inference.engine import CPU_QUEUE, GPU_QUEUE, open_engine
from service.inference.engines import Engines
from service.inference.session import InferenceSession, available_cores
from service.routes import batch, catalogue, health, metrics, page, segment
from service.routes.protocols import hugging_face, label_studio, open_inference
from service.routes.protocols.tensors import InferenceRequest
from service.schemas import Problem
from service.segmenter import POOL_THREAD_NAME, Segmenter
from service.settings import Settings
from service.telemetry.metrics import Metrics, Peers

if TYPE_CHECKING:  # it needs the extra `tracing`
    from service.telemetry.tracing import Traces

API_VERSION: Final = "1"
"""Of the API: another one breaks clients. Which release answers is not told to everybody."""

TRACES_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Variables of OpenTelemetry that switch traces on: where to send them."""

DESCRIPTION: Final = (
    "Labels every pixel of a photo with one of PASCAL VOC's 21 classes.\n\n"
    "A path that is not here is answered 404, another method 405 with `Allow`, both as "
    "`application/problem+json`, and so is what is no request at all: 400, 408, 414, 429, 431, "
    "501 or 505, and 503 where there are too many connections."
)

OpenEngines = Callable[[Settings, Metrics], Awaitable[Engines]]
"""What gets the engines that a service works with."""

_NO_TELEMETRY: Final[TelemetryConfig] = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
}

# Bodies that endpoints read and write by hand.
_REFERRED_TO: Final = (
    Problem,
    InferenceRequest,
    open_inference.IndexRequest,
    hugging_face.SegmentationRequest,
    hugging_face.SegmentationParameters,
    label_studio.PredictRequest,
    label_studio.SetupRequest,
)


def create_app(
    settings: Settings,
    session: InferenceSession | None = None,
    *,
    open_engines: OpenEngines | None = None,
    peers: Peers | None = None,
) -> FastAPI:
    """Build the app; nothing is loaded before its lifespan starts.

    A given ``session`` takes the place of ONNX Runtime's; the artefact is checked all the same.
    ``open_engines`` takes the place of loading models in this process; ``peers`` are the other
    processes behind the same address, whose metrics are told with this one's.
    Raises `SettingsError` for API keys that cannot be read or traces that cannot be sent; so does
    its lifespan, and `ArtefactError` or `DeviceUnavailable`; one line each.
    """
    collected = Metrics(problems.REASONS)
    traces = _configured_traces()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[LifespanState]:
        async with AsyncExitStack() as stack:
            if traces is not None:
                # Left last, so that the spans of what is drained are sent too.
                await stack.enter_async_context(traces.sent())
            service = await stack.enter_async_context(
                open_service(settings, session, open_engines=open_engines, collected=collected)
            )
            service.traces = traces
            if peers is not None:
                service.peers = peers
                families = partial(metrics.families, service)
                await stack.enter_async_context(peers.answering(families))
            yield {"service": service}

    app = FastAPI(
        title="FCN Segment",
        version=API_VERSION,
        description=DESCRIPTION,
        redirect_slashes=False,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        telemetry=_NO_TELEMETRY if traces is None else traces.telemetry,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("*",),
        )
    # Around all others, so that their answers have its headers and lines too.
    app.add_middleware(RequestContext, metrics=collected)
    problems.add_handlers(app)
    _include_routers(app, Access.configured(settings))
    _document_problems(app, settings)
    return app


@asynccontextmanager
async def open_service(
    settings: Settings,
    session: InferenceSession | None = None,
    *,
    open_engines: OpenEngines | None = None,
    collected: Metrics | None = None,
) -> AsyncIterator[Service]:
    """Load, check and warm up everything; yields a ready service, and drains it at the end.

    Raises `ArtefactError` or `DeviceUnavailable`, with one line that says what differs.
    """
    keep_readers_quiet()
    collected = collected or Metrics()
    if open_engines is None:
        engines = await _load_engines(settings, collected, session)
    else:
        engines = await open_engines(settings, collected)
    # No engine by a name of its own here: one that was replaced would never be freed.
    on_gpu = engines.default.model.gpu is not None
    queue_size = settings.queue_size or (GPU_QUEUE if on_gpu else CPU_QUEUE)
    # Beside a GPU all cores decode, so that it never waits for a photo; on a CPU the network
    # needs them itself.
    workers = settings.decode_workers or (available_cores() if on_gpu else 2)
    with ThreadPoolExecutor(workers, thread_name_prefix=POOL_THREAD_NAME) as pool:
        segmenter = Segmenter(
            engines,
            pool,
            max_pixels=settings.max_pixels,
            max_in_flight=queue_size,
            deadline_s=settings.deadline_s,
            metrics=collected,
        )
        busy_with = min(workers + engines.default.batcher.capacity, queue_size)
        service = Service(settings, engines, segmenter, busy_with, collected)
        service.phase = Phase.READY
        try:
            yield service
        finally:
            service.begin_draining()
            await engines.close()


async def _load_engines(
    settings: Settings, collected: Metrics, session: InferenceSession | None
) -> Engines:
    """Load the default model in this process; those beside it wait to be asked for."""
    return Engines(
        await open_engine(settings, collected, settings.model, session),
        settings.model,
        partial(open_engine, settings, collected),
        settings.models_memory_mb * 2**20,
        collected.reload,
    )


def _configured_traces() -> Traces | None:
    """Traces, if the environment names an endpoint for them. Raises `SettingsError`."""
    endpoint = next(filter(os.environ.get, TRACES_ENDPOINTS), None)
    if endpoint is None:
        return None
    try:
        from service.telemetry.tracing import Traces  # noqa: PLC0415  the extra brings what it needs
    except ImportError as exc:
        raise SettingsError(f"{endpoint} is set: {exc}") from exc
    return Traces(exclude=is_probe)


def with_state(app: ASGIApp, state: Mapping[str, Any]) -> ASGIApp:
    """``app`` with a lifespan's state laid into each request, as a server with lifespan does it.

    For whoever runs the lifespan themselves: `service.cli`, which wants its errors as they are.
    """

    async def stateful(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {**scope.get("state", {}), **state}}, receive, send)

    return stateful


def _include_routers(app: FastAPI, access: Access) -> None:
    """All endpoints. Nobody needs a key to see that the service lives, or to open its pages."""
    for family in (segment, batch, catalogue):
        app.include_router(
            family.router,
            dependencies=access.dependencies,
            responses=problems.documented(*access.statuses),
        )
    for protocol in (open_inference, hugging_face, label_studio):
        app.include_router(
            protocol.router,
            dependencies=access.dependencies,
            responses=problems.documented_errors(*access.statuses),
        )
    for router in (open_inference.health, label_studio.health, health.router, metrics.router):
        app.include_router(router)
    app.include_router(page.router)


def _operation_id(route: APIRoute) -> str:
    return route.name


def _document_problems(app: FastAPI, settings: Settings) -> None:
    """Put what is only referred to into the OpenAPI schema, and FastAPI's own 422 out of it.

    And the range of ``max_side``, which is a setting.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = generate()
            schemas = description["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path in description["paths"].values():
                for operation in path.values():
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
                    for parameter in operation.get("parameters", ()):
                        if parameter["name"] == "max_side":
                            parameter["schema"] |= {
                                "minimum": settings.min_side,
                                "maximum": settings.max_side,
                            }
            _, referred = models_json_schema(
                [(model, "validation") for model in _REFERRED_TO],
                ref_template="#/components/schemas/{model}",
            )
            schemas.update(referred["$defs"])
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
