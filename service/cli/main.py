"""``fcn-segment serve``, ``predict`` and ``key``."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from service import __version__
from service.access import KEY_NAME, new_key
from service.cli.predict import Format, Order, predict
from service.errors import SegmentError, SettingsError
from service.server.serving import answer, keep_hangups
from service.server.supervisor import plan, supervise
from service.server.worker import WORKER_COMMAND, Parent
from service.settings import Settings, env_name, load_settings
from service.telemetry import logs
from service.views import MaskFormat


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done; 1: it failed, or some photos did, one line each on stderr; 2: wrong usage.
    """
    if sys.stderr is None:  # whoever started this closed it
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  for as long as this runs
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "serve":
            return _serve(_given(parsed, Settings.model_fields))
        if parsed.command == WORKER_COMMAND:
            return _work(parsed.listener_fd, parsed.parent_fd)
        if parsed.command == "key":
            return _key(parsed.name)
        failed = _predict(parsed)
    except SegmentError as exc:
        print(f"fcn-segment: {exc}", file=sys.stderr)
        return _status(exc)
    except KeyboardInterrupt:
        return 130
    if failed:
        print(f"fcn-segment: {failed} photos failed", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fcn-segment", description="Label every pixel of a photo with PASCAL VOC's classes."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{serve,predict,key}")

    serve = commands.add_parser("serve", help="answer over HTTP")
    for name, field in Settings.model_fields.items():
        # The default None means "not given": then the environment or the field's default rules.
        default = "" if field.default is None else f", default {field.default}"
        serve.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="VALUE",
            help=f"{field.description} ({env_name(name)}{default})",
        )

    files = commands.add_parser("predict", help="segment files")
    files.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="file or folder")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    files.add_argument(
        "--format",
        "--view",
        choices=get_args(Format),
        default="mask",
        help="a palette PNG, overlay, cut-out or JSON for each photo; a folder of VOC's layout; or "
        "one COCO file (default mask)",
    )
    files.add_argument(
        "--mask",
        choices=get_args(MaskFormat),
        help="how json and coco carry the mask (default rle in json, polygons in coco)",
    )
    files.add_argument(
        "--classes", metavar="NAMES", help="comma-separated names that answers are limited to"
    )
    files.add_argument(
        "--max-side", type=int, metavar="N", help="longest side that the network sees, pixels"
    )
    files.add_argument("--jobs", type=_positive, metavar="N", help="photos at once")
    files.add_argument(
        "--overwrite", action="store_true", help="do again what is there (default: leave it alone)"
    )
    files.add_argument("--url", help="a running service, instead of a model in this process")
    files.add_argument(
        "--model",
        metavar="MODEL",
        help=f"artefact folder ({env_name('model')}), or with --url the name of a model there",
    )

    key = commands.add_parser(
        "key", help=f"make an API key: its line for {env_name('api_keys_file')}, and the key itself"
    )
    key.add_argument("name", type=_key_name, metavar="NAME", help="whose key it is")

    # Only `serve` starts it: without a help text it is not listed.
    worker = commands.add_parser(WORKER_COMMAND)
    worker.add_argument("listener_fd", type=int)
    worker.add_argument("parent_fd", type=int)
    return parser


def _positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _key_name(text: str) -> str:
    """An argument that may stand in the file of keys."""
    if not KEY_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("should be up to 64 letters, digits, dots, _ and -")
    return text


def _key(name: str) -> int:
    """The file's line goes to stdout, so that ``>>`` adds it; the key is shown beside it, once."""
    key, line = new_key(name)
    print(line)
    print(key, file=sys.stderr)
    return 0


def _predict(parsed: argparse.Namespace) -> int:
    """How many photos failed."""
    settings = load_settings(_given(parsed, ["model"]) if parsed.url is None else {})
    logs.configure("warning", settings.log_format)
    order = Order(
        inputs=parsed.images,
        out=parsed.out,
        format=parsed.format,
        mask=parsed.mask,
        classes=parsed.classes,
        max_side=parsed.max_side,
        jobs=parsed.jobs,
        overwrite=parsed.overwrite,
    )
    return predict(settings, order, parsed.url, parsed.model if parsed.url else None)


def _given(parsed: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags that were given, by the names of the settings."""
    return {name: value for name in names if (value := getattr(parsed, name)) is not None}


def _status(error: SegmentError) -> int:
    return 2 if isinstance(error, SettingsError) else 1


def _serve(flags: Mapping[str, Any]) -> int:
    hangup = keep_hangups()
    settings = load_settings(flags)
    logs.configure(settings.log_level, settings.log_format)
    workers = [{**flags, **own} for own in plan(settings)]
    # First of all: loading a model only to find the port taken wastes everybody's time.
    with _bind(settings.host, settings.port) as listener:
        if len(workers) > 1:
            return supervise(listener, workers, settings)
        answer(listener, load_settings(workers[0]), hangup)
    return 0


def _work(listener_fd: int, parent_fd: int) -> int:
    """Be one of several processes that `serve` started; their reasons are told by it, once."""
    hangup = keep_hangups()
    parent = Parent(parent_fd)
    try:
        settings = load_settings(parent.overrides)
        logs.configure(settings.log_level, settings.log_format, parent.number)
        with socket.socket(fileno=listener_fd) as listener:
            answer(listener, settings, hangup, parent)
    except SegmentError as exc:
        parent.tell_error(str(exc))
        return _status(exc)
    finally:
        parent.tidy_up()
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises `SettingsError` if that cannot be."""
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


if __name__ == "__main__":
    sys.exit(main())
