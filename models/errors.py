"""The root of the errors that a stage reports to its user."""

from __future__ import annotations


class StageError(Exception):
    """A stage cannot do what was asked for; the message tells the user what to correct."""
