"""``fcn-segment``: its commands. Only the module of the command to run is imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from service import __version__
from service.errors import SegmentError, SettingsError

COMMANDS: Final[dict[str, str | None]] = {
    "serve": "serve over HTTP",
    "predict": "segment files",
    "key": "make an API key; prints its line for FCN_API_KEYS_FILE and the key",
    "worker": None,  # only `serve` starts it
}
"""Modules of `service.cli`, each with ``add_arguments(parser)`` and ``run(parsed) -> int``.

``--help`` lists those with a help text.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: success; 1: the command or some photos failed, one line each on stderr; 2: wrong usage.
    """
    if sys.stderr is None:  # closed by the parent process
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  until the process ends
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parser(given).parse_args(given)
    try:
        status: int = import_module(f"service.cli.{parsed.command}").run(parsed)
    except SegmentError as exc:
        print(f"fcn-segment: {exc}", file=sys.stderr)
        return exit_status(exc)
    except KeyboardInterrupt:
        return 130
    return status


def exit_status(error: SegmentError) -> int:
    """The exit status after an error: 2 for wrong settings, else 1."""
    return 2 if isinstance(error, SettingsError) else 1


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the command that ``given`` names."""
    description = "Label every pixel of a photo with one of a model's classes."
    parser = argparse.ArgumentParser(prog="fcn-segment", description=description)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    listed = ",".join(name for name, text in COMMANDS.items() if text is not None)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{listed}}}")
    for name, text in COMMANDS.items():
        # A command is hidden if `help` is left out; None would list it.
        command = commands.add_parser(name, help=text) if text else commands.add_parser(name)
        if name in given:
            import_module(f"service.cli.{name}").add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
