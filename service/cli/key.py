"""``fcn-segment key``: make an API key."""

from __future__ import annotations

import argparse
import sys

from service.access import KEY_NAME, new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's argument."""
    parser.add_argument("name", type=_key_name, metavar="NAME", help="name of the key's owner")


def run(parsed: argparse.Namespace) -> int:
    """Print the key file's line to stdout, for ``>>``, and the key to stderr."""
    key, line = new_key(parsed.name)
    print(line)
    print(key, file=sys.stderr)
    return 0


def _key_name(text: str) -> str:
    """Parse a name that is valid in the key file."""
    if not KEY_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("should be up to 64 letters, digits, dots, _ and -")
    return text
