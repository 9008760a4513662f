"""The dependencies of endpoints: the running service, typed."""

from __future__ import annotations

from typing import Annotated, TypedDict

from fastapi import Depends, Request

from service.runtime import Service


class LifespanState(TypedDict):
    """The lifespan's state; the server copies it into the state of every request."""

    service: Service


async def get_service(request: Request) -> Service:
    """The running service, as a dependency."""
    service: Service = request.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


async def get_ready_service(request: Request) -> Service:
    """The service, if it is ready, as a dependency. Raises `Draining`."""
    return ready_service(request)


def ready_service(request: Request) -> Service:
    """The service, if it is ready, where a dependency would cost more. Raises `Draining`."""
    service: Service = request.state.service
    service.require_ready()
    return service


ReadyServiceDep = Annotated[Service, Depends(get_ready_service)]
