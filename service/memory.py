"""One account of the memory that requests may take, in bytes.

Memory is taken from the account before it is used, and given back after the answer is sent:
bodies as they arrive, photos before they are decoded, answers until the client has read them.
Photos that do not fit wait in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.errors import BodyTooLarge, ImageTooLarge, Overloaded

BODIES_SHARE = 1 / 4
"""The part that bodies may take, so that those which arrive cannot keep out those which have."""

CLIENT_SHARE = 1 / 2
"""The part that one client's photos and answers may take."""

CLIENT_BYTES = 1 << 30
"""The most bytes of a photo, and of all photos and answers of one client, however much there is."""

UNREAD_SHARE = 1 / 8
"""A client that has no more than this part may take more than its share for a single photo."""


@dataclass(eq=False, slots=True)
class _Waiting:
    client: str | None
    size: int
    turn: asyncio.Future[None]
    lease: Lease | None

    @property
    def answers(self) -> int:
        """Bytes of answers of the same request: they may be sent only after this photo's."""
        return 0 if self.lease is None else self.lease.answers


class MemoryAccount:
    """``capacity`` bytes. Belongs to one event loop."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bodies = 0
        self.photos = 0
        self._by_client: Counter[str | None] = Counter()
        self._answers: Counter[str | None] = Counter()  # of them, what waits to be read
        self._waiting: list[_Waiting] = []

    @contextlib.contextmanager
    def lease(self, client: str | None = None) -> Iterator[Lease]:
        """What one request holds, until the context ends. ``client``: whom it counts for."""
        lease = Lease(self, client)
        try:
            yield lease
        finally:
            lease.close()

    @property
    def state(self) -> tuple[int, int]:
        """Bytes taken, and the capacity."""
        return self.bodies + self.photos, self.capacity

    @property
    def largest(self) -> int:
        """The most bytes that one photo can ever get."""
        return min(self._for_photos, CLIENT_BYTES)

    @property
    def _for_photos(self) -> int:
        return int(self.capacity * (1 - BODIES_SHARE))

    @property
    def largest_body(self) -> int:
        """The most bytes that all bodies together can get."""
        return int(self.capacity * BODIES_SHARE)

    def take_body(self, size: int) -> None:
        """Take ``size`` bytes for a body. Raises `Overloaded` if there is no room."""
        if self.bodies + size > self.largest_body:
            raise Overloaded("too many bytes are arriving at once", 1.0)
        self.bodies += size

    def give_body(self, size: int) -> None:
        """Give back bytes of a body."""
        self.bodies -= size

    async def take(self, client: str | None, size: int, lease: Lease | None = None) -> None:
        """Take ``size`` bytes for a photo; waits in order. Raises `ImageTooLarge`.

        ``lease``: the request's, if it may have answers that wait for this photo's.
        """
        if size > self.largest:
            raise ImageTooLarge(
                f"the image and its answer need {size >> 20} MiB of memory, but a photo may have "
                f"{self.largest >> 20} MiB"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(client, size, turn, lease)
        self._waiting.append(waiting)
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:
                self._count(client, -size)
            self._serve()
            raise

    def give(self, client: str | None, size: int) -> None:
        """Give back bytes of a photo or an answer."""
        self._count(client, -size)
        self._serve()

    def answered(self, client: str | None, size: int) -> None:
        """Of the bytes that were taken, count ``size`` more as those of answers."""
        self._answers[client] += size
        if not self._answers[client]:
            del self._answers[client]

    def _count(self, client: str | None, size: int) -> None:
        self.photos += size
        self._by_client[client] += size
        if not self._by_client[client]:
            del self._by_client[client]

    def _serve(self) -> None:
        """Give their turn to those that fit, the first first.

        Who waits for its own client's memory is passed over; who waits for the account's is not,
        or large photos would never get theirs. For the same reason a client's later photos wait for
        its earlier ones, unless only answers that it does not read keep those waiting. Answers that
        wait for a photo must not keep it waiting, and a photo that only its own request's answers
        keep out must not hold up others.
        """
        share = min(self.capacity * CLIENT_SHARE, CLIENT_BYTES)
        little = share / CLIENT_SHARE * UNREAD_SHARE
        held_back: set[str] = set()
        for waiting in [*self._waiting]:
            client = waiting.client
            if client in held_back:
                continue
            own = self._by_client[client] - waiting.answers
            alone = client is None or own <= little
            if client is not None and not alone and own + waiting.size > share:
                if own > self._answers[client] - waiting.answers:
                    held_back.add(client)
                continue
            if self.photos + waiting.size > self._for_photos:
                if waiting.answers + waiting.size > self._for_photos:
                    continue
                return
            self._waiting.remove(waiting)
            self._count(waiting.client, waiting.size)
            if not waiting.turn.done():
                waiting.turn.set_result(None)


class Lease:
    """What one request holds of the account.

    ``client``: whom it counts for; ``answers``: bytes of those that are not sent yet.
    """

    def __init__(self, account: MemoryAccount, client: str | None) -> None:
        self._account = account
        self.client = client
        self._body = 0
        self._photos = 0
        self.answers = 0

    def take_body(self, size: int) -> None:
        """Take bytes for the request's body.

        Raises `Overloaded`, or `BodyTooLarge` if there is no room for it even alone.
        """
        if self._body + size > self._account.largest_body:
            raise BodyTooLarge(
                f"the service has memory for at most {self._account.largest_body} bytes of bodies"
            )
        self._account.take_body(size)
        self._body += size

    async def take(self, size: int) -> None:
        """Take bytes for a photo; waits in order. Raises `ImageTooLarge`."""
        await self._account.take(self.client, size, self)
        self._photos += size

    def answer(self, taken: int, size: int) -> None:
        """Of the bytes taken for a photo keep ``size`` for its answer, and give back the others."""
        kept = min(taken, size)
        self.answers += kept
        self._account.answered(self.client, kept)
        self.give(taken - kept)

    def sent(self, size: int) -> None:
        """Give back the bytes of an answer."""
        size = min(size, self.answers)
        self.answers -= size
        self._account.answered(self.client, -size)
        self.give(size)

    def give(self, size: int) -> None:
        """Give back bytes of a photo."""
        if size:
            self._photos -= size
            self._account.give(self.client, size)

    def close(self) -> None:
        """Give back everything."""
        self._account.give_body(self._body)
        self._body = 0
        self.sent(self.answers)
        self.give(self._photos)


def resident_bytes(pids: Iterable[int]) -> int:
    """The memory of these processes; what they share is counted once.

    Source: ``proc_pid_smaps_rollup(5)``, ``Pss``. A process that has ended counts 0.
    """
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
        total += int(found[1]) * 1024 if found is not None else 0
    return total
