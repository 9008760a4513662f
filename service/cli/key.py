"""``fcn-segment key``: make an API key."""

from __future__ import annotations

import argparse
import sys

from service.access import KEY_NAME, new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's argument."""
    parser.add_argument("name", type=_key_name, metavar="NAME", help="whose key it is")


def run(parsed: argparse.Namespace) -> int:
    """Print the file's line to stdout, so that ``>>`` appends it, and the key, once, to stderr."""
    key, line = new_key(parsed.name)
    print(line)
    print(key, file=sys.stderr)
    return 0


def _key_name(text: str) -> str:
    """An argument that may stand in the file of keys."""
    if not KEY_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("should be up to 64 letters, digits, dots, _ and -")
    return text
