"""Around every request: its id, its line in the log, and the answer of last resort."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus
from typing import Any, Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.metrics import OTHER, Metrics
from service.routes.problems import INTERNAL, LOGGED, problem_response

REQUEST_ID_HEADER: Final = "X-Request-ID"

# nginx's number for "the client went away before the answer"; it only ever shows in the log.
CLIENT_GONE: Final = 499

# What orchestrators and Prometheus ask every few seconds; nobody wants to read of it.
PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})

_log: Any = structlog.get_logger("service.access")


class RequestContext:
    """ASGI middleware: ``X-Request-ID``, one access line, and 500 for what nobody expected.

    Counts each request in ``metrics``. Probes that went well get their line at debug level.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes pass through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = logs.request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = CLIENT_GONE
        sent_bytes = 0

        async def send_counted(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = int(message["status"])
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            elif message["type"] == "http.response.body":
                sent_bytes += len(message.get("body", b""))
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_counted)
            except ClientDisconnect:
                _log.debug("the client went away", path=scope["path"])
            # The last boundary: whatever it was, the caller gets an answer and the log the cause.
            except Exception:  # noqa: BLE001
                _log.exception("unforeseen error", path=scope["path"])
                if status == CLIENT_GONE:
                    response = problem_response(scope, INTERNAL, LOGGED)
                    await response(scope, receive, send_counted)
            finally:
                seconds = time.perf_counter() - started
                self._metrics.request(
                    # Set by the router, with placeholders in place of what varies.
                    getattr(scope.get("route"), "path", OTHER),
                    scope["method"],
                    status,
                    seconds,
                    scope["state"].get("problem"),
                )
                probe = scope["path"] in PROBES and status < HTTPStatus.BAD_REQUEST
                _log.log(
                    logging.DEBUG if probe else logging.INFO,
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    ms=round(seconds * 1000, 1),
                    bytes=sent_bytes,
                )
