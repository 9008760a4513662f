"""``GET /metrics``, for Prometheus."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

from service.http.dependencies import ServiceDep
from service.http.routers import ServiceRouter
from service.telemetry.metrics import encode, merge

router = ServiceRouter(probe=True, tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request, service: ServiceDep) -> Response:
    """Counters, gauges and histograms in Prometheus's text format, or OpenMetrics by `Accept`.

    The response covers all processes behind one address; the label `worker` distinguishes them.
    """
    if service.peers is None:
        families = await service.families()
    else:
        families = merge(service.peers.label, await service.peers.gather())
    text, media_type = encode(families, request.headers.get("Accept", ""))
    return Response(text, headers={"Content-Type": media_type})
