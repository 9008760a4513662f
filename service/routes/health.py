"""``GET /healthz`` and ``GET /readyz``: for whoever restarts the process and sends it work."""

from __future__ import annotations

from fastapi import APIRouter

from service.errors import Draining
from service.http.dependencies import Phase, ServiceDep
from service.http.problems import documented
from service.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Alive")
async def healthz() -> Health:
    """The process is alive: its event loop answers."""
    return Health(status="alive")


@router.get("/readyz", summary="Ready", responses=documented(503))
async def readyz(service: ServiceDep) -> Health:
    """The model is loaded and warm, and the service is not shutting down."""
    if service.phase is not Phase.READY:
        raise Draining(f"the service is {service.phase.value}")
    return Health(status="ready")
