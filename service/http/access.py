"""Checks API keys and rate limits before an endpoint runs and before the body is read.

A key is sent as ``Authorization: Bearer KEY``, as ``X-API-Key: KEY``, or as the password of HTTP
basic authentication, the only scheme that Label Studio supports. A key in the URL is not accepted:
URLs end up in logs and histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Self

from fastapi import Depends, Request, Security
from fastapi.params import Depends as Dependency
from fastapi.security import (
    APIKeyHeader,
    HTTPAuthorizationCredentials,
    HTTPBasic,
    HTTPBasicCredentials,
    HTTPBearer,
)

from service.access import ApiKeys, RateLimits, client_address, parse_rate_limits
from service.errors import Unauthorized
from service.settings import Settings

_BEARER: Final = HTTPBearer(auto_error=False, description="an API key")
_HEADER: Final = APIKeyHeader(name="X-API-Key", auto_error=False, description="an API key")
_BASIC: Final = HTTPBasic(auto_error=False, description="an API key as password, any user name")

BearerDep = Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
HeaderDep = Annotated[str | None, Security(_HEADER)]
BasicDep = Annotated[HTTPBasicCredentials | None, Security(_BASIC)]


@dataclass(frozen=True, slots=True)
class Access:
    """Access checks of the protected endpoints. A check that is not configured is None."""

    keys: ApiKeys | None
    rates: RateLimits | None

    @classmethod
    def configured(cls, settings: Settings) -> Self:
        """Create from the settings. Raises `SettingsError` for an invalid file of keys."""
        path, limits = settings.api_keys_file, settings.rate_limit
        return cls(
            None if path is None else ApiKeys(path),
            None if limits is None else RateLimits(parse_rate_limits(limits)),
        )

    @property
    def dependencies(self) -> Sequence[Dependency]:
        """For `include_router`. With keys, the OpenAPI description documents how to send them."""
        if self.keys is not None:
            return [Depends(self._with_key)]
        return [] if self.rates is None else [Depends(self._without_key)]

    @property
    def statuses(self) -> tuple[int, ...]:
        """Statuses of their refusals."""
        configured = {401: self.keys, 429: self.rates}
        return tuple(status for status, one in configured.items() if one is not None)

    async def _with_key(
        self, request: Request, bearer: BearerDep, header: HeaderDep, basic: BasicDep
    ) -> None:
        key = header  # takes precedence: a proxy may use the other two itself
        if key is None and bearer is not None:
            key = bearer.credentials
        if key is None and basic is not None:
            key = basic.password
        self._admit(request, key)

    async def _without_key(self, request: Request) -> None:
        self._admit(request, None)

    def _admit(self, request: Request, key: str | None) -> None:
        """Admit a request, or raise `Unauthorized` or `RateLimited`.

        Requests with a valid key are counted by the key's name; all others by their address.
        """
        name = None if self.keys is None or key is None else self.keys.name_of(key)
        if name is not None:
            request.scope["state"]["key"] = name  # for the log
        if self.rates is not None:
            host = request.client.host if request.client is not None else None
            self.rates.count(f"address {client_address(host)}" if name is None else f"key {name}")
        if self.keys is not None and name is None:
            raise Unauthorized("send an API key" if key is None else "this API key is not known")
