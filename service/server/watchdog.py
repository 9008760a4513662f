"""Ends this process when it hangs, so that its supervisor or orchestrator starts a new one.

A thread that is stuck in a runtime or a driver cannot be stopped, nor its resources freed: only a
new process helps. The watchdog's thread looks for two things: a batch that runs too long, and an
event loop that no longer runs. For the event loop it counts its own turns, not seconds, so that a
process that was suspended does not seem to hang. Image workers that hang are ended by their pool.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import threading
from collections.abc import Callable
from typing import Any, Final, Self

import structlog

from service.runtime import Service

EXIT_STATUS: Final = os.EX_SOFTWARE

# For the responses to waiting requests, and for everything before the process ends.
_ANSWERS_S: Final = 2.0
_REPORT_S: Final = 3.0

_LOOKS: Final = 100

_LONGEST_TURN_S: Final = 1.0

_log: Any = structlog.get_logger("service.watchdog")


class Watchdog:
    """A context manager that watches ``service``; enter and leave it in the event loop.

    Whatever takes ``limit_s`` seconds counts as hanging. The service then turns unready, requests
    that wait for the device get a response, the requests and every thread's stack are logged, and
    ``end`` is called with `EXIT_STATUS`. ``on_turn`` is called in the event loop, at least once a
    second and ten times in ``limit_s``.
    """

    def __init__(
        self,
        service: Service,
        limit_s: float,
        on_turn: Callable[[], None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._service = service
        self._limit_s = limit_s
        self._on_turn = on_turn
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._left = threading.Event()
        self._silent_s = self._running_s = 0.0

    def __enter__(self) -> Self:
        # A daemon: it must not keep the process alive.
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        turn_s = min(_LONGEST_TURN_S, self._limit_s / 10)
        while not self._left.wait(turn_s):
            self._silent_s += turn_s
            self._loop.call_soon_threadsafe(self._turn)
            if self._running_s >= self._limit_s:
                self._give_up(f"a batch has been running for {self._running_s:.0f} s")
            elif self._silent_s >= self._limit_s:
                self._give_up(f"the event loop has not run for {self._silent_s:.0f} s")

    def _turn(self) -> None:
        self._silent_s = 0.0
        self._running_s = self._service.engines.running_s
        self._on_turn()

    def _give_up(self, reason: str) -> None:
        # In a thread, because the log itself may hang.
        reporter = threading.Thread(target=self._report_and_answer, args=(reason,), daemon=True)
        reporter.start()
        reporter.join(_REPORT_S)
        self._left.set()
        self._end(EXIT_STATUS)

    def _report_and_answer(self, reason: str) -> None:
        requests = self._service.requests
        hit = [*requests]
        self._loop.call_soon_threadsafe(self._answer_all)
        _log.critical("this process hangs and ends", reason=reason, requests=hit)
        faulthandler.dump_traceback()
        for _ in range(_LOOKS):
            if not requests:
                return
            self._left.wait(_ANSWERS_S / _LOOKS)
        _log.critical("requests lost", requests=[*requests])

    def _answer_all(self) -> None:
        self._service.begin_draining()
        self._service.engines.abandon()
