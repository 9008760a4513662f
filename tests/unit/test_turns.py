"""Requests that arrive together begin a few at a time."""

import asyncio
import itertools

import pytest

from service.http.turns import MOST_PER_TURN, Turns

pytestmark = pytest.mark.anyio


async def test_a_burst_begins_in_order_a_few_in_each_turn() -> None:
    """Others get their turn of the event loop between them; all of them begin."""
    turns, begun = Turns(), []

    async def begin(number: int) -> None:
        await turns.take()
        begun.append(number)

    count = 5 * MOST_PER_TURN
    tasks = [asyncio.create_task(begin(number)) for number in range(count)]
    seen = [0]
    while len(begun) < count:
        await asyncio.sleep(0)
        seen.append(len(begun))
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert max(steps) == MOST_PER_TURN
    assert begun == list(range(count))
    await asyncio.gather(*tasks)


async def test_a_single_request_does_not_wait() -> None:
    """Nor does one after a burst, or after one that was cancelled while it waited."""
    turns = Turns()
    tasks = [asyncio.create_task(turns.take()) for _ in range(3 * MOST_PER_TURN)]
    await asyncio.sleep(0)
    tasks[-1].cancel()
    await asyncio.wait(tasks)
    for _ in range(3):
        await asyncio.sleep(0)
    taking = turns.take()
    with pytest.raises(StopIteration):
        taking.send(None)
