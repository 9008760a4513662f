"""``GET /healthz`` and ``GET /readyz``, for orchestrators and load balancers."""

from __future__ import annotations

from service.http.dependencies import ReadyServiceDep
from service.http.problems import documented
from service.http.routers import ServiceRouter
from service.schemas import Health

router = ServiceRouter(probe=True, tags=["health"])


@router.get("/healthz", summary="Alive")
async def healthz() -> Health:
    """The process is alive: its event loop responds."""
    return Health(status="alive")


@router.get("/readyz", summary="Ready", responses=documented(503))
async def readyz(_: ReadyServiceDep) -> Health:
    """The default model is loaded and warm, and the service is not shutting down."""
    return Health(status="ready")
