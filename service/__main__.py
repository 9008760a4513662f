"""``fcn-segment``, also as ``python -m service``."""

import sys

from service.system import keep_freed_buffers


def main() -> int:
    """Run the command line; returns the exit status. See `service.cli.main.main`."""
    # Before other imports: some start threads, and the allocator must be configured before that.
    keep_freed_buffers()
    from service.cli.main import main as run  # noqa: PLC0415

    return run()


if __name__ == "__main__":
    sys.exit(main())
