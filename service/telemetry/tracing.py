"""OpenTelemetry traces: FastAPI's span for each request, with a child span for each stage.

Spans are sent to an OTLP endpoint as protobuf over HTTP. The SDK reads its own variables:
``OTEL_EXPORTER_OTLP_*``, ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``,
``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_*``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from starlette.types import Scope

from service import __version__
from service.errors import SettingsError
from service.telemetry.timings import Stage

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import (
        SERVICE_NAME,
        SERVICE_VERSION,
        OTELResourceDetector,
        Resource,
    )
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
except ImportError as exc:
    raise ImportError("traces need OpenTelemetry: pip install 'fcn-segment[tracing]'") from exc

NAME: Final = "fcn-segment"

LONGEST_FLUSH_S: Final = 3.0
"""How long a stop waits for spans to be sent; below the time that supervisors allow for a stop."""

_PROTOCOL: Final = "http/protobuf"
_QUIET_S: Final = 60.0


class Traces:
    """The spans of one app.

    ``exclude``: which requests get no span. Raises `SettingsError` for an unsupported protocol.
    """

    def __init__(self, exclude: Callable[[Scope], bool]) -> None:
        for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if os.environ.get(variable, _PROTOCOL) != _PROTOCOL:
                raise SettingsError(f"{variable}: only {_PROTOCOL} is supported")
        # Its own shutdown at exit may take half a minute.
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._tracer = self._provider.get_tracer(NAME, __version__)
        self.telemetry: TelemetryConfig = {
            "tracer_provider": self._provider,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": exclude,
        }
        """For `FastAPI`, whose spans follow the semantic conventions and W3C Trace Context."""

    @asynccontextmanager
    async def sent(self) -> AsyncIterator[None]:
        """Send spans from a thread until the context ends, then at most `LONGEST_FLUSH_S` longer.

        If the endpoint is missing or hangs, spans are lost and a line is logged once a minute.
        Raises `SettingsError` for an invalid configuration.
        """
        with _throttled_log():
            try:
                self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            except ValueError as exc:
                raise SettingsError(f"traces: {exc}") from exc
            try:
                yield
            finally:
                # A daemon: if it is stuck, it must not keep the process alive.
                flush = threading.Thread(target=self._provider.shutdown, daemon=True)
                flush.start()
                await asyncio.to_thread(flush.join, LONGEST_FLUSH_S)

    def tell(self, stages: Sequence[Stage]) -> None:
        """Create a span for each stage of a request, below its own span if it has one."""
        if not trace.get_current_span().get_span_context().is_valid:
            return
        # Stages are timed by a clock without a date.
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        for stage in stages:
            started_ns = epoch_ns + int(stage.started_s * 1e9)
            span = self._tracer.start_span(stage.name, start_time=started_ns)
            span.end(started_ns + int(stage.seconds * 1e9))


def _resource() -> Resource:
    """Describe this service; the operator's own variables take precedence."""
    configured = OTELResourceDetector().detect().attributes
    return Resource.create({SERVICE_NAME: NAME, SERVICE_VERSION: __version__, **configured})


@contextmanager
def _throttled_log() -> Iterator[None]:
    """Log at most one line a minute of OpenTelemetry: it logs several for each lost batch."""
    logger = logging.getLogger("opentelemetry")
    handler = ThrottlingHandler()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


class ThrottlingHandler(logging.Handler):
    """Forwards a line to the root logger, and drops other lines within a minute of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._quiet_until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Forward the line, or drop it."""
        now = self._clock()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            logging.getLogger().handle(record)
