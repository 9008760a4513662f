"""Lets a burst of requests begin a few at a time, so that probes are answered meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

MOST_PER_TURN: Final = 4
"""Requests that begin in one turn of the event loop; each takes it about a millisecond."""


class Turns:
    """Counts what begins in a turn of the event loop that first uses it."""

    def __init__(self) -> None:
        self._left = MOST_PER_TURN
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False

    async def take(self) -> None:
        """Return in this turn or a later one, in order."""
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._end_of_turn)
        if self._left and not self._waiting:
            self._left -= 1
            return
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append(future)
        await future

    def _end_of_turn(self) -> None:
        self._left = MOST_PER_TURN
        while self._waiting and self._left:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                self._left -= 1
        self._counting = self._left < MOST_PER_TURN
        if self._counting:
            asyncio.get_running_loop().call_soon(self._end_of_turn)
