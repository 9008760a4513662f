"""Routers with flags that errors and observation read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.types import Scope

from service.http.problems import documented, documented_errors

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


class ServiceRouter(APIRouter):
    """A router with two flags for its endpoints.

    ``foreign_errors``: they follow another service's protocol, whose errors are
    ``{"error": "reason"}``. ``probe``: orchestrators and Prometheus request them every few seconds,
    so successful requests are logged at level debug and not traced.
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

    def post(self, path: str, **options: Any) -> Callable[[_Endpoint], _Endpoint]:  # noqa: ANN401
        """Declare an endpoint for POST, and document the refusal of other sites' pages."""
        describe = documented_errors if self.foreign_errors else documented
        responses = {**describe(403), **(options.pop("responses", None) or {})}
        return super().post(path, responses=responses, **options)


@dataclass(frozen=True, slots=True)
class RouteFlags:
    """The flags of an app's routers, by path.

    By path and not by route, because responses to unknown paths and to malformed HTTP, which have
    no route, need them too.
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
        """Whether a request's errors follow another service's protocol."""
        return f"{scope['path']}/".startswith(self.foreign_prefixes)

    def is_probe(self, scope: Scope) -> bool:
        """Whether a request is a probe."""
        return scope["path"] in self.probe_paths
