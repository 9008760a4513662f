"""What the lifespan makes and the endpoints use, typed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, TypedDict

from fastapi import Depends, Request

from service.errors import Draining
from service.inference.engines import Engines
from service.segmenter import Segmenter
from service.settings import Settings
from service.telemetry.metrics import Metrics, Peers

if TYPE_CHECKING:  # it needs the extra `tracing`
    from service.telemetry.tracing import Traces


class Phase(Enum):
    """Where the service is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(slots=True)
class Service:
    """Every resource of a running service, owned by the lifespan in ``app``.

    ``busy_with`` photos at once leave neither the pool nor the device idle; ``peers`` are the other
    processes behind the same address, if there are any; ``traces`` makes requests' spans where
    that is configured; ``requests`` has the id of every request that is being answered.
    """

    settings: Settings
    engines: Engines
    segmenter: Segmenter
    busy_with: int
    metrics: Metrics
    peers: Peers | None = None
    traces: Traces | None = None
    phase: Phase = Phase.STARTING
    requests: list[str] = field(default_factory=list)
    body_bytes: int = 0

    def begin_draining(self) -> None:
        """Turn unready; what is in flight goes on."""
        self.phase = Phase.DRAINING


class LifespanState(TypedDict):
    """What the lifespan yields; the server lays it into every request's state."""

    service: Service


async def get_service(request: Request) -> Service:
    """The running service of a request, as a dependency."""
    service: Service = request.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


async def get_ready_service(service: ServiceDep) -> Service:
    """The service, if it takes photos. Raises `Draining`."""
    if service.phase is not Phase.READY:
        raise Draining(f"the service is {service.phase.value}")
    return service


ReadyServiceDep = Annotated[Service, Depends(get_ready_service)]
