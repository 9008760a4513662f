"""Ends this process when it hangs, so that whoever started it starts a new one.

A thread that is stuck in a runtime or a driver cannot be stopped, and what it holds cannot be
taken from it: only a new process helps. A thread of its own looks for three things: batches that
run for too long, photos that are decoded or encoded for too long, and an event loop that takes no
turns any more. Of the last it counts its own turns and not seconds, so that a process that was
stopped for a while is not taken for one that hangs.
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

# For the answers to those who wait, and for all that is left to do before the end.
_ANSWERS_S: Final = 2.0
_FAREWELL_S: Final = 3.0

_LOOKS: Final = 100

_LONGEST_TURN_S: Final = 1.0

_log: Any = structlog.get_logger("service.watchdog")


class Watchdog:
    """Watches ``service`` from entering to leaving it, both in its event loop.

    What takes ``limit_s`` seconds hangs. Then the service turns unready, whoever waits for the
    device is answered, the log has the requests and every thread's stack, and ``end`` is called
    with `EXIT_STATUS`. ``on_turn`` is called in the event loop, at least once a second and ten
    times in ``limit_s``.
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
        self._silent_s = self._running_s = self._working_s = 0.0

    def __enter__(self) -> Self:
        # A daemon: it must not keep alive what it is to end.
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
            elif self._working_s >= self._limit_s:
                self._give_up(f"a photo has been worked on for {self._working_s:.0f} s")
            elif self._silent_s >= self._limit_s:
                self._give_up(f"the event loop has taken no turn for {self._silent_s:.0f} s")

    def _turn(self) -> None:
        self._silent_s = 0.0
        self._running_s = self._service.engines.running_s
        self._working_s = self._service.segmenter.working_s
        self._on_turn()

    def _give_up(self, reason: str) -> None:
        # In a thread, because even the log may be what hangs.
        farewell = threading.Thread(target=self._say_farewell, args=(reason,), daemon=True)
        farewell.start()
        farewell.join(_FAREWELL_S)
        self._left.set()
        self._end(EXIT_STATUS)

    def _say_farewell(self, reason: str) -> None:
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
