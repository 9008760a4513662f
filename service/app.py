"""The composition root: builds every resource, and takes each down again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service import __version__
from service.engines import CPU_QUEUE, GPU_QUEUE, Engines, find_artefacts, open_engine
from service.routes import catalogue, health, page, problems, segment
from service.routes.middleware import RequestContext
from service.routes.state import LifespanState, Phase, Service
from service.schemas import Problem
from service.segmenter import POOL_THREAD_NAME, Segmenter
from service.session import InferenceSession, available_cores
from service.settings import Settings


def create_app(settings: Settings, session: InferenceSession | None = None) -> FastAPI:
    """Build the app; nothing is loaded before its lifespan starts.

    A given ``session`` takes the place of ONNX Runtime's; the artefact is checked all the same.
    The lifespan raises `ArtefactError` or `DeviceUnavailable`, one line each.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[LifespanState]:
        async with open_service(settings, session) as service:
            yield {"service": service}

    app = FastAPI(
        title="FCN Segment",
        version=__version__,
        description="Labels every pixel of a photo with one of PASCAL VOC's 21 classes.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    app.add_middleware(RequestContext)
    problems.add_handlers(app)
    for family in (segment, catalogue, health, page):
        app.include_router(family.router)
    _document_problems(app)
    return app


@asynccontextmanager
async def open_service(
    settings: Settings, session: InferenceSession | None = None
) -> AsyncIterator[Service]:
    """Load, check and warm up everything; yields a ready service, and drains it at the end.

    Raises `ArtefactError` or `DeviceUnavailable`, with one line that says what differs.
    """
    default = await open_engine(settings, settings.model, session)
    beside = find_artefacts(settings.model.resolve().parent) if settings.models_memory_mb else {}
    engines = Engines(
        default,
        {**beside, default.model.contract.name: settings.model},
        partial(open_engine, settings),
        settings.models_memory_mb * 2**20,
    )
    on_gpu = default.model.gpu is not None
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
        )
        busy_with = min(workers + default.batcher.capacity, queue_size)
        service = Service(settings, engines, segmenter, busy_with)
        service.phase = Phase.READY
        try:
            yield service
        finally:
            service.begin_draining()
            await engines.close()


def with_state(app: ASGIApp, state: Mapping[str, Any]) -> ASGIApp:
    """``app`` with a lifespan's state laid into each request, as a server with lifespan does it.

    For whoever runs the lifespan themselves: `service.cli`, which wants its errors as they are.
    """

    async def stateful(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {**scope.get("state", {}), **state}}, receive, send)

    return stateful


def _operation_id(route: APIRoute) -> str:
    return route.name


def _document_problems(app: FastAPI) -> None:
    """Put `Problem` into the OpenAPI schema, and FastAPI's own form of 422 out of it."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = generate()["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            template = "#/components/schemas/{model}"
            problem = Problem.model_json_schema(ref_template=template)
            schemas.update(problem.pop("$defs"))
            schemas["Problem"] = problem
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
