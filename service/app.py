"""The composition root of HTTP: FastAPI in front of `service.runtime`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
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
from service.http.dependencies import LifespanState
from service.http.middleware import RequestContext
from service.http.routers import RouteFlags
from service.http.uploads import Leases
from service.inference.session import InferenceSession
from service.jobs.hugging_face import SegmentationParameters, SegmentationRequest
from service.jobs.label_studio import PredictRequest, SetupRequest
from service.jobs.open_inference import InferenceRequest
from service.routes import batch, catalogue, health, metrics, page, segment
from service.routes.protocols import hugging_face, label_studio, open_inference
from service.runtime import OpenEngines, open_service
from service.schemas import Problem
from service.settings import Settings
from service.telemetry.metrics import Metrics, Peers
from service.views import MIN_SIDE

if TYPE_CHECKING:  # needs the extra `tracing`
    from service.telemetry.tracing import Traces

API_VERSION: Final = "1"
"""The API's version; it changes when clients break. The package's version is not published."""

TRACES_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's variables that name the destination of traces. Without one there are none."""

DESCRIPTION: Final = (
    "Labels every pixel of a photo with one of the model's classes, PASCAL VOC's 21 by default.\n\n"
    "An unknown path gets 404, an unknown method 405 with `Allow`, a POST from another "
    "origin's page 403, and a foreign host 421, all as `application/problem+json`. Malformed HTTP "
    "gets 400, 408, 414, 429, 431, 501 or 505 in the same format; too many connections get 503."
)

GUARDED: Final = (
    segment.router,
    batch.router,
    catalogue.router,
    open_inference.router,
    hugging_face.router,
    label_studio.router,
)
"""Routers that need an API key and count towards the rate limit, if these are configured."""

OPEN: Final = (
    open_inference.health,
    label_studio.health,
    health.router,
    metrics.router,
    page.router,
)
"""Routers of probes and pages."""

_NO_TELEMETRY: Final[TelemetryConfig] = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
}

# Bodies that endpoints parse or write themselves.
_REFERENCED: Final = (
    Problem,
    InferenceRequest,
    open_inference.IndexRequest,
    SegmentationRequest,
    SegmentationParameters,
    PredictRequest,
    SetupRequest,
)


class Api(FastAPI):
    """FastAPI with a complete OpenAPI document.

    It adds the bodies that endpoints parse themselves and the range of ``max_side``, which is a
    setting. It removes FastAPI's own format of 422, which no endpoint uses.
    """

    max_side: int

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        if self.openapi_schema is None:
            description = super().openapi()
            schemas = description["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path in description["paths"].values():
                for operation in path.values():
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
                    for parameter in operation.get("parameters", ()):
                        if parameter["name"] == "max_side":
                            parameter["schema"] = {
                                "type": "integer",
                                "minimum": MIN_SIDE,
                                "maximum": self.max_side,
                            }
            _, referenced = models_json_schema(
                [(model, "validation") for model in _REFERENCED],
                ref_template="#/components/schemas/{model}",
            )
            schemas.update(referenced["$defs"])
        return super().openapi()


def create_app(
    settings: Settings,
    session: InferenceSession | None = None,
    *,
    open_engines: OpenEngines | None = None,
    peers: Peers | None = None,
) -> FastAPI:
    """Build the app; its lifespan loads the models.

    ``session`` replaces ONNX Runtime's; the artefact is still checked. ``open_engines`` replaces
    the loading of models in this process. ``peers`` are the other processes behind the same
    address; ``GET /metrics`` reports theirs too.
    Raises `SettingsError` if the API keys cannot be read or traces cannot be sent. The lifespan
    raises `SettingsError`, `ArtefactError` or `DeviceUnavailable`. Each message is one line.
    """
    collected = Metrics(problems.REASONS)
    flags = RouteFlags.of((*GUARDED, *OPEN))
    traces = _configured_traces(flags)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[LifespanState]:
        async with AsyncExitStack() as stack:
            if traces is not None:
                # Exited last, so that the spans of drained requests are sent too.
                await stack.enter_async_context(traces.sent())
            service = await stack.enter_async_context(
                open_service(settings, session, open_engines=open_engines, metrics=collected)
            )
            service.traces = traces
            if peers is not None:
                service.peers = peers
                await stack.enter_async_context(peers.answering(service.families))
            yield {"service": service}

    app = Api(
        title="FCN Segment",
        version=API_VERSION,
        description=DESCRIPTION,
        redirect_slashes=False,
        # Relative to the document, which a proxy may serve below a prefix.
        servers=[{"url": "."}],
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        telemetry=_NO_TELEMETRY if traces is None else traces.telemetry,
    )
    app.max_side = settings.max_side
    app.add_middleware(Leases)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("*",),
        )
    # Outermost, so that answers of other middleware get its headers and log lines too.
    app.add_middleware(RequestContext, metrics=collected, flags=flags)
    problems.add_handlers(app)
    _include_routers(app, Access.configured(settings))
    return app


def _include_routers(app: FastAPI, access: Access) -> None:
    for router in GUARDED:
        foreign = router.foreign_errors
        documented = problems.documented_errors if foreign else problems.documented
        app.include_router(
            router, dependencies=access.dependencies, responses=documented(*access.statuses)
        )
    for router in OPEN:
        app.include_router(router)


def _configured_traces(flags: RouteFlags) -> Traces | None:
    """Traces, if the environment names their endpoint. Raises `SettingsError`."""
    endpoint = next(filter(os.environ.get, TRACES_ENDPOINTS), None)
    if endpoint is None:
        return None
    try:
        from service.telemetry.tracing import Traces  # noqa: PLC0415  needs the extra `tracing`
    except ImportError as exc:
        raise SettingsError(f"{endpoint} is set: {exc}") from exc
    return Traces(exclude=flags.is_probe)


def with_state(app: ASGIApp, state: Mapping[str, Any]) -> ASGIApp:
    """``app`` with the lifespan's state in each request, as servers that run lifespans add it.

    For callers that run the lifespan themselves, such as `service.server.serving`.
    """

    async def stateful(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {**scope.get("state", {}), **state}}, receive, send)

    return stateful


def _operation_id(route: APIRoute) -> str:
    return route.name
