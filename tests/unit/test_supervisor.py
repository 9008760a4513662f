"""The supervisor, with fake workers that the test starts and kills."""

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping

import pytest

from service.errors import SegmentError, SettingsError
from service.server.supervisor import Backoff, Supervisor, plan
from service.server.watchdog import EXIT_STATUS
from service.settings import Settings
from service.system import available_cores

pytestmark = pytest.mark.anyio


class FakeWorker:
    """A worker that records its signals and exits on those in ``obeys``."""

    def __init__(self, pid: int, *, ready: bool, obeys: Mapping[int, int]) -> None:
        self.pid = pid
        self.ready = ready
        self.error: str | None = None
        self.served_s = 0.0
        self.signs_of_life = 0
        self.reloaded = asyncio.Event()
        self.signals: list[int] = []
        self.watched = asyncio.Event()
        self._obeys = obeys
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def ended(self) -> int:
        """Wait for `die`."""
        self.watched.set()
        return await self._status

    def reload(self) -> None:
        """Record the reload."""
        self.reloaded.set()

    def send_signal(self, number: int) -> None:
        """Record the signal; exit if the worker obeys it."""
        self.signals.append(number)
        if number in self._obeys:
            self.die(self._obeys[number])

    def die(self, status: int, error: str | None = None) -> None:
        """Exit now."""
        self.error = error
        self._status.set_result(status)


DRAINS: Mapping[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 0}


class Supervised:
    """A running supervisor, and every life of each worker."""

    def __init__(
        self,
        count: int = 2,
        *,
        ready: bool = True,
        obeys: Mapping[int, int] = DRAINS,
        grace_s: float = 30.0,
        patience_s: float = 30.0,
    ) -> None:
        self.lives: dict[int, list[FakeWorker]] = defaultdict(list)
        self.restarts: dict[int, dict[str, int]] = {}
        self.stops = 0
        self._ready = ready
        self._obeys = obeys
        self._started = asyncio.Condition()
        self.supervisor = Supervisor(
            self._start, count, grace_s=grace_s, patience_s=patience_s, on_stop=self._on_stop
        )
        self.run = asyncio.ensure_future(self.supervisor.run())

    async def worker(self, index: int, life: int = 1) -> FakeWorker:
        """A life of a worker, once the supervisor watches it."""
        async with self._started:
            await self._started.wait_for(lambda: len(self.lives[index]) >= life)
        worker = self.lives[index][life - 1]
        await worker.watched.wait()
        return worker

    async def _start(self, index: int, restarts: Mapping[str, int]) -> FakeWorker:
        self.restarts[index] = {**restarts}
        worker = FakeWorker(
            10 * index + len(self.lives[index]), ready=self._ready, obeys=self._obeys
        )
        async with self._started:
            self.lives[index].append(worker)
            self._started.notify_all()
        return worker

    def _on_stop(self) -> None:
        self.stops += 1


async def test_a_dead_worker_is_started_again() -> None:
    """At once, after any signal or status; the other workers are unaffected."""
    supervised = Supervised()
    await supervised.worker(1)
    (await supervised.worker(0)).die(-signal.SIGKILL)
    again = await supervised.worker(0, life=2)
    again.served_s = 3600.0
    again.die(1)
    await supervised.worker(0, life=3)
    assert supervised.restarts == {0: {"died": 2, "hung": 0}, 1: {"died": 0, "hung": 0}}
    supervised.supervisor.stop()
    assert await supervised.run == 0
    assert {index: len(lives) for index, lives in supervised.lives.items()} == {0: 3, 1: 1}


async def test_stopping_does_not_wait_for_a_restart() -> None:
    """A worker whose restart is due in half a second is not restarted."""
    supervised = Supervised(1)
    (await supervised.worker(0)).die(3)
    (await supervised.worker(0, life=2)).die(3)
    await asyncio.sleep(0)  # the supervisor notices its exit
    supervised.supervisor.stop()
    assert await supervised.run == 0
    assert len(supervised.lives[0]) == 2


def supervise(start: Callable[[int, Mapping[str, int]], Awaitable[FakeWorker]]) -> Supervisor:
    """A supervisor of one worker, with generous timeouts."""
    return Supervisor(start, 1, grace_s=30.0, patience_s=30.0, on_stop=lambda: None)


@pytest.mark.parametrize(("status", "error"), [(1, SegmentError), (2, SettingsError)])
async def test_a_first_start_that_fails_stops_all(status: int, error: type[SegmentError]) -> None:
    """Its own message is raised; the error's class follows from the exit status."""
    supervised = Supervised()
    other = await supervised.worker(1)
    (await supervised.worker(0)).die(status, "the artefact is wrong")
    with pytest.raises(error, match=r"^the artefact is wrong$") as caught:
        await supervised.run
    assert type(caught.value) is error
    assert other.signals == [signal.SIGTERM]
    assert supervised.stops == 1


async def test_a_worker_that_cannot_be_forked_stops_the_start() -> None:
    """The error contains the system's reason."""

    async def start(index: int, _: Mapping[str, int]) -> FakeWorker:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with pytest.raises(SegmentError, match="cannot start worker 0: Resource temporarily"):
        await supervise(start).run()


async def test_a_worker_without_a_sign_of_life_is_killed_and_started_again() -> None:
    """A worker that is still starting is exempt."""
    supervised = Supervised(1, obeys={**DRAINS, signal.SIGKILL: -signal.SIGKILL}, patience_s=0.01)
    second = await supervised.worker(0, life=2)
    assert supervised.lives[0][0].signals == [signal.SIGKILL]
    assert supervised.restarts[0] == {"died": 0, "hung": 1}
    supervised.supervisor.stop()
    assert await supervised.run == 0
    starting = Supervised(1, ready=False, obeys={signal.SIGTERM: -signal.SIGTERM}, patience_s=0.0)
    worker = await starting.worker(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert worker.signals == []
    starting.supervisor.stop()
    assert await starting.run == 0
    assert second.signals[-1] == signal.SIGTERM


async def test_a_worker_that_found_itself_hanging_is_counted_so() -> None:
    """The watchdog exits with a special status."""
    supervised = Supervised(1)
    (await supervised.worker(0)).die(EXIT_STATUS)
    await supervised.worker(0, life=2)
    assert supervised.restarts[0] == {"died": 0, "hung": 1}
    supervised.supervisor.stop()
    assert await supervised.run == 0


async def test_a_worker_that_gives_signs_of_life_is_left_alone() -> None:
    """Regardless of the number of checks."""
    supervised = Supervised(1, patience_s=0.0)
    worker = await supervised.worker(0)
    for _ in range(100):
        worker.signs_of_life += 1
        await asyncio.sleep(0)
    assert worker.signals == []
    supervised.supervisor.stop()
    assert await supervised.run == 0


async def test_a_hangup_reloads_all() -> None:
    """SIGHUP reaches the supervisor as a real signal."""
    supervised = Supervised(2)
    workers = [await supervised.worker(index) for index in (0, 1)]
    os.kill(os.getpid(), signal.SIGHUP)
    for worker in workers:
        await worker.reloaded.wait()
    assert [worker.signals for worker in workers] == [[], []]
    supervised.supervisor.stop()
    assert await supervised.run == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_are_passed_on(number: signal.Signals) -> None:
    """Each signal reaches every ready worker; ``on_stop`` runs once; the status is 0."""
    supervised = Supervised(obeys={})
    workers = [await supervised.worker(index) for index in (0, 1)]
    supervised.supervisor.stop(number)
    supervised.supervisor.stop(number)
    assert [worker.signals for worker in workers] == [[number, number]] * 2
    assert supervised.stops == 1
    for worker in workers:
        worker.die(0)
    assert await supervised.run == 0


async def test_a_worker_that_still_starts_is_ended_by_sigterm() -> None:
    """Whatever the signal was; its death by SIGTERM is not a failure."""
    supervised = Supervised(1, ready=False, obeys={signal.SIGTERM: -signal.SIGTERM})
    worker = await supervised.worker(0)
    supervised.supervisor.stop(signal.SIGINT)
    assert await supervised.run == 0
    assert worker.signals == [signal.SIGTERM]


async def test_a_worker_that_hangs_is_killed() -> None:
    """After ``grace_s``; the exit status is then 1."""
    supervised = Supervised(1, obeys={signal.SIGKILL: -signal.SIGKILL}, grace_s=0.0)
    worker = await supervised.worker(0)
    supervised.supervisor.stop()
    assert await supervised.run == 1
    assert worker.signals == [signal.SIGTERM, signal.SIGKILL]


async def test_a_stop_that_finds_a_worker_half_started() -> None:
    """The worker gets its signal as soon as it has started."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    worker = FakeWorker(1, ready=False, obeys={signal.SIGTERM: -signal.SIGTERM})

    async def start(index: int, _: Mapping[str, int]) -> FakeWorker:
        begun.set()
        await go_on.wait()
        return worker

    supervisor = supervise(start)
    run = asyncio.ensure_future(supervisor.run())
    await begun.wait()
    supervisor.stop()
    go_on.set()
    assert await run == 0
    assert worker.signals == [signal.SIGTERM]


def test_the_backoff_doubles_and_forgets() -> None:
    """0, then half a second, doubling to half a minute; 0 again after steady service."""
    backoff = Backoff()
    assert [backoff.next_s(0.0) for _ in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff.next_s(60.0), backoff.next_s(1.0)] == [0, 0.5]
    assert [backoff.next_s(0.0) for _ in range(5000)][-1] == 30


def test_one_process_keeps_its_settings() -> None:
    """Threads keep their default."""
    assert plan(Settings()) == [{"processes": 1, "gpus": None, "device": "auto"}]
    assert [own["device"] for own in plan(Settings(gpus="3"))] == ["cuda:3"]


def test_each_gpu_gets_its_processes() -> None:
    """In the configured order; several workers share the threads."""
    workers = plan(Settings(gpus="2,0", processes=2))
    assert [own["device"] for own in workers] == ["cuda:2", "cuda:2", "cuda:0", "cuda:0"]
    share = max(1, available_cores() // 4)
    assert all((own["threads"], own["decode_workers"]) == (share, share) for own in workers)
    assert all((own["processes"], own["gpus"]) == (1, None) for own in workers)


def test_processes_on_the_cpu_share_the_cores() -> None:
    """At least one each; an explicit number applies to each worker."""
    for count in (2, 3, 64):
        workers = plan(Settings(device="cpu", processes=count))
        assert len(workers) == count
        assert {own["threads"] for own in workers} == {max(1, available_cores() // count)}
    assert {own["threads"] for own in plan(Settings(processes=2, threads=7))} == {7}
    assert "decode_workers" not in plan(Settings(device="cpu", processes=2))[0]
