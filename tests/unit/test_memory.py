"""The account of memory that requests may take."""

import asyncio
import os
import subprocess
import sys

import pytest

from service.errors import BodyTooLarge, ImageTooLarge, Overloaded
from service.memory import CLIENT_BYTES, Lease, MemoryAccount, resident_bytes

pytestmark = pytest.mark.anyio

ONE, OTHER, THIRD = "198.51.100.1", "198.51.100.2", "198.51.100.3"


async def started(account: MemoryAccount, client: str | None, size: int) -> asyncio.Task[None]:
    """A task that takes memory, begun."""
    task = asyncio.create_task(account.take(client, size))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_who_does_not_fit_waits_in_order() -> None:
    """A small photo does not overtake a large one that waits for the account."""
    account = MemoryAccount(400)
    with account.lease(ONE) as first:
        await first.take(200)
        large = await started(account, OTHER, 200)
        small = await started(account, THIRD, 50)
        assert (large.done(), small.done()) == (False, False)
        first.give(150)
        await asyncio.wait_for(asyncio.gather(large, small), 5)
        assert account.photos == 300
    assert account.photos == 250


async def test_bodies_leave_room_for_photos() -> None:
    """Bodies have a part of their own, and are refused beyond it at once."""
    account = MemoryAccount(400)
    with account.lease(ONE) as lease, account.lease(OTHER) as other:
        lease.take_body(100)
        with pytest.raises(Overloaded, match="too many bytes"):
            other.take_body(1)
        with pytest.raises(BodyTooLarge, match="at most 100 bytes"):
            lease.take_body(1)
        await lease.take(account.largest)
        assert account.state == (400, 400)
    assert account.state == (0, 400)


async def test_a_photo_that_never_fits() -> None:
    """It is refused instead of waiting for ever."""
    account = MemoryAccount(400 * 2**20)
    with pytest.raises(ImageTooLarge, match="need 301 MiB of memory, but a photo may have 300"):
        await account.take(ONE, 301 * 2**20)


async def test_one_client_cannot_take_all() -> None:
    """Its answers and photos may take half; who waits for that does not hold up the others."""
    account = MemoryAccount(400)
    with account.lease(ONE) as unread:
        await unread.take(150)
        own = await started(account, ONE, 100)
        assert not own.done()
        await asyncio.wait_for(account.take(OTHER, 100), 5)
    await asyncio.wait_for(own, 5)


async def test_a_single_photo_may_take_more_than_a_clients_share() -> None:
    """The only photo of a client may be as large as the account allows."""
    account = MemoryAccount(400)
    await account.take(ONE, account.largest)
    assert account.photos == 300


async def test_a_request_does_not_wait_for_its_own_answers() -> None:
    """In a batch, answers of small photos wait for the large one before them."""
    account = MemoryAccount(400)
    with account.lease(ONE) as batch:
        await batch.take(60)
        large = asyncio.create_task(batch.take(240))
        await asyncio.sleep(0)
        assert not large.done()
        batch.answer(60, 20)
        await asyncio.wait_for(large, 5)
        batch.answer(240, 40)
        assert (account.photos, batch.answers) == (60, 60)
        batch.sent(40)
        assert (account.photos, batch.answers) == (20, 20)
    assert account.state == (0, 400)


async def test_a_request_that_waits_for_itself_does_not_hold_up_others() -> None:
    """Its answers and its next photo are together more than the account has."""
    account = MemoryAccount(400)
    with account.lease(ONE) as batch:
        await batch.take(100)
        batch.answer(100, 100)
        large = asyncio.create_task(batch.take(240))
        await asyncio.sleep(0)
        await asyncio.wait_for(account.take(OTHER, 50), 5)
        account.give(OTHER, 50)
        batch.sent(100)
        await asyncio.wait_for(large, 5)


@pytest.mark.parametrize("served", [False, True])
async def test_who_goes_away_leaves_nothing(served: bool) -> None:
    """Whether it was served at the same moment or still waited."""
    account = MemoryAccount(400)
    await account.take(ONE, 300)
    waiting = await started(account, OTHER, 100)
    if served:
        account.give(ONE, 300)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert account.photos == (0 if served else 300)
    if not served:
        account.give(ONE, 300)
    await asyncio.wait_for(account.take(OTHER, 300), 5)


async def test_a_lease_gives_back_what_is_left() -> None:
    """In parts and at the end."""
    account = MemoryAccount(400)
    lease = Lease(account, ONE)
    lease.take_body(10)
    await lease.take(30)
    lease.give(20)
    assert account.state == (20, 400)
    lease.close()
    lease.close()
    assert account.state == (0, 400)


def test_resident_memory_is_measured() -> None:
    """Of several processes; one that has ended counts nothing."""
    code = "block = b'x' * 2**26; print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        alone = resident_bytes([process.pid])
        assert 2**26 < alone < 2 * 2**26
        assert resident_bytes([process.pid, os.getpid()]) > alone + 2**20
        process.stdin.write(b"\n")
    assert resident_bytes([process.pid]) == 0


async def test_a_large_photo_is_not_passed_by_its_own_clients_later_ones() -> None:
    """Otherwise small photos of the same address, one after the other, would starve it."""
    account = MemoryAccount(400)
    with account.lease(ONE) as first:
        await first.take(100)
        large = await started(account, ONE, 250)
        later = await started(account, ONE, 60)
        assert (large.done(), later.done()) == (False, False)
        await asyncio.wait_for(account.take(OTHER, 20), 5)
    await asyncio.wait_for(large, 5)


async def test_answers_that_are_not_read_hold_up_no_other_photo_of_the_client() -> None:
    """Many may be behind one address: one that reads slowly must not stop the others."""
    account = MemoryAccount(400)
    with account.lease(ONE) as unread:
        await unread.take(100)
        unread.answer(100, 100)
        large = await started(account, ONE, 250)
        await asyncio.wait_for(account.take(ONE, 60), 5)
        assert not large.done()
        account.give(ONE, 60)
    await asyncio.wait_for(large, 5)


async def test_one_client_has_at_most_a_gibibyte() -> None:
    """However much there is, a photo and all photos of one client get no more."""
    account = MemoryAccount(64 * CLIENT_BYTES)
    with pytest.raises(ImageTooLarge, match="a photo may have 1024 MiB"):
        await account.take(ONE, CLIENT_BYTES + 1)
    await account.take(ONE, CLIENT_BYTES)
    own = await started(account, ONE, 1)
    await account.take(OTHER, CLIENT_BYTES)
    assert not own.done()
    account.give(ONE, CLIENT_BYTES)
    await own
