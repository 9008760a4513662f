"""``fcn-segment worker``: one of several processes that ``serve`` starts."""

from __future__ import annotations

import argparse
import socket

from service.cli.main import exit_status
from service.errors import SegmentError
from service.server.serving import answer, keep_hangups
from service.server.worker import Parent
from service.settings import load_settings
from service.telemetry import logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the descriptors that the supervisor passes on."""
    parser.add_argument("listener_fd", type=int)
    parser.add_argument("parent_fd", type=int)


def run(parsed: argparse.Namespace) -> int:
    """Serve until the supervisor stops this worker; errors are sent to it and not printed."""
    hangup = keep_hangups()
    parent = Parent(parsed.parent_fd)
    try:
        settings = load_settings(parent.overrides)
        logs.configure(settings.log_level, settings.log_format, parent.number)
        with socket.socket(fileno=parsed.listener_fd) as listener:
            answer(listener, settings, hangup, parent)
    except SegmentError as exc:
        parent.report_error(str(exc))
        return exit_status(exc)
    finally:
        parent.tidy_up()
    return 0
