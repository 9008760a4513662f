"""The record of a request's stages."""

import asyncio
import threading

import pytest

from service.telemetry import timings as module
from service.telemetry.timings import Stage, Timings, of_request


class Clock:
    """A clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        """The time, seconds."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all records in a test."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def names(timings: Timings) -> list[str]:
    """The recorded stages' names."""
    return [stage.name for stage in timings.stages]


def test_stages_are_recorded_in_order(clock: Clock) -> None:
    """Each stage has its start and its duration, in the order in which they ended."""
    timings = Timings()
    for name, seconds in (("decode", 0.5), ("preprocess", 0.25)):
        with timings.stage(name):
            clock.now_s += seconds
    timings.add("queue", 90.0, 2.0)
    assert timings.stages == [
        Stage("decode", 100.0, 0.5),
        Stage("preprocess", 100.5, 0.25),
        Stage("queue", 90.0, 2.0),
    ]
    assert list(timings.ms().items()) == [("decode", 500), ("preprocess", 250), ("queue", 2000)]


def test_a_failing_stage_is_recorded(clock: Clock) -> None:
    """The error is raised, and the stage's duration until then is recorded."""

    def fail(timings: Timings) -> None:
        with timings.stage("decode"):
            clock.now_s += 0.5
            raise ValueError("broken")

    timings = Timings()
    with pytest.raises(ValueError, match="broken"):
        fail(timings)
    assert timings.ms() == {"decode": 500}
    clock.now_s += 1
    assert timings.ms() == {"decode": 500}  # it is not open any more


def test_equal_names_are_summed(clock: Clock) -> None:
    """A stage of several photos has one sum, at the place of the first."""
    timings = Timings()
    for name in ("decode", "encode", "decode"):
        with timings.stage(name):
            clock.now_s += 0.25
    assert names(timings) == ["decode", "encode", "decode"]
    assert list(timings.ms().items()) == [("decode", 500), ("encode", 250)]


def test_an_open_stage_counts_until_now(clock: Clock) -> None:
    """JSON reports the encoding that it is part of; a later reading counts more."""
    timings = Timings()
    timings.add("encode", 0.0, 1.0)
    with timings.stage("encode"):
        clock.now_s += 0.5
        assert timings.ms() == {"encode": 1500}
        clock.now_s += 0.5
        assert timings.ms() == {"encode": 2000}
        assert names(timings) == ["encode"]
    assert names(timings) == ["encode", "encode"]


def test_a_request_records_its_photos_stages(clock: Clock) -> None:
    """Photos in other tasks and threads are recorded by their request and by themselves."""

    def work(photo: Timings, name: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        with photo.stage(name):
            clock.now_s += 0.5

    async def segment(name: str) -> Timings:
        photo = Timings.of_photo()
        await asyncio.to_thread(work, photo, name)
        return photo

    async def request(*photos: str) -> tuple[Timings, list[Timings]]:
        with of_request() as timings:
            tasks = [asyncio.create_task(segment(name)) for name in photos]
            return timings, [await task for task in tasks]

    async def concurrently() -> list[tuple[Timings, list[Timings]]]:
        return list(await asyncio.gather(request("a", "b"), request("c")))

    (first, (a, b)), (second, (c,)) = asyncio.run(concurrently())
    assert (names(a), names(b), names(c)) == (["a"], ["b"], ["c"])
    assert sorted(first.stages) == sorted([*a.stages, *b.stages])
    assert second.stages == c.stages


def test_a_photo_that_starts_in_a_thread_belongs_to_its_request() -> None:
    """`asyncio.to_thread` passes the request on."""

    async def request() -> tuple[Timings, Timings]:
        with of_request() as timings:
            return timings, await asyncio.to_thread(Timings.of_photo)

    timings, photo = asyncio.run(request())
    photo.add("decode", 1.0, 2.0)
    assert timings.stages == [Stage("decode", 1.0, 2.0)]


def test_a_photo_outside_a_request_is_recorded_alone() -> None:
    """After a request has ended, photos are not added to it."""
    with of_request() as ended:
        pass
    photo = Timings.of_photo()
    photo.add("decode", 1.0, 2.0)
    assert names(photo) == ["decode"]
    assert ended.stages == []


def test_the_header() -> None:
    """W3C's Server-Timing: ``name;dur=milliseconds``, separated by commas."""
    timings = Timings()
    assert timings.header() == ""
    timings.add("decode", 0.0, 0.0123456)
    timings.add("infer", 0.0, 1.5)
    timings.add("decode", 0.0, 0.001)
    assert timings.header() == "decode;dur=13.35, infer;dur=1500.00"
