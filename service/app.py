"""The composition root: builds every resource, and takes each down again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service import __version__
from service.batcher import Batcher
from service.routes import catalogue, health, problems, segment
from service.routes.middleware import RequestContext
from service.routes.state import LifespanState, Phase, Service
from service.schemas import Problem
from service.segmenter import POOL_THREAD_NAME, InputImage, Logits, Segmenter, run_batch
from service.session import InferenceSession, load_model
from service.settings import Settings

_log: Any = structlog.get_logger("service.app")


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
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    app.add_middleware(RequestContext)
    problems.add_handlers(app)
    for family in (segment, catalogue, health):
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
    model = await asyncio.to_thread(
        load_model,
        settings.model,
        settings.device,
        settings.threads,
        session,
        settings.precision,
    )
    await asyncio.to_thread(model.warm_up)
    _log.info(
        "model ready",
        model=f"{model.contract.name}/{model.contract.version}",
        file=model.file_name,
        provider=model.provider,
    )
    batcher = Batcher[InputImage, Logits](
        partial(run_batch, model, model.session),
        shares=[partial(run_batch, model, share) for share in model.shares],
        max_batch=settings.max_batch,
        max_wait_s=settings.max_wait_ms / 1000,
        max_queue=settings.queue_size,
    )
    with ThreadPoolExecutor(settings.decode_workers, thread_name_prefix=POOL_THREAD_NAME) as pool:
        segmenter = Segmenter(
            model,
            batcher,
            pool,
            max_pixels=settings.max_pixels,
            max_in_flight=settings.queue_size,
            deadline_s=settings.deadline_s,
        )
        service = Service(settings, model, segmenter)
        service.phase = Phase.READY
        try:
            yield service
        finally:
            service.begin_draining()
            await batcher.close()


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
