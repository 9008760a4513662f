"""``GET /metrics``: what `service.telemetry.metrics` counts, for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from service.http.dependencies import Phase, Service, ServiceDep
from service.inference.engine import Engine
from service.telemetry.metrics import EngineFacts, Families, Metrics, encode, merge

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request, service: ServiceDep) -> Response:
    """Counters, gauges and histograms in Prometheus's text format, or OpenMetrics by `Accept`.

    Several processes behind one port answer together, told apart by the label `worker`.
    """
    if service.peers is None:
        told = await families(service)
    else:
        told = merge(service.peers.label, await service.peers.gather())
    text, media_type = encode(told, request.headers.get("Accept", ""))
    return Response(text, headers={"Content-Type": media_type})


async def families(service: Service) -> Families:
    """The metrics of this process alone, as they are now."""
    service.metrics.look_at_service(
        ready=service.phase is Phase.READY,
        in_flight=service.segmenter.in_flight,
        limit=service.segmenter.max_in_flight,
        deadline_s=service.settings.deadline_s,
    )
    return await engine_families(service.metrics, service.engines.opened)


async def engine_families(metrics: Metrics, engines: Iterable[Engine]) -> Families:
    """The metrics of a process that has these engines."""
    metrics.look_at_engines([await _facts(engine) for engine in engines])
    return metrics.families()


async def _facts(engine: Engine) -> EngineFacts:
    model, contract = engine.model, engine.model.contract
    gpu, memory = None, None
    if model.gpu is not None:
        # The driver may be busy; the event loop must not wait for it.
        free, total = await asyncio.to_thread(model.gpu.memory)
        gpu, memory = model.gpu.ordinal, (total - free, total)
    return EngineFacts(
        contract.name,
        contract.version,
        contract.precision,
        model.provider,
        engine.batcher.waiting,
        gpu,
        memory,
    )
