"""The data path of one photo, without HTTP."""

import asyncio
import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from service import segmenter as module
from service.artefact import voc
from service.errors import (
    DeadlineExceeded,
    ImageTooLarge,
    InferenceFailed,
    NotAcceptable,
    Overloaded,
    TooExpensive,
    UndecodableImage,
)
from service.inference.batcher import THREAD_NAME
from service.jobs.view import ViewJob
from service.runtime import open_service
from service.segmenter import Result
from service.settings import Settings
from service.views import VIEWS, Options
from tests.artefacts import encode, two_class_photo
from tests.fakes import FakeSession
from tests.tasks import HangingJob, LargeJob, LyingJob

pytestmark = pytest.mark.anyio

PHOTO = encode(two_class_photo())
JOB = ViewJob.of(Options())
OVERLAY = Options(view="overlay")
JPEG_OVERLAY = ViewJob(OVERLAY, "overlay", "image/jpeg")
STAGES = ["decode", "preprocess", "queue", "infer", "upsample", "encode"]


@pytest.fixture
def session() -> Iterator[FakeSession]:
    """A session whose gate is opened after the test."""
    fake = FakeSession()
    yield fake
    fake.gate.set()


def mask_size(result: Result) -> tuple[int, int]:
    """Width and height of the mask in a result."""
    with Image.open(io.BytesIO(result.content)) as image:
        return image.size


async def test_stages_run_off_the_event_loop(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """The network runs in the batcher's thread, all other stages in an image worker."""
    async with open_service(make_settings(), session) as service:
        session.threads.clear()  # those of the warm-up
        for job in (JOB, ViewJob.of(OVERLAY), JPEG_OVERLAY):
            result = await service.segmenter.segment(job, PHOTO)
            assert list(result.timings.ms()) == STAGES
    assert all(thread.startswith(THREAD_NAME) for thread in session.threads)


async def test_past_the_limit_photos_are_refused_before_decoding(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """queue_size photos are accepted; the next one is refused with a time to retry."""
    async with open_service(make_settings(queue_size=2), session) as service:
        session.gate.clear()
        held = [asyncio.create_task(service.segmenter.segment(JOB, PHOTO)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await service.segmenter.segment(JOB, b"no photo")
        assert caught.value.retry_after_s >= 1
        session.gate.set()
        assert len(await asyncio.gather(*held)) == 2


async def test_places_can_be_held_for_several_photos(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """`hold` gives at most the free places; photos in held places need no other."""
    async with open_service(make_settings(queue_size=3), session) as service:
        segmenter = service.segmenter
        with segmenter.hold(2) as two, segmenter.hold(2) as one:
            assert (two, one, segmenter.in_flight) == (2, 1, 3)
            with pytest.raises(Overloaded):
                await segmenter.segment(JOB, PHOTO)
            with pytest.raises(Overloaded), segmenter.hold():
                pytest.fail("there was a place")
            assert mask_size(await segmenter.segment_held(JOB, PHOTO)) == (96, 64)
        assert segmenter.in_flight == 0


async def test_memory_is_given_back_when_idle(
    make_settings: Callable[..., Settings], session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed memory is given back after a time without photos, never while one is in flight."""
    given_back: asyncio.Queue[int] = asyncio.Queue()
    async with open_service(make_settings(), session) as service:
        loop, segmenter = asyncio.get_running_loop(), service.segmenter

        def give_back() -> None:
            loop.call_soon_threadsafe(given_back.put_nowait, segmenter.in_flight)

        monkeypatch.setattr(module, "give_back_freed", give_back)
        monkeypatch.setattr(module, "IDLE_S", 0.0)
        with segmenter.hold():
            pass
        with segmenter.hold():  # cancels the timer
            for _ in range(3):
                await segmenter.segment(JOB, PHOTO)
            assert given_back.empty()
        for _ in range(2):  # after each idle time
            assert await asyncio.wait_for(given_back.get(), 10) == 0
            assert given_back.empty()
            with segmenter.hold():
                pass


async def test_a_photo_that_the_format_cannot_hold(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """WebP allows 16,383 pixels a side, JPEG 65,500; the error lists the other types."""
    async with open_service(make_settings(), session) as service:
        for width, unable in ((16_384, ["image/webp"]), (65_501, ["image/webp", "image/jpeg"])):
            photo = encode(np.zeros((1, width, 3), dtype=np.uint8))
            for media_type in VIEWS["overlay"].media_types:
                job = ViewJob(OVERLAY, "overlay", media_type)
                if media_type not in unable:
                    await service.segmenter.segment(job, photo)
                    continue
                with pytest.raises(NotAcceptable, match=f"this photo has {width}") as caught:
                    await service.segmenter.segment(job, photo)
                assert not set(caught.value.available) & set(unable)
                assert "image/png" in caught.value.available


async def test_the_deadline_ends_the_wait(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """If the device does not answer, the caller waits no longer than the deadline."""
    async with open_service(make_settings(deadline_s=0.05), session) as service:
        session.gate.clear()
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
            await service.segmenter.segment(JOB, PHOTO)
        session.gate.set()


async def test_a_failing_device_has_its_own_error(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """The error's cause is the runtime's error; the next photo succeeds."""
    async with open_service(make_settings(), session) as service:
        session.error = RuntimeError("device lost")
        with pytest.raises(InferenceFailed) as caught:
            await service.segmenter.segment(JOB, PHOTO)
        assert caught.value.__cause__ is session.error
        session.error = None
        assert mask_size(await service.segmenter.segment(JOB, PHOTO)) == (96, 64)


async def test_a_large_photo_keeps_its_size(
    make_settings: Callable[..., Settings],
) -> None:
    """A JPEG that is scaled while decoding gets a mask and an overlay of its full size."""
    large = two_class_photo().repeat(12, axis=0).repeat(12, axis=1)
    jpeg, png = encode(large, "JPEG", quality=95), encode(large)
    async with open_service(make_settings()) as service:
        answers = [
            np.asarray(Image.open(io.BytesIO(content)))
            for content in [
                (await service.segmenter.segment(ViewJob.of(options), data)).content
                for data, options in (
                    (jpeg, Options()),
                    (png, Options()),
                    (jpeg, Options(view="overlay", alpha=1.0)),
                    (jpeg, Options(view="overlay", alpha=0.0)),
                )
            ]
        ]
    scaled, whole, colors, photo = answers
    assert scaled.shape == whole.shape == large.shape[:2]
    assert (scaled == whole).mean() > 0.995
    inside = scaled != 0
    assert np.array_equal(colors[inside], voc.FULL_PALETTE[scaled[inside]])
    with Image.open(io.BytesIO(jpeg)) as image:
        assert np.abs(photo.astype(int) - np.asarray(image)).max() <= 2


async def test_a_photo_that_hangs_its_decoder_fails_alone(
    make_settings: Callable[..., Settings],
) -> None:
    """It ends with its worker after a multiple of its CPU time; others are answered meanwhile."""
    async with open_service(make_settings(photo_cpu_s=0.5, decode_workers=2)) as service:
        segmenter = service.segmenter
        hung = asyncio.create_task(segmenter.segment(HangingJob(), PHOTO))
        for _ in range(3):
            assert mask_size(await segmenter.segment(JOB, PHOTO)) == (96, 64)
        assert not hung.done()
        with pytest.raises(TooExpensive):
            await hung
        assert mask_size(await segmenter.segment(JOB, PHOTO)) == (96, 64)
        assert segmenter.memory.photos == 0


async def test_large_photos_wait_for_memory(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """Only as many at once as memory allows; all are answered, and all memory is given back."""
    async with open_service(make_settings(decode_workers=2), session) as service:
        segmenter = service.segmenter
        largest = segmenter.memory.largest
        large = LargeJob(1000, largest * 2 // 3)
        session.gate.clear()
        photos = [asyncio.create_task(segmenter.segment(large, PHOTO)) for _ in range(3)]
        await asyncio.to_thread(session.started.wait, 30)
        assert segmenter.memory.photos <= largest
        session.gate.set()
        assert [mask_size(one) for one in await asyncio.gather(*photos)] == [(96, 64)] * 3
        assert segmenter.memory.photos == 0


async def test_a_photo_that_never_fits_is_refused(make_settings: Callable[..., Settings]) -> None:
    """The error says what it needs and what there is."""
    async with open_service(make_settings()) as service:
        job = LargeJob(1000, service.segmenter.memory.largest + 2**20)
        with pytest.raises(ImageTooLarge, match=r"need \d+ MiB of memory, but a photo may have"):
            await service.segmenter.segment(job, PHOTO)


async def test_photos_that_there_is_no_time_for_are_refused_at_once(
    make_settings: Callable[..., Settings], session: FakeSession
) -> None:
    """A large photo is accepted if the others leave it the time; small ones go on."""
    async with open_service(
        make_settings(deadline_s=30.0, max_pixels=150_000_000), session
    ) as service:
        segmenter = service.segmenter
        session.gate.clear()
        first = asyncio.create_task(segmenter.segment(LargeJob(150_000_000, 2**26), PHOTO))
        await asyncio.to_thread(session.started.wait, 30)
        with pytest.raises(Overloaded, match="need 15 s") as caught:
            await segmenter.segment(LargeJob(150_000_000, 2**26), PHOTO)
        assert caught.value.retry_after_s == pytest.approx(15, abs=0.1)
        small = asyncio.create_task(segmenter.segment(JOB, PHOTO))
        session.gate.set()
        assert mask_size(await small) == mask_size(await first) == (96, 64)


async def test_the_answers_memory_is_kept_until_the_lease_ends(
    make_settings: Callable[..., Settings],
) -> None:
    """While the client reads, its answer counts."""
    async with open_service(make_settings()) as service:
        memory = service.segmenter.memory
        with memory.lease("198.51.100.7") as lease:
            result = await service.segmenter.segment(JOB, PHOTO, lease)
            assert memory.photos == len(result.content)
        assert memory.photos == 0


@pytest.mark.parametrize(
    "job",
    [
        *(LyingJob(needs=needs) for needs in (0, -1, 2**20, 2**64, 1e9, math.nan, "1", [1], True)),
        *(
            LyingJob(facts=facts)
            for facts in ({}, {"json_bytes": "1"}, {"json_bytes": 7}, {"json_bytes": -1})
        ),
    ],
)
async def test_what_no_worker_says_is_not_believed(
    make_settings: Callable[..., Settings], job: LyingJob
) -> None:
    """The photo is refused, the account of memory stays right, and the next photo is answered."""
    async with open_service(make_settings()) as service:
        segmenter = service.segmenter
        with pytest.raises(UndecodableImage, match="crashed"):
            await segmenter.segment(job, PHOTO)
        assert segmenter.memory.state[0] == 0
        assert (await segmenter.segment(LyingJob(facts={"json_bytes": 6}), PHOTO)).facts
        assert mask_size(await segmenter.segment(JOB, PHOTO)) == (96, 64)
