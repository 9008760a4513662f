"""The duration of each stage of a request, recorded where the stage runs.

The `Server-Timing` header, the metrics, the log line and the trace spans read the same record.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Self


class Stage(NamedTuple):
    """A finished stage. ``started_s`` is a `time.perf_counter` time."""

    name: str
    started_s: float
    seconds: float


class Timings:
    """The stages of one photo or one request, in the order in which they ended.

    ``within``: a record to which the stages are added too, such as the photo's request.
    Any thread may record stages, one at a time.
    """

    def __init__(self, within: Timings | None = None) -> None:
        self.stages: list[Stage] = []
        self._within = within
        self._open: tuple[str, float] | None = None

    @classmethod
    def of_photo(cls) -> Self:
        """A record for one photo. Its stages are added to the surrounding `of_request` too."""
        return cls(_request.get())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the body of the ``with`` statement as a stage, even if it fails."""
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
        """Milliseconds by name; equal names are summed, an open stage counts until now."""
        sums: dict[str, float] = {}
        for name, _, seconds in self.stages:
            sums[name] = sums.get(name, 0.0) + seconds * 1000
        if self._open is not None:
            name, started_s = self._open
            sums[name] = sums.get(name, 0.0) + (time.perf_counter() - started_s) * 1000
        return sums

    def header(self) -> str:
        """The value of the `Server-Timing` header. Source: W3C Server Timing."""
        return ", ".join(f"{name};dur={ms:.2f}" for name, ms in self.ms().items())


_request: ContextVar[Timings | None] = ContextVar("request_timings", default=None)


@contextmanager
def of_request() -> Iterator[Timings]:
    """A record of all photos within the ``with`` statement, in any task that it starts."""
    timings = Timings()
    token = _request.set(timings)
    try:
        yield timings
    finally:
        _request.reset(token)
