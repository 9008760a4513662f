"""Routers with the flags by which errors and observation treat their endpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.types import Scope


class ServiceRouter(APIRouter):
    """A router whose endpoints may differ from the rest in two ways.

    ``foreign_errors``: they follow another service's protocol, where an error is
    ``{"error": "what is wrong"}``. ``probe``: orchestrators and Prometheus ask them every few
    seconds, so that requests that succeed are neither logged at level info nor traced.
    """

    def __init__(
        self,
        *,
        foreign_errors: bool = False,
        probe: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**options)
        self.foreign_errors = foreign_errors
        self.probe = probe


@dataclass(frozen=True, slots=True)
class RouteFlags:
    """The flags of an app's routers, by path.

    By path and not by route, because a path that matches no route, and a request that is broken
    before it is routed, are answered too.
    """

    foreign_prefixes: tuple[str, ...]
    probe_paths: frozenset[str]

    @classmethod
    def of(cls, routers: Iterable[ServiceRouter]) -> Self:
        """Collect the flags of all routers of an app."""
        routers = list(routers)
        return cls(
            tuple(f"{router.prefix}/" for router in routers if router.foreign_errors),
            frozenset(
                route.path
                for router in routers
                if router.probe
                for route in router.routes
                if isinstance(route, APIRoute)
            ),
        )

    def foreign_errors(self, scope: Scope) -> bool:
        """Whether a request's errors are those of another service's protocol."""
        return f"{scope['path']}/".startswith(self.foreign_prefixes)

    def is_probe(self, scope: Scope) -> bool:
        """Whether a request is a probe."""
        return scope["path"] in self.probe_paths
