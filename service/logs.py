"""Structured logs: one event a line, for people (console) or machines (JSON), on stderr.

Every line that is written while a request is handled carries its ``request_id``, through
structlog's context variables. uvicorn's own lines take the same way out.
"""

from __future__ import annotations

import logging
import logging.config
import re
import sys
import uuid
from typing import Final, Literal

import structlog
from structlog.typing import EventDict, Processor

# Fits every common tracing id, and nothing that could forge a log line or a header.
_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def configure(
    level: str, log_format: Literal["console", "json"], worker: int | None = None
) -> None:
    """Set up structlog and the standard library's logging for a whole process.

    ``level``: ``debug``, ``info``, ``warning`` or ``error``. Every line carries the number of the
    ``worker`` whose process this is, if there are several.
    """

    def add_worker(_logger: object, _method: str, event: EventDict) -> EventDict:
        return event if worker is None else {"worker": worker, **event}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_worker,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor]
    if log_format == "json":
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        render = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # Pillow tells each tag of each photo at debug.
    logging.getLogger("PIL").setLevel(logging.INFO)
    # Pillow warns about oddities of photos; they belong into the log, not raw onto stderr.
    logging.captureWarnings(True)


def request_id(incoming: str | None) -> str:
    """The caller's own request id where it is sane, else a fresh one of 32 hex digits."""
    if incoming is not None and _SANE_REQUEST_ID.fullmatch(incoming):
        return incoming
    return uuid.uuid4().hex
