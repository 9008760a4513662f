"""How long each stage of a request took, noted where it ends, for the log and the traces.

`noting` opens a request's notes, and whoever works for that request adds to them, however deep
below and in whatever task: the context variable holds the notes themselves, which tasks share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Stage(NamedTuple):
    """A stage that has ended. ``started_s`` is a time of `time.perf_counter`."""

    name: str
    started_s: float
    seconds: float


_notes: ContextVar[list[Stage] | None] = ContextVar("stages", default=None)


@contextmanager
def noting() -> Iterator[list[Stage]]:
    """The stages of what is done within, in the order in which they were noted."""
    notes: list[Stage] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note(started_s: float, timing_ms: Mapping[str, float]) -> None:
    """Note stages that followed one another from ``started_s`` on, with their milliseconds.

    Nothing happens where nobody takes notes.
    """
    notes = _notes.get()
    if notes is None:
        return
    for name, value in timing_ms.items():
        notes.append(Stage(name, started_s, value / 1000))
        started_s += value / 1000
