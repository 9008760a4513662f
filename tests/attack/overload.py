"""Five times the work that the service can do, in photos of 0.2 to 50 megapixels.

Photos differ in cost by a factor of a hundred, so their work is counted, not their number: the
work of a photo is the CPU time that the service takes for it when it is alone.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from service.settings import DEFAULT_MODEL
from tests.attack.exchange import Answer, Request, exchange
from tests.attack.framing import post
from tests.attack.watch import Bystanders, Seen, cpu_s, loopback
from tests.benchmarks.bench import Target
from tests.benchmarks.photos import resized, serving_photos
from tests.benchmarks.wire import arrivals
from tests.processes import Logged, logged
from tests.reliability.report import Report

FACTOR: Final = 5
GOODPUT: Final = 0.8

SIZES: Final = (
    *(((500, 375), 60), ((1600, 1200), 20), ((4000, 3000), 12), ((6000, 4000), 5)),
    ((8192, 6144), 3),
)
"""Width and height of photos, and how many of a hundred have them."""

_CONNECTIONS: Final = 8
_CAPACITY_S: Final = 20.0
_LOAD_S: Final = 60.0
_ALONE: Final = 3
_CLIENTS: Final = 64


class Photo(NamedTuple):
    """A photo to send. ``work_s``: CPU seconds of the service; ``share``: of the photos."""

    request: Request
    work_s: float
    share: int


class Sent(NamedTuple):
    """A photo, its answer, and when the answer had arrived, on the clock of `time.monotonic`."""

    photo: Photo
    answer: Answer
    ended_s: float


@dataclass(frozen=True, slots=True)
class Observed:
    """What became of a closed loop and of the overload, and how long each lasted.

    ``offered_s``: how long photos arrived; ``load_s``: until the last was answered.
    """

    capacity: Sequence[Sent]
    capacity_s: float
    load: Sequence[Sent]
    offered_s: float
    load_s: float
    seen: Seen

    @property
    def capacity_per_s(self) -> float:
        """Work done in each second of the closed loop; 1 is one core."""
        return _work_s(self.capacity) / self.capacity_s

    @property
    def goodput_per_s(self) -> float:
        """Work answered in each second of the overload."""
        return _work_s(self.load) / self.load_s


async def priced(service: Logged, photos: Sequence[tuple[bytes, int]]) -> list[Photo]:
    """Measure the work of each photo, given with its share, by sending it alone."""
    _, port = service.address
    found = []
    for number, (data, share) in enumerate(photos):
        request = Request(f"photo {number}", post(port, "/segment", data))
        taken_s = []
        for _ in range(_ALONE):
            before_s = cpu_s(service.process.pid)
            answer = await exchange(port, request)
            assert answer.status == 200, (answer.status, answer.detail)
            taken_s.append(cpu_s(service.process.pid) - before_s)
        # The clock ticks a hundred times a second.
        found.append(Photo(request, max(statistics.median(taken_s), 0.01), share))
    return found


async def overload(
    service: Logged, photos: Sequence[Photo], capacity_s: float, load_s: float
) -> Observed:
    """Measure what can be done in a closed loop, then send `FACTOR` times that."""
    _, port = service.address
    rng = random.Random(0)  # noqa: S311 - the same photos each time, not a secret
    shares = [photo.share for photo in photos]
    closed: list[Sent] = []

    async def ask(photo: Photo, sent: list[Sent], client: int) -> None:
        answer = await exchange(port, photo.request, source=loopback(client))
        sent.append(Sent(photo, answer, time.monotonic()))

    async def loop(client: int, until_s: float) -> None:
        while time.monotonic() < until_s:
            await ask(rng.choices(photos, shares)[0], closed, client)

    began_s = time.monotonic()
    loops = [loop(client, began_s + capacity_s) for client in range(_CONNECTIONS)]
    await asyncio.gather(*loops)
    closed_s = max(one.ended_s for one in closed) - began_s

    mean_s = sum(photo.work_s * photo.share for photo in photos) / sum(shares)
    rate_per_s = FACTOR * _work_s(closed) / closed_s / mean_s
    load: list[Sent] = []
    with Bystanders.of(port) as bystanders, bystanders.watching() as seen:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, at_s in enumerate(arrivals(rate_per_s, load_s, seed=0)):
                await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
                photo = rng.choices(photos, shares)[0]
                group.create_task(ask(photo, load, number % _CLIENTS))
    answered = [one.ended_s for one in load if one.answer.status == 200]
    ended_s = max([began_s + load_s, *answered])
    return Observed(closed, closed_s, load, load_s, ended_s - began_s, seen)


def measure(out: Path) -> Report:
    """Overload the default model."""
    sources = serving_photos(out / "photos", None, len(SIZES))
    photos = [
        (resized(source, size), share) for source, (size, share) in zip(sources, SIZES, strict=True)
    ]
    with logged(DEFAULT_MODEL, log_level="info") as service:
        priced_photos = asyncio.run(priced(service, photos))
        observed = asyncio.run(overload(service, priced_photos, _CAPACITY_S, _LOAD_S))
        alive = service.process.poll() is None
    return judge(observed, alive)


def judge(observed: Observed, alive: bool) -> Report:
    """Compare what was observed with the targets."""
    lost = [
        one for one in observed.load if one.answer.status != 200 and not one.answer.truthful_refusal
    ]
    goodput = observed.goodput_per_s / observed.capacity_per_s
    answered = [one.answer.seconds for one in observed.load if one.answer.status == 200]
    targets = [
        Target("services that ended", (int(not alive),), "", at_most=0),
        Target("goodput of the capacity", (goodput,), "x", at_least=GOODPUT),
        Target("neither answered nor refused", (len(lost),), "", at_most=0),
        Target("probes' p99", (observed.seen.probe_p99_ms(),), "ms", at_most=100),
    ]
    figures = {
        "capacity_work_per_s": observed.capacity_per_s,
        "goodput_work_per_s": observed.goodput_per_s,
        "offered_work_per_s": sum(one.photo.work_s for one in observed.load) / observed.offered_s,
        "statuses": dict(
            Counter(f"{one.answer.status} {one.answer.problem}".rstrip() for one in observed.load)
        ),
        "photos": [
            {
                "name": name,
                "work_s": work_s,
                "sent": len(of),
                "answered": sum(one.answer.status == 200 for one in of),
            }
            for name, work_s, of in _by_photo(observed.load)
        ],
        "longest_answered_s": max(answered, default=0.0),
    }
    return Report(targets, figures)


def _by_photo(sent: Sequence[Sent]) -> list[tuple[str, float, list[Sent]]]:
    photos = {one.photo.request.name: one.photo for one in sent}
    return [
        (name, photo.work_s, [one for one in sent if one.photo is photo])
        for name, photo in sorted(photos.items())
    ]


def _work_s(sent: Sequence[Sent]) -> float:
    """The work of the photos that were answered."""
    return sum(one.photo.work_s for one in sent if one.answer.status == 200)
