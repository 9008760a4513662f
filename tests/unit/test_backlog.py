"""Estimates of when the accepted photos will be done."""

import pytest

from service.backlog import Backlog, Expected
from service.errors import Overloaded


def test_photos_are_counted_by_their_cost() -> None:
    """A large photo counts by its pixels and the number of workers."""
    backlog = Backlog(limit_s=20.0, workers=2)
    with backlog.photo("overlay") as large:
        large.device_s = 0.5
        large.grow(100_000_000)
        assert backlog.left_s == pytest.approx(0.5 + 10.0 / 2)
        large.took(4.0)
        assert backlog.left_s == pytest.approx(0.5 + 6.0 / 2)
        large.took(40.0)
        assert backlog.left_s == pytest.approx(0.5)
    assert backlog.left_s == 0


def test_what_there_is_no_time_for_is_refused() -> None:
    """With the time after which the others are done; a photo that is alone is always tried."""
    backlog = Backlog(limit_s=20.0, workers=1)
    with backlog.photo("mask") as first:
        first.grow(300_000_000)
        backlog_s = backlog.left_s
        assert backlog_s == pytest.approx(30.0)
        with pytest.raises(Overloaded) as caught:
            backlog.check()
        assert caught.value.retry_after_s == pytest.approx(backlog_s)
        with backlog.photo("mask") as second, pytest.raises(Overloaded):
            second.grow(1_000_000)
    backlog.check()


def learnt(backlog: Backlog, kind: str, pixels: int | None, seconds: float) -> Expected:
    """A photo that took ``seconds``, and what the next one of its kind is expected to take."""
    with backlog.photo(kind) as photo:
        if pixels is not None:
            photo.grow(pixels)
        photo.took(seconds)
        photo.done()
    with backlog.photo(kind) as following:
        if pixels is not None:
            following.grow(pixels)
        return following


def test_estimates_follow_what_was_measured() -> None:
    """By kind and size, slowly: one odd photo must not set the estimate."""
    backlog = Backlog(limit_s=1000.0, workers=1)
    assert 1.0 < learnt(backlog, "overlay", 10_000_000, 9.0).worker_s < 3.0
    for _ in range(60):
        following = learnt(backlog, "overlay", 10_000_000, 9.0)
    assert following.worker_s == pytest.approx(9.0, rel=0.01)
    assert learnt(backlog, "mask", 10_000_000, 1.0).worker_s == pytest.approx(1.0)
    for _ in range(60):
        small = learnt(backlog, "mask", None, 0.2)
    assert small.worker_s == pytest.approx(0.2, rel=0.01)
