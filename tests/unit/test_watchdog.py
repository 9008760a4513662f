"""The watchdog, with a device that the test can block."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import structlog

from service.errors import InferenceFailed
from service.jobs.view import ViewJob
from service.runtime import Phase, Service, open_service
from service.server.watchdog import EXIT_STATUS, Watchdog
from service.settings import Settings
from service.views import Options
from tests.artefacts import encode, two_class_photo
from tests.fakes import FakeSession

pytestmark = pytest.mark.anyio

JOB = ViewJob.of(Options())
PHOTO = encode(two_class_photo())
LIMIT_S = 0.2
PATIENCE_S = 30.0


class End:
    """Replaces the end of the process."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.came = threading.Event()

    def __call__(self, status: int) -> None:
        """Record the status."""
        self.status = status
        self.came.set()


@pytest.fixture
def session() -> FakeSession:
    """A device that the test can block."""
    return FakeSession()


@pytest.fixture
async def service(
    make_settings: Callable[..., Settings], session: FakeSession
) -> AsyncIterator[Service]:
    """A service on that device, which is unblocked at the end."""
    async with open_service(make_settings(), session) as running:
        yield running
        session.gate.set()


async def test_a_batch_that_hangs_ends_the_process(service: Service, session: FakeSession) -> None:
    """The service turns unready, waiting requests fail, and the log names them."""
    end = End()
    session.gate.clear()
    service.requests.append("r1")
    waiting = asyncio.create_task(service.segmenter.segment(JOB, PHOTO))
    waiting.add_done_callback(lambda _: service.requests.remove("r1"))
    with structlog.testing.capture_logs() as lines, Watchdog(service, LIMIT_S, end=end):
        assert await asyncio.to_thread(end.came.wait, PATIENCE_S)
    assert end.status == EXIT_STATUS != 0
    assert service.phase is Phase.DRAINING
    with pytest.raises(InferenceFailed):
        await waiting
    last = [line for line in lines if line["log_level"] == "critical"]
    assert [(line["event"], line["requests"]) for line in last] == [
        ("this process hangs and ends", ["r1"])
    ]
    assert last[0]["reason"].startswith("a batch has been running for")


async def test_a_loop_that_hangs_ends_the_process(service: Service) -> None:
    """No request can be answered; the log names the lost ones."""
    end = End()
    service.requests.append("r1")
    with structlog.testing.capture_logs() as lines, Watchdog(service, LIMIT_S, end=end):
        # In the event loop itself.
        assert end.came.wait(PATIENCE_S)
    assert end.status == EXIT_STATUS
    reasons = {line["event"]: line for line in lines if line["log_level"] == "critical"}
    assert "the event loop" in reasons["this process hangs and ends"]["reason"]
    assert reasons["requests lost"]["requests"] == ["r1"]


async def test_a_service_that_works_is_left_alone(service: Service) -> None:
    """``on_turn`` keeps being called; several short batches do not count as a long one."""
    end = End()
    turns = asyncio.Semaphore(0)
    with Watchdog(service, 10 * LIMIT_S, on_turn=turns.release, end=end):
        for _ in range(12):
            await turns.acquire()
            await service.segmenter.segment(JOB, PHOTO)
    assert not end.came.is_set()
    assert service.phase is Phase.READY
