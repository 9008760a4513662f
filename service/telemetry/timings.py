"""How long each stage of a request took, recorded where it runs.

The `Server-Timing` header, the metrics, the log line and the trace spans all read the same record.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Self


class Stage(NamedTuple):
    """A stage that has ended. ``started_s`` is a time of `time.perf_counter`."""

    name: str
    started_s: float
    seconds: float


class Timings:
    """The stages of one photo or one request, in the order in which they ended.

    ``within``: a record that gets the same stages too, such as that of the request around a photo.
    Stages may be recorded from any thread, one at a time.
    """

    def __init__(self, within: Timings | None = None) -> None:
        self.stages: list[Stage] = []
        self._within = within
        self._open: tuple[str, float] | None = None

    @classmethod
    def of_photo(cls) -> Self:
        """A record for one photo, whose stages the surrounding request records too, if any does."""
        return cls(_request.get())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record what is done within as a stage, even if it fails."""
        started_s = time.perf_counter()
        self._open = (name, started_s)
        try:
            yield
        finally:
            self._open = None
            self.add(name, started_s, time.perf_counter() - started_s)

    def add(self, name: str, started_s: float, seconds: float) -> None:
        """Record a stage that was measured elsewhere, such as on a device."""
        self.stages.append(Stage(name, started_s, seconds))
        if self._within is not None:
            self._within.add(name, started_s, seconds)

    def ms(self) -> dict[str, float]:
        """Milliseconds by stage, those of equal name added up; an open stage counts until now."""
        sums: dict[str, float] = {}
        for name, _, seconds in self.stages:
            sums[name] = sums.get(name, 0.0) + seconds * 1000
        if self._open is not None:
            name, started_s = self._open
            sums[name] = sums.get(name, 0.0) + (time.perf_counter() - started_s) * 1000
        return sums

    def header(self) -> str:
        """The value of a `Server-Timing` header. Source: W3C Server Timing."""
        return ", ".join(f"{name};dur={ms:.2f}" for name, ms in self.ms().items())


_request: ContextVar[Timings | None] = ContextVar("request_timings", default=None)


@contextmanager
def of_request() -> Iterator[Timings]:
    """A record of everything that is timed within, in whatever task it runs."""
    timings = Timings()
    token = _request.set(timings)
    try:
        yield timings
    finally:
        _request.reset(token)
