"""OpenTelemetry traces: FastAPI's span for each request, and in it one for each of its stages.

They go to an OTLP endpoint, in protobuf over HTTP. The SDK reads all it needs from variables of its
own: ``OTEL_EXPORTER_OTLP_*``, ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``,
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
"""How long the end waits for spans to be sent; within what supervisors give a process to stop."""

_PROTOCOL: Final = "http/protobuf"
_QUIET_S: Final = 60.0


class Traces:
    """The spans of one app.

    ``exclude``: which requests have none. Raises `SettingsError` for a protocol that is not spoken.
    """

    def __init__(self, exclude: Callable[[Scope], bool]) -> None:
        for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if os.environ.get(variable, _PROTOCOL) != _PROTOCOL:
                raise SettingsError(f"{variable}: only {_PROTOCOL} is spoken here")
        # Not shut down at exit, which may wait for half a minute.
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
        """Send what there is until the end, and at most a moment longer.

        A thread does that. An endpoint that is not there, or hangs, costs spans and a line in the
        log now and then. Raises `SettingsError` for a configuration that cannot be.
        """
        with _sparing_the_log():
            try:
                self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            except ValueError as exc:
                raise SettingsError(f"traces: {exc}") from exc
            try:
                yield
            finally:
                # A daemon: what it is stuck in must not keep the process.
                flush = threading.Thread(target=self._provider.shutdown, daemon=True)
                flush.start()
                await asyncio.to_thread(flush.join, LONGEST_FLUSH_S)

    def tell(self, stages: Sequence[Stage]) -> None:
        """Make spans of what a request's stages were, within its own span if it has one."""
        if not trace.get_current_span().get_span_context().is_valid:
            return
        # Stages are timed by a clock that has no date.
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        for stage in stages:
            started_ns = epoch_ns + int(stage.started_s * 1e9)
            span = self._tracer.start_span(stage.name, start_time=started_ns)
            span.end(started_ns + int(stage.seconds * 1e9))


def _resource() -> Resource:
    """What sends the spans; the operator's own words for it come first."""
    told = OTELResourceDetector().detect().attributes
    return Resource.create({SERVICE_NAME: NAME, SERVICE_VERSION: __version__, **told})


@contextmanager
def _sparing_the_log() -> Iterator[None]:
    """One line a minute of OpenTelemetry's own: it has several for each batch that is lost."""
    logger = logging.getLogger("opentelemetry")
    sparing = SparingHandler()
    logger.addHandler(sparing)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(sparing)


class SparingHandler(logging.Handler):
    """Hands a line on to the root logger, and drops those that come within a minute of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._quiet_until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Hand it on, or drop it."""
        now = self._clock()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            logging.getLogger().handle(record)
