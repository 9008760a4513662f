"""Wraps every request: its id, log line, metrics, headers and refusal, and the fallback 500."""

from __future__ import annotations

from typing import Any, Final

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.observation import REQUEST_ID_HEADER, Observation
from service.http.origins import cross_site_error
from service.http.problems import (
    INTERNAL,
    LOGGED,
    REFUSAL,
    REFUSAL_UNLESS_PROBE,
    problem_response,
    refusal,
)
from service.http.routers import RouteFlags
from service.http.turns import Turns
from service.telemetry import logs
from service.telemetry.metrics import Metrics

HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of every response, unless its endpoint sets them.

Source: OWASP's REST Security Cheat Sheet. Strict-Transport-Security is set by the proxy that
terminates TLS.
"""

_log: Any = structlog.get_logger("service.access")


class RequestContext:
    """ASGI middleware: `HEADERS`, an `Observation`, and 500 for an unexpected error.

    It refuses what the server has marked to be refused, and what other sites' pages send.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, flags: RouteFlags) -> None:
        self.app = app
        self._metrics = metrics
        self._flags = flags
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Scopes of other types pass through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._flags.is_probe(scope):
            await self._turns.take()
        scope.setdefault("state", {})["flags"] = self._flags
        with Observation(scope, self._metrics) as seen:
            scope["state"]["request_id"] = seen.request_id

            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    headers[REQUEST_ID_HEADER] = seen.request_id
                    for name, value in HEADERS.items():
                        headers.setdefault(name, value)
                await send(message)

            counted = seen.sending(send_with_headers)
            try:
                app = self.app
                error = self._refused(scope)
                if error is not None:
                    app = await refusal(scope, error)
                await app(scope, seen.receiving(receive), counted)
            except ClientDisconnect:
                _log.debug("the client went away", path=logs.shortened(scope["path"]))
            # The last boundary: the client gets a response, the log gets the cause.
            except Exception:  # noqa: BLE001
                _log.exception("unforeseen error", path=logs.shortened(scope["path"]))
                if seen.answering:
                    seen.crashed()
                else:
                    response = problem_response(scope, INTERNAL, LOGGED)
                    await response(scope, receive, counted)

    def _refused(self, scope: Scope) -> Exception | None:
        state = scope["state"]
        if REFUSAL in state:
            error: Exception = state[REFUSAL]
            return error
        if REFUSAL_UNLESS_PROBE in state and not self._flags.is_probe(scope):
            error = state[REFUSAL_UNLESS_PROBE]
            return error
        return cross_site_error(scope, state["service"].settings.allowed_origins)
