"""``fcn-segment``, also as ``python -m service``."""

import sys

from service.inference.memory import keep_freed_buffers


def main() -> int:
    """Run the command line; returns the exit status. See `service.cli.main.main`."""
    # First: some libraries start threads as they are loaded, and memory is shared out by then.
    keep_freed_buffers()
    from service.cli.main import main as run  # noqa: PLC0415

    return run()


if __name__ == "__main__":
    sys.exit(main())
