"""Cancels the work for a client that disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

T = TypeVar("T")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, but cancel it if the client disconnects, to free its place in the queue.

    The request's body must have been read. Raises `ClientDisconnect`.
    """
    worker = asyncio.current_task()
    if worker is None:
        raise RuntimeError("there is no task to cancel")
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            continue
        gone = True
        worker.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        # Unless a stop of the service has cancelled it too.
        if gone and not worker.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
