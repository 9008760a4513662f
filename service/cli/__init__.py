"""The command line: `serve`, `predict`, `key`."""

from service.errors import SegmentError, SettingsError


def exit_status(error: SegmentError) -> int:
    """The exit status of a command that fails: 2 for wrong usage, else 1."""
    return 2 if isinstance(error, SettingsError) else 1
