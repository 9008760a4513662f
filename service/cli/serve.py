"""``fcn-segment serve``: serve over HTTP, in this process or in worker processes."""

from __future__ import annotations

import argparse
import contextlib
import socket

from service.errors import SettingsError
from service.server.serving import answer, keep_hangups
from service.server.supervisor import plan, supervise
from service.settings import Settings, env_name, given_settings, load_settings
from service.telemetry import logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for each setting."""
    for name, field in Settings.model_fields.items():
        # The default None means "not given": then the environment or the field's default applies.
        default = "" if field.default is None else f", default {field.default}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="VALUE",
            help=f"{field.description} ({env_name(name)}{default})",
        )


def run(parsed: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    flags = given_settings(parsed)
    hangup = keep_hangups()
    settings = load_settings(flags)
    logs.configure(settings.log_level, settings.log_format)
    workers = [{**flags, **own} for own in plan(settings)]
    # Before the model is loaded, so that a port in use is reported at once.
    with _bind(settings.host, settings.port) as listener:
        if len(workers) > 1:
            return supervise(listener, workers, settings)
        answer(listener, load_settings(workers[0]), hangup)
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises `SettingsError` if binding fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            undo.pop_all()
    except OSError as exc:
        raise SettingsError(f"cannot listen on {host}:{port}: {exc.strerror or exc}") from exc
    return listener
