"""Observes each request; when it ends, writes its log line, metrics and spans."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self

import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from service.http.problems import INTERNAL
from service.runtime import Service
from service.telemetry import logs
from service.telemetry.metrics import OTHER, Metrics
from service.telemetry.timings import of_request

REQUEST_ID_HEADER: Final = "X-Request-ID"

CLIENT_GONE: Final = 499
"""nginx's status for a client that disconnects before it has the response. Never sent."""

ANSWERED: Final = "answered"
REFUSED: Final = "refused"
GONE: Final = "client-gone"
CANCELLED: Final = "cancelled"
"""Outcomes of requests, besides the types of problems."""

_TRACE_CONTEXT: Final = TraceContextTextMapPropagator()

_log: Any = structlog.get_logger("service.access")


class Observation:
    """A context manager around one request.

    Inside it, each log line has the request's ids, and the request is in the service's list.
    Leaving it records the request in ``metrics``, log and traces, however it ended. ``answering``:
    whether the response has begun.
    """

    def __init__(self, scope: Scope, metrics: Metrics) -> None:
        self.request_id = logs.request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        self._scope = scope
        self._metrics = metrics
        self._service: Service = scope["state"]["service"]
        self._status = CLIENT_GONE
        self._outcome: str | None = None
        self.answering = False
        self._received_bytes = 0
        self._sent_bytes = 0
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        self._started_s = time.perf_counter()
        ids = {"request_id": self.request_id, **_trace_id(self._scope)}
        self._entered.enter_context(structlog.contextvars.bound_contextvars(**ids))
        self._timings = self._entered.enter_context(of_request())
        self._service.requests.append(self.request_id)
        return self

    def receiving(self, receive: Receive) -> Receive:
        """Wrap ``receive`` to count the body's bytes and time its arrival."""

        async def counted() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._received_bytes += len(message.get("body", b""))
                if self._received_bytes and not message.get("more_body", False):
                    seconds = time.perf_counter() - self._started_s
                    self._timings.add("read", self._started_s, seconds)
                    self._metrics.read(seconds)
            return message

        return counted

    def sending(self, send: Send) -> Send:
        """Wrap ``send`` to count the response's bytes."""

        async def counted(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                self.answering = True
                self._status = int(message["status"])
            elif message["type"] == "http.response.body":
                self._sent_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    self._outcome = self._answer()

        return counted

    def crashed(self) -> None:
        """Record that an unexpected error cut off a response that had begun."""
        if self._outcome is None:
            self._status = INTERNAL.status
            self._scope["state"]["problem"] = self._outcome = INTERNAL.reason

    def __exit__(
        self,
        _: type[BaseException] | None,
        raised: BaseException | None,
        __: TracebackType | None,
    ) -> None:
        self._service.requests.remove(self.request_id)
        if self._outcome is None and isinstance(raised, asyncio.CancelledError):
            # Only a stop that takes too long cancels: our fault, whatever has been sent.
            self._status, self._outcome = INTERNAL.status, CANCELLED
        elif self._outcome is None:
            self._status, self._outcome = CLIENT_GONE, GONE
        # Set by the router: the path template.
        route = getattr(self._scope.get("route"), "path", None)
        seconds = time.perf_counter() - self._started_s
        self._metrics.request(
            route or OTHER,
            self._scope["method"],
            self._status,
            seconds,
            self._scope["state"].get("problem"),
        )
        self._write_line(route or OTHER, seconds)
        if self._service.traces is not None:
            self._service.traces.tell(self._timings.stages)
        self._entered.close()

    def _answer(self) -> str:
        """The outcome of a complete response."""
        refused = REFUSED if self._status >= HTTPStatus.BAD_REQUEST else ANSWERED
        outcome: str = self._scope["state"].get("problem", refused)
        return outcome

    def _write_line(self, route: str, seconds: float) -> None:
        scope = self._scope
        client = scope.get("client")
        quiet = scope["state"]["flags"].is_probe(scope) and self._status < HTTPStatus.BAD_REQUEST
        known = {
            "client": None if client is None else client[0],
            "key": scope["state"].get("key"),
            "stages_ms": {stage: round(ms, 1) for stage, ms in self._timings.ms().items()} or None,
        }
        _log.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            method=logs.shortened(scope["method"]),
            path=logs.shortened(scope["path"]),
            route=route,
            status=self._status,
            outcome=self._outcome,
            ms=round(seconds * 1000, 1),
            received_bytes=self._received_bytes,
            sent_bytes=self._sent_bytes,
            **{name: value for name, value in known.items() if value is not None},
        )


def _trace_id(scope: Scope) -> dict[str, str]:
    """The trace that a request belongs to, from its span or else from its ``traceparent`` header.

    Source: W3C Trace Context, section 3.2.
    """
    found = trace.get_current_span().get_span_context()
    headers = Headers(scope=scope)
    if not found.is_valid and "traceparent" in headers:
        sent = _TRACE_CONTEXT.extract(headers)
        found = trace.get_current_span(sent).get_span_context()
    return {"trace_id": trace.format_trace_id(found.trace_id)} if found.is_valid else {}
