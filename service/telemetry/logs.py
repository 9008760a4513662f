"""Structured logs: one event a line, for people (console) or machines (JSON), on stderr.

Every line that is written while a request is handled carries its ``request_id``, and its
``trace_id`` if it is part of a trace, through structlog's context variables. uvicorn's own lines
take the same way out.

Whatever a stranger sent stays within its line and its value: JSON escapes it, and for people all
that does not print is escaped before.
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

# Fits every common tracing id, and nothing that could forge a log line or a header.
_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

_LONGEST_TEXT: Final = 256


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
    # Pillow tells each tag of each photo at debug.
    logging.getLogger("PIL").setLevel(logging.INFO)
    # A log that cannot be written (a full disk, a pipe that nobody reads) is no reason to fail.
    logging.raiseExceptions = False
    # Pillow warns about oddities of photos; they belong into the log, not raw onto stderr.
    logging.captureWarnings(True)


def request_id(incoming: str | None) -> str:
    """The caller's own request id where it is sane, else a fresh one of 32 hex digits."""
    if incoming is not None and _SANE_REQUEST_ID.fullmatch(incoming):
        return incoming
    return uuid.uuid4().hex


def shortened(text: str) -> str:
    """What a stranger sent, cut where nobody reads on."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _write_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    """Where it broke, on lines that nobody takes for lines of the log.

    structlog's default shows local variables where `rich` is installed: requests, with keys.
    """
    for line in "".join(traceback.format_exception(*exc_info)).splitlines():
        out.write(f"\n  {_escaped(line)}")


def _escape_unprintable(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Line breaks, terminals' escape sequences and the like as Python writes them."""
    return {name: _escaped(value) for name, value in event.items()}


def _escaped(value: object) -> object:
    if not isinstance(value, str) or value.isprintable():
        return value  # what is no string is shown as Python writes it
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in value)
