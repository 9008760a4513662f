"""The composition root: builds every resource, and takes each down again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp, Receive, Scope, Send

from service import __version__
from service.engines import CPU_QUEUE, GPU_QUEUE, Engines, find_artefacts, open_engine
from service.metrics import Metrics, Peers
from service.routes import (
    batch,
    catalogue,
    health,
    hugging_face,
    label_studio,
    metrics,
    open_inference,
    page,
    problems,
    segment,
)
from service.routes.middleware import RequestContext
from service.routes.state import LifespanState, Phase, Service
from service.routes.tensors import InferenceRequest
from service.schemas import Problem
from service.segmenter import POOL_THREAD_NAME, Segmenter
from service.session import InferenceSession, available_cores
from service.settings import Settings

OpenEngines = Callable[[Settings, Metrics], Awaitable[Engines]]
"""What gets the engines that a service works with."""

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
    The lifespan raises `ArtefactError` or `DeviceUnavailable`, one line each.
    """
    collected = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[LifespanState]:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(
                open_service(settings, session, open_engines=open_engines, collected=collected)
            )
            if peers is not None:
                service.peers = peers
                families = partial(metrics.families, service)
                await stack.enter_async_context(peers.answering(families))
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
    app.add_middleware(RequestContext, metrics=collected)
    problems.add_handlers(app)
    protocols = (open_inference, hugging_face, label_studio)
    for family in (segment, batch, *protocols, catalogue, health, metrics, page):
        app.include_router(family.router)
    _document_problems(app)
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
    collected = collected or Metrics()
    if open_engines is None:
        engines = await _load_engines(settings, collected, session)
    else:
        engines = await open_engines(settings, collected)
    default = engines.default
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
            metrics=collected,
        )
        busy_with = min(workers + default.batcher.capacity, queue_size)
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
    default = await open_engine(settings, collected, settings.model, session)
    beside = find_artefacts(settings.model.resolve().parent) if settings.models_memory_mb else {}
    return Engines(
        default,
        {**beside, default.model.contract.name: settings.model},
        partial(open_engine, settings, collected),
        settings.models_memory_mb * 2**20,
    )


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
    """Put what is only referred to into the OpenAPI schema, and FastAPI's own 422 out of it."""
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
            _, referred = models_json_schema(
                [(model, "validation") for model in _REFERRED_TO],
                ref_template="#/components/schemas/{model}",
            )
            schemas.update(referred["$defs"])
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
