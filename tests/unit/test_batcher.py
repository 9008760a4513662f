"""Batching, on a device and with a clock that the test controls."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest
import structlog

from service.errors import Draining, InferenceFailed, Overloaded
from service.inference.batcher import THREAD_NAME, Batcher

pytestmark = pytest.mark.anyio


class Device:
    """Doubles numbers; stops at every batch until released, and records the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.started: asyncio.Queue[list[int]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._turns = threading.Semaphore(0)

    def run(self, items: list[int]) -> Sequence[int]:
        """Run a batch; fail if it has a -1."""
        self.threads.add(threading.current_thread().name)
        self.batches.append(items)
        self._loop.call_soon_threadsafe(self.started.put_nowait, items)
        assert self._turns.acquire(timeout=30)
        if -1 in items:
            raise RuntimeError("device lost")
        return [item * 2 for item in items]

    def let_go(self, batches: int = 1000) -> None:
        """Release that many batches."""
        self._turns.release(batches)


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Read the clock."""
        return self.now_s


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    """A device, released at the end."""
    device = Device()
    yield device
    device.let_go()


async def submit(
    batcher: Batcher[int, int], *items: int, key: str = "a"
) -> list[asyncio.Task[int]]:
    """Submit items, and come back once all are queued."""

    async def one(item: int) -> int:
        return (await batcher.submit(item, key)).result

    tasks = [asyncio.create_task(one(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def test_one_item_on_an_idle_device_runs_at_once(device: Device) -> None:
    """It does not wait, however long max_wait is."""
    batcher = Batcher(device.run, max_batch=8, max_wait_s=3600)
    (task,) = await submit(batcher, 1)
    assert await device.started.get() == [1]
    device.let_go()
    assert await task == 2
    await batcher.close()


async def test_items_gather_while_the_device_is_busy(device: Device) -> None:
    """Items that arrive meanwhile run together, at most max_batch at once, in order of arrival."""
    batcher = Batcher(device.run, max_batch=3)
    tasks = await submit(batcher, 0)
    await device.started.get()
    tasks += await submit(batcher, 1, 2, 3, 4)
    device.let_go()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8]
    assert device.batches == [[0], [1, 2, 3], [4]]
    await batcher.close()


async def test_a_batch_has_one_key(device: Device) -> None:
    """Photos of different shapes never share a batch; the first to arrive runs first."""
    batcher = Batcher(device.run, max_batch=4)
    tasks = await submit(batcher, 0)
    await device.started.get()
    tasks += await submit(batcher, 1, key="b")
    tasks += await submit(batcher, 2, key="c")
    tasks += await submit(batcher, 3, key="b")
    device.let_go()
    await asyncio.gather(*tasks)
    assert device.batches == [[0], [1, 3], [2]]
    await batcher.close()


@pytest.mark.parametrize(
    ("waited_s", "batches"),
    [(0.9, [[0], [2, 3], [1]]), (1.0, [[0], [1], [2, 3]])],
    ids=["passed-over", "waited-long-enough"],
)
async def test_a_small_group_is_passed_over_no_longer_than_max_wait(
    device: Device, waited_s: float, batches: list[list[int]]
) -> None:
    """Before max_wait a full batch runs first; after it the small group does."""
    clock = Clock()
    batcher = Batcher(device.run, max_batch=2, max_wait_s=1.0, clock=clock)
    tasks = await submit(batcher, 0)
    await device.started.get()
    tasks += await submit(batcher, 1, key="small")
    tasks += await submit(batcher, 2, 3, key="full")
    clock.now_s += waited_s
    device.let_go()
    await asyncio.gather(*tasks)
    assert device.batches == batches
    await batcher.close()


async def test_a_full_queue_refuses_at_once(device: Device) -> None:
    """The refused item gets a time to retry; queued items are answered."""
    batcher = Batcher(device.run, max_queue=2)
    tasks = await submit(batcher, 0)
    await device.started.get()
    tasks += await submit(batcher, 1, 2)
    with pytest.raises(Overloaded, match="2 photos are waiting") as caught:
        await batcher.submit(3, "a")
    assert caught.value.retry_after_s >= 1
    device.let_go()
    assert await asyncio.gather(*tasks) == [0, 2, 4]
    await batcher.close()


async def test_a_cancelled_item_never_reaches_the_device(device: Device) -> None:
    """Its place in the queue is free immediately."""
    batcher = Batcher(device.run, max_batch=4)
    first = await submit(batcher, 0)
    await device.started.get()
    gone, stays = await submit(batcher, 1, 2)
    gone.cancel()
    await asyncio.wait([gone])
    assert batcher.waiting == 1
    device.let_go()
    assert await asyncio.gather(*first, stays) == [0, 4]
    assert device.batches == [[0], [2]]
    await batcher.close()


async def test_cancelling_all_items_of_a_running_batch_does_no_harm(device: Device) -> None:
    """The batch's results are dropped; the next batch runs."""
    batcher = Batcher(device.run)
    (gone,) = await submit(batcher, 1)
    await device.started.get()
    gone.cancel()
    await asyncio.wait([gone])
    (task,) = await submit(batcher, 2)
    device.let_go()
    assert await task == 4
    await batcher.close()


async def test_a_failed_batch_answers_every_member(device: Device) -> None:
    """Each gets its own error with the device's as cause; the next batch runs."""
    batcher = Batcher(device.run, max_batch=2)
    first = await submit(batcher, 0)
    await device.started.get()
    failing = await submit(batcher, -1, 5)
    fine = await submit(batcher, 6)
    device.let_go()
    errors = await asyncio.gather(*failing, return_exceptions=True)
    assert await asyncio.gather(*first, *fine) == [0, 12]
    assert errors[0] is not errors[1]
    for error in errors:
        assert isinstance(error, InferenceFailed)
        assert isinstance(error.__cause__, RuntimeError)
    await batcher.close()


async def test_a_batch_without_memory_is_overload() -> None:
    """Its members may retry; later batches have half the size."""
    sizes: list[int] = []

    def run(items: list[int]) -> Sequence[int]:
        sizes.append(len(items))
        if len(items) > 2:
            raise MemoryError
        return items

    batcher = Batcher(run, max_batch=4)
    refused = await asyncio.gather(*await submit(batcher, 1, 2, 3, 4), return_exceptions=True)
    assert [type(error) for error in refused] == [Overloaded] * 4
    assert await asyncio.gather(*await submit(batcher, 1, 2, 3, 4)) == [1, 2, 3, 4]
    assert sizes == [4, 2, 2]
    await batcher.close()


async def test_a_failed_batch_is_logged_with_its_requests(device: Device) -> None:
    """One line has the ids of all its members and no request's own id."""
    batcher = Batcher(device.run, max_batch=2)
    first = await submit(batcher, 0)
    await device.started.get()
    failing = []
    for request_id in ("r1", "r2"):
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            failing += await submit(batcher, -1)
    device.let_go()
    processors = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=processors) as lines:
        await asyncio.gather(*first, *failing, return_exceptions=True)
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("the batch failed", "error")
    assert (line["photos"], line["requests"]) == (2, ["r1", "r2"])
    assert line["exc_info"]
    assert "request_id" not in line
    await batcher.close()


async def test_a_batch_that_hangs_is_seen_and_given_up(device: Device) -> None:
    """running_s is the oldest batch's age; abandoning fails running and waiting items at once."""
    clock = Clock()
    batcher = Batcher(device.run, clock=clock)
    assert batcher.running_s == 0
    tasks = await submit(batcher, 1)
    await device.started.get()
    tasks += await submit(batcher, 2)
    clock.now_s += 5
    assert batcher.running_s == 5
    batcher.abandon()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [InferenceFailed] * 2
    with pytest.raises(Draining):
        await batcher.submit(3, "a")
    device.let_go()
    await batcher.close()
    assert device.batches == [[1]]


async def test_too_few_results_are_a_failure() -> None:
    """A result must never go to the wrong photo."""
    batcher: Batcher[int, int] = Batcher(lambda items: items[1:])
    with pytest.raises(InferenceFailed):
        await batcher.submit(1, "a")
    await batcher.close()


async def test_closing_answers_what_was_taken_and_refuses_the_rest(device: Device) -> None:
    """Every accepted item is answered."""
    batcher = Batcher(device.run)
    tasks = await submit(batcher, 1, 2, 3)
    closing = asyncio.create_task(batcher.close())
    await device.started.get()
    with pytest.raises(Draining):
        await batcher.submit(4, "a")
    device.let_go()
    await closing
    assert await asyncio.gather(*tasks) == [2, 4, 6]


async def test_one_thread_of_its_own_feeds_the_device(device: Device) -> None:
    """All batches run there, none on the event loop."""
    batcher = Batcher(device.run)
    device.let_go()
    await asyncio.gather(*await submit(batcher, 1, 2, 3))
    assert device.threads == {f"{THREAD_NAME}-0_0"}
    await batcher.close()


async def test_the_answer_says_how_long_it_waited(device: Device) -> None:
    """Queue and run times come from the batcher's clock."""
    clock = Clock()
    batcher = Batcher(device.run, clock=clock)
    first = await submit(batcher, 0)
    await device.started.get()
    second = asyncio.create_task(batcher.submit(1, "a"))
    await asyncio.sleep(0)
    clock.now_s += 2
    device.let_go(1)
    assert await device.started.get() == [1]
    clock.now_s += 3
    device.let_go()
    await asyncio.gather(*first)
    answer = await second
    assert (answer.result, answer.queue_s, answer.run_s) == (2, 2, 3)
    await batcher.close()


async def test_the_time_to_come_back_is_that_of_the_queue(device: Device) -> None:
    """The number of runs needed, each as long as the first; at least a second."""
    clock = Clock()
    batcher = Batcher(device.run, max_batch=2, max_queue=3, clock=clock)
    first = await submit(batcher, 0)
    await device.started.get()
    clock.now_s += 4
    device.let_go(1)
    await asyncio.gather(*first)
    assert [batcher.retry_after_s(ahead) for ahead in (0, 1, 2, 3)] == [1, 4, 4, 8]
    tasks = await submit(batcher, 1)
    await device.started.get()
    tasks += await submit(batcher, 2, 3, 4)
    with pytest.raises(Overloaded) as caught:
        await batcher.submit(5, "a")
    # One that runs and three that wait.
    assert caught.value.retry_after_s == 8
    device.let_go()
    await asyncio.gather(*tasks)
    await batcher.close()


class Split:
    """A device whose two shares can be stopped one by one."""

    def __init__(self) -> None:
        self.whole, self.left, self.right = Device(), Device(), Device()

    def let_go(self) -> None:
        """Release everything."""
        for device in (self.whole, self.left, self.right):
            device.let_go()


@pytest.fixture
async def split() -> AsyncIterator[Split]:
    """A split device, released at the end."""
    split = Split()
    yield split
    split.let_go()


async def test_a_batch_that_is_alone_gets_the_whole_device(split: Split) -> None:
    """One batch after the other, for the lowest latency."""
    batcher = Batcher(split.whole.run, shares=[split.left.run, split.right.run])
    split.let_go()
    for item in (1, 2):
        (task,) = await submit(batcher, item)
        assert await task == 2 * item
    assert split.whole.batches == [[1], [2]]
    assert split.left.batches == split.right.batches == []
    await batcher.close()


async def test_batches_that_wait_together_share_the_device(split: Split) -> None:
    """Items that arrive during a run of the whole device use both shares, in order of arrival."""
    batcher = Batcher(split.whole.run, shares=[split.left.run, split.right.run])
    tasks = await submit(batcher, 0)
    await split.whole.started.get()
    tasks += await submit(batcher, 1, 2, 3)
    split.whole.let_go(1)
    assert await split.left.started.get() == [1]
    assert await split.right.started.get() == [2]
    split.right.let_go(1)
    assert await split.right.started.get() == [3]
    split.let_go()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
    await batcher.close()


async def test_a_free_share_does_not_wait_for_the_other(split: Split) -> None:
    """An item that arrives while one share works runs on the other at once."""
    batcher = Batcher(split.whole.run, shares=[split.left.run, split.right.run])
    tasks = await submit(batcher, 1, 2)
    assert await split.left.started.get() == [1]
    assert await split.right.started.get() == [2]
    split.right.let_go(1)
    assert await tasks[1] == 4
    tasks += await submit(batcher, 3)
    assert await split.right.started.get() == [3]
    assert split.whole.batches == []
    split.let_go()
    assert await asyncio.gather(*tasks) == [2, 4, 6]
    await batcher.close()


async def test_one_long_run_is_not_the_usual(device: Device) -> None:
    """The time to retry moves by an eighth of the difference; failures do not count."""
    clock = Clock()
    batcher = Batcher(device.run, clock=clock)
    for item, run_s in enumerate((4, 12)):
        tasks = await submit(batcher, item)
        await device.started.get()
        clock.now_s += run_s
        device.let_go(1)
        await asyncio.gather(*tasks)
    (failing,) = await submit(batcher, -1)
    device.let_go()
    with pytest.raises(InferenceFailed):
        await failing
    assert batcher.retry_after_s(1) == 5
    await batcher.close()


async def test_shares_halve_the_time_to_come_back(split: Split) -> None:
    """Two at once take half as many turns."""
    clock = Clock()
    batcher = Batcher(split.whole.run, shares=[split.left.run, split.right.run], clock=clock)
    tasks = await submit(batcher, 1, 2)
    await split.left.started.get()
    await split.right.started.get()
    clock.now_s += 4
    split.let_go()
    await asyncio.gather(*tasks)
    assert [batcher.retry_after_s(ahead) for ahead in (2, 3, 6)] == [4, 8, 12]
    await batcher.close()


async def test_a_failure_on_one_share_leaves_the_other_alone(split: Split) -> None:
    """Each batch has its own outcome."""
    batcher = Batcher(split.whole.run, shares=[split.left.run, split.right.run])
    failing, working = await submit(batcher, -1, 2)
    split.let_go()
    with pytest.raises(InferenceFailed):
        await failing
    assert await working == 4
    await batcher.close()
