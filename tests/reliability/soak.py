"""Soak: 20,000 valid and invalid requests of all kinds must not make resources grow.

Resources are compared after a rest, in which the service returns memory that it caches for the next
photo. In the rounds between rests it holds more: see ``rounds`` in the file.
"""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from PIL import Image
from tqdm import tqdm

from service.settings import DEFAULT_MODEL
from tests.benchmarks.bench import Target
from tests.benchmarks.photos import MEGAPIXELS_12, MIXED_SIZES, resized, serving_photos
from tests.benchmarks.wire import HOST, Connection, multipart, request_bytes
from tests.processes import Logged, logged
from tests.reliability import resources
from tests.reliability.report import Report
from tests.reliability.resources import Resources

REQUESTS: Final = 20_000
ROUND: Final = 500
EARLY_ROUNDS: Final = 2
"""After this many rounds, memory must not grow any more."""

_CONNECTIONS: Final = 8
_SETTLED_WITHIN_S: Final = 10.0
_REST: Final = "freed memory given back"

_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")

_ASKS: Final = (
    *(("/segment", "image/png"),) * 4,
    ("/segment?max_side=128", "image/png"),
    ("/segment?max_side=320&classes=person,cat", "image/png"),
    ("/segment?view=overlay", "image/jpeg"),
    ("/segment?view=overlay&alpha=0.8", "image/webp"),
    ("/segment?view=cutout", "image/png"),
    ("/segment?view=confidence", "image/png"),
    ("/segment", "application/json"),
    ("/segment?mask=polygons", "application/json"),
    ("/segment?mask=png", "application/json"),
    ("/segment/batch", "application/x-ndjson"),
    ("/segment/batch", "application/zip"),
    ("/hf/image-segmentation", "application/json"),
)

_BAD_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True)
class Case:
    """A request and its expected status; None if the client disconnects before the answer."""

    name: str
    request: bytes
    status: int | None = 200


@dataclass(frozen=True, slots=True)
class Round:
    """The state after ``requests``: resources, and how often a case got an unexpected status."""

    requests: int
    resources: Resources
    wrong: dict[str, int]


def measure(out: Path) -> Report:
    """Soak the service with the default model."""
    sources = serving_photos(out / "photos", None, 8)
    sizes = (*MIXED_SIZES * 4, MEGAPIXELS_12)
    photos = [resized(sources[n % len(sources)], size) for n, size in enumerate(sizes)]
    rests = (EARLY_ROUNDS, REQUESTS // ROUND)
    started = time.monotonic()
    with (
        logged(DEFAULT_MODEL) as service,
        tqdm(total=REQUESTS, unit="request") as progress,
    ):
        rounds = []
        for one in soak(service, photos, rests[-1], ROUND, rests):
            rounds.append(one)
            progress.update(ROUND)
            progress.set_postfix(asdict(one.resources))
    report = judge(rounds, EARLY_ROUNDS, growth_percent=3)
    report.figures["requests_per_s"] = REQUESTS / (time.monotonic() - started)
    return report


def soak(
    service: Logged,
    photos: Sequence[bytes],
    rounds: int,
    requests: int,
    rests: Collection[int] = (),
) -> Iterator[Round]:
    """Send ``rounds`` of ``requests`` made from JPEGs; rest after the rounds in ``rests``."""
    _, port = service.address
    pid = service.process.pid
    cases = draw(port, photos, random.Random(0))  # noqa: S311 - the same each time, not a secret
    before = resources.sample(pid)
    for number in range(1, rounds + 1):
        wrong = asyncio.run(_send(port, islice(cases, requests)))
        if number in rests:
            service.seen(_REST, count=len(service.lines(_REST)) + 1)
        held = _settled(pid, before.descriptors)
        yield Round(number * requests, held, dict(wrong))


def judge(rounds: Sequence[Round], early: int, growth_percent: float) -> Report:
    """Compare the resources after the last round with those after round ``early``.

    Threads are compared with the most in the first ``early`` rounds, because the pool that writes
    uploads to disk starts and ends threads.
    """
    first, last = rounds[early - 1].resources, rounds[-1].resources
    threads = max(one.resources.threads for one in rounds[:early])
    wrong = sum((Counter(one.wrong) for one in rounds), Counter())
    since = f"since request {rounds[early - 1].requests}"
    targets = [
        Target(
            f"memory growth {since}",
            (100 * (last.rss_mib / first.rss_mib - 1),),
            "%",
            at_most=growth_percent,
        ),
        Target(
            f"new file descriptors {since}",
            (last.descriptors - first.descriptors,),
            "",
            at_most=0,
        ),
        Target(f"new threads {since}", (last.threads - threads,), "", at_most=0),
        Target("answers with an unexpected status", (wrong.total(),), "", at_most=0),
    ]
    return Report(targets, {"wrong": dict(wrong), "rounds": [asdict(one) for one in rounds]})


def draw(port: int, photos: Sequence[bytes], rng: random.Random) -> Iterator[Case]:
    """An endless sequence of requests; a quarter of them are invalid."""
    files = [_in_format(photo, _FORMATS[n % len(_FORMATS)]) for n, photo in enumerate(photos)]
    bad = _bad_cases(port, photos[0])
    while True:
        if rng.random() < _BAD_SHARE:
            yield rng.choice(bad)
            continue
        path, accept = rng.choice(_ASKS)
        form = path.startswith("/segment/batch") or rng.random() < 0.5
        content_type, body = "image/*", rng.choice(files)
        if form and not path.startswith("/hf"):
            content_type, body = multipart("image", body)
        request = request_bytes(port, path, content_type, body, f"Accept: {accept}")
        yield Case(f"{path} as {accept}", request)


def _in_format(jpeg: bytes, image_format: str) -> bytes:
    if image_format == "JPEG":
        return jpeg
    file = io.BytesIO()
    with Image.open(io.BytesIO(jpeg)) as image:
        image.save(file, image_format)
    return file.getvalue()


def _bad_cases(port: int, photo: bytes) -> list[Case]:
    """Invalid requests, and clients that disconnect."""

    def post(path: str, body: bytes, *headers: str) -> bytes:
        return request_bytes(port, path, "image/*", body, *headers)

    many_pixels = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(many_pixels, "PNG")
    sound = post("/segment", photo)
    return [
        Case("no image", post("/segment", b"no image" * 100), 415),
        Case("a truncated image", post("/segment", photo[: len(photo) // 2]), 422),
        Case("too many pixels", post("/segment", many_pixels.getvalue()), 413),
        Case("too many bytes", post("/segment", bytes(21 * 2**20)), 413),
        Case("a parameter out of range", post("/segment?alpha=2", photo), 422),
        Case("an unknown model", post("/segment?model=none", photo), 404),
        Case("an unknown path", request_bytes(port, "/none"), 404),
        Case("no acceptable media type", post("/segment", photo, "Accept: text/html"), 406),
        Case("disconnects before the answer", sound, None),
        Case("disconnects in the middle of the photo", sound[: len(sound) // 2], None),
    ]


async def _send(port: int, cases: Iterator[Case]) -> Counter[str]:
    """Send all cases over several connections; counts the unexpected statuses of each."""
    wrong: Counter[str] = Counter()

    async def client() -> None:
        with closing(Connection(port)) as connection:
            for case in cases:
                if case.status is None:
                    await _hang_up(port, case.request)
                    continue
                try:
                    status = (await connection.exchange(case.request)).status
                except (OSError, EOFError):
                    connection.close()
                    status = 0
                if status != case.status:
                    wrong[f"{case.name}: {status}"] += 1

    await asyncio.gather(*(client() for _ in range(_CONNECTIONS)))
    return wrong


async def _hang_up(port: int, request: bytes) -> None:
    """Send a request and close the connection."""
    _, writer = await asyncio.open_connection(HOST, port)
    writer.write(request)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def _settled(pid: int, descriptors: int) -> Resources:
    """The resources once the service has closed its side of the connections too."""
    deadline = time.monotonic() + _SETTLED_WITHIN_S
    while (held := resources.sample(pid)).descriptors > descriptors:
        if time.monotonic() > deadline:
            break
    return held
