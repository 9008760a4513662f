"""The composition root: builds every resource, and takes each down again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service import __version__
from service.batcher import Batcher
from service.cuda import CudaDevice
from service.lanes import Lane, Task
from service.routes import catalogue, health, problems, segment
from service.routes.middleware import RequestContext
from service.routes.state import LifespanState, Phase, Service
from service.schemas import Problem
from service.segmenter import POOL_THREAD_NAME, Output, Segmenter, run_batch
from service.session import (
    DeviceOptions,
    InferenceSession,
    Model,
    available_cores,
    load_model,
)
from service.settings import Settings

_log: Any = structlog.get_logger("service.app")

LANES: Final = 2
"""Batches on a GPU at once: one computes while the other comes and goes."""

GPU_BATCH: Final = 16
GPU_QUEUE: Final = 256
CPU_QUEUE: Final = 64
"""Defaults of the settings that depend on the device."""


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
        DeviceOptions(
            provider=settings.provider,
            graphs=settings.cuda_graphs,
            max_batch=settings.max_batch or GPU_BATCH,
            cache=settings.cache_dir,
            memory_bytes=settings.gpu_memory_mb * 2**20,
        ),
    )
    queue_size = settings.queue_size or (CPU_QUEUE if model.gpu is None else GPU_QUEUE)
    make_batcher = partial(
        Batcher[Task, Output], max_wait_s=settings.max_wait_ms / 1000, max_queue=queue_size
    )
    if model.gpu is None:
        await asyncio.to_thread(model.warm_up)
        batcher = make_batcher(
            partial(run_batch, model, model.session),
            shares=[partial(run_batch, model, share) for share in model.shares],
            max_batch=settings.max_batch or 1,
        )
    else:
        max_batch = settings.max_batch or GPU_BATCH
        lanes = await asyncio.to_thread(_open_lanes, model, model.gpu, settings, max_batch)
        batcher = make_batcher(None, shares=[lane.run for lane in lanes], max_batch=max_batch)
        for lane in lanes:
            await batcher.call_beside(lane.run, lane.warm_up)
    _log.info("model ready", **_describe(model))
    # Beside a GPU all cores decode, so that it never waits for a photo; on a CPU the network
    # needs them itself.
    workers = settings.decode_workers or (2 if model.gpu is None else available_cores())
    with ThreadPoolExecutor(workers, thread_name_prefix=POOL_THREAD_NAME) as pool:
        segmenter = Segmenter(
            model,
            batcher,
            pool,
            max_pixels=settings.max_pixels,
            max_in_flight=queue_size,
            deadline_s=settings.deadline_s,
        )
        busy_with = min(workers + batcher.capacity, queue_size)
        service = Service(settings, model, segmenter, busy_with)
        service.phase = Phase.READY
        try:
            yield service
        finally:
            service.begin_draining()
            await batcher.close()


def _open_lanes(model: Model, gpu: CudaDevice, settings: Settings, max_batch: int) -> list[Lane]:
    """The ways through a GPU, not warm yet."""
    lock = threading.Lock()
    return [
        Lane(
            number,
            gpu.open_channel,
            model,
            model.contract,
            max_batch=max_batch,
            max_side=settings.max_side,
            graphs=settings.cuda_graphs and settings.provider == "cuda",
            lock=lock,
        )
        for number in range(LANES)
    ]


def _describe(model: Model) -> dict[str, Any]:
    """What the log says of a model that is ready."""
    facts: dict[str, Any] = {
        "model": f"{model.contract.name}/{model.contract.version}",
        "file": model.file_name,
        "provider": model.provider,
    }
    if model.gpu is not None:
        free, total = model.gpu.memory()
        facts |= {"gpu": model.gpu.name, "gpu_memory_mb": f"{(total - free) >> 20}/{total >> 20}"}
    if model.why is not None:
        facts["no_gpu"] = model.why
    return facts


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
