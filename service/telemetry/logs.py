"""Structured logs on stderr: one event a line, as text (console) or JSON.

Every line that is logged while a request is handled has its ``request_id``, and its ``trace_id`` if
it belongs to a trace, through structlog's context variables. Lines of uvicorn and other libraries
take the same path.

Untrusted text cannot forge a line or a value: JSON escapes it, and the console format escapes
unprintable characters.
"""

from __future__ import annotations

import logging
import logging.config
import re
import sys
import traceback
import uuid
from typing import Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

# Matches every common tracing id, and nothing that could forge a log line or a header.
_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

_LONGEST_TEXT: Final = 256


def configure(
    level: str, log_format: Literal["console", "json"], worker: int | None = None
) -> None:
    """Set up structlog and the standard library's logging for this process.

    ``level``: ``debug``, ``info``, ``warning`` or ``error``; ``worker``: this worker's number under
    a supervisor, added to every line.
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
        render = [
            _escape_unprintable,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=_write_traceback,
            ),
        ]
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
    # At debug level Pillow logs each tag of each photo.
    logging.getLogger("PIL").setLevel(logging.INFO)
    # An unwritable log (a full disk, a broken pipe) must not fail a request.
    logging.raiseExceptions = False
    # Pillow warns about unusual photos; these warnings belong in the log, not on stderr.
    logging.captureWarnings(True)


def request_id(incoming: str | None) -> str:
    """The caller's own request id if it is safe to log, else a new one of 32 hex digits."""
    if incoming is not None and _SANE_REQUEST_ID.fullmatch(incoming):
        return incoming
    return uuid.uuid4().hex


def shortened(text: str) -> str:
    """Untrusted text, truncated for the log."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _write_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    """Write a traceback, indented so that it cannot pass for log lines.

    structlog's default shows local variables if `rich` is installed; they may contain API keys.
    """
    for line in "".join(traceback.format_exception(*exc_info)).splitlines():
        out.write(f"\n  {_escaped(line)}")


def _escape_unprintable(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Escape line breaks, terminal escape sequences and the like as Python does."""
    return {name: _escaped(value) for name, value in event.items()}


def _escaped(value: object) -> object:
    if not isinstance(value, str) or value.isprintable():
        return value  # the renderer applies repr to other types
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in value)
