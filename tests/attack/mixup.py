"""Fifty clients with photos of their own, beside those that fail, leave or lose their worker.

Each mask is compared with that of the very photo, asked for alone before: an answer that belongs to
another photo, or to none, is found. `kills` is the same load of sound photos, for a minute, with a
`kill -9` of an image worker each second.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import socket
import struct
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from service.artefact import voc
from tests.artefacts import build_artefact, encode, paint
from tests.attack.exchange import Answer, Request, connect, exchange
from tests.attack.framing import form, post
from tests.attack.watch import image_workers, loopback
from tests.benchmarks.bench import Target
from tests.benchmarks.wire import HOST
from tests.processes import Logged, logged
from tests.reliability.report import Report

CLIENTS: Final = 50
ANSWERS: Final = 20_000
KILL_EVERY_S: Final = 1.0
KILLS_S: Final = 60.0
LOST_SHARE: Final = 0.05
"""Of the kills, at most so many may fail a photo: the others hit idle workers or are retried."""

_PHOTOS: Final = 100
_MULTIPART: Final = "Content-Type: multipart/form-data; boundary=b"
_IMAGES: Final = (
    "/segment",
    "/segment?view=overlay",
    "/segment?view=cutout",
    "/segment?view=confidence",
)
_INFER: Final = "/v2"
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "TIFF")
_KILLED_PHOTOS: Final = 20
_KILLED_CELL: Final = 200
_MOST_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo, as a file and as ``(H, W, 3) uint8``, and the right answers to it by path."""

    number: int
    data: bytes
    pixels: npt.NDArray[np.uint8]
    right: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """What came of the requests. ``compared``: masks that were compared; ``mixed``: the wrong ones.

    ``failed``: statuses that should not be, by kind of request.
    """

    compared: int = 0
    mixed: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    lost: int = 0

    def compare(self, kind: str, photo: Photo, path: str, found: bytes) -> None:
        """Compare an answer with the right one."""
        self.compared += 1
        self.kinds[kind] += 1
        if found != photo.right[path]:
            self.mixed.append(f"{kind}: photo {photo.number}")

    def fail(self, kind: str, answer: Answer) -> None:
        """Count an answer that is not 200."""
        if answer.status == 503 and answer.problem == "worker-lost":
            self.lost += 1
        elif not answer.truthful_refusal:
            self.failed[f"{kind}: {answer.status} {answer.problem}"] += 1


def make_photos(count: int, cell: int = 32) -> list[Photo]:
    """Photos of different sizes, no two with the same mask. ``cell``: see `paint`."""
    rng = np.random.default_rng(0)
    photos = []
    for number in range(count):
        height, width = (int(one) for one in rng.integers(3, 7, 2))
        ids = rng.integers(0, len(voc.CLASSES), (height, width)).astype(np.uint8)
        # Sizes differ by more than a cell, and each photo has a file format of its own.
        pixels = paint(ids, cell=cell + number % 7)
        image_format = _FORMATS[number % len(_FORMATS)]
        options = {"lossless": True} if image_format == "WEBP" else {}
        photos.append(Photo(number, encode(pixels, image_format, **options), pixels))
    return photos


async def learn(port: int, model: str, photos: Sequence[Photo]) -> None:
    """Ask for the right answers, one photo after the other."""
    for photo in photos:
        answer = await _infer(port, model, photo, HOST)
        assert answer.status == 200, answer
        photo.right[_INFER] = _binary_data(answer)
        for path in _IMAGES:
            answer = await exchange(port, Request("", post(port, path, photo.data)))
            assert answer.status == 200, answer
            photo.right[path] = answer.body
    masks = {photo.right["/segment"] for photo in photos}
    assert len(masks) == len(photos), "two photos have the same mask"


class Clients:
    """The ways in which a client asks; each is one request of ``source``."""

    def __init__(self, port: int, model: str, photos: Sequence[Photo], tally: Tally) -> None:
        self._port = port
        self._model = model
        self._photos = photos
        self._tally = tally

    async def ask(self, rng: random.Random, source: str) -> None:
        """One request of any kind."""
        way = rng.choices(
            [self.segment, self.batch, self.tensors, self.broken, self.leave], [10, 2, 2, 1, 2]
        )[0]
        await way(rng, source)

    async def segment(self, rng: random.Random, source: str) -> None:
        """A view of a photo."""
        photo, path = rng.choice(self._photos), rng.choice(_IMAGES)
        request = Request("", post(self._port, path, photo.data))
        answer = await exchange(self._port, request, source=source)
        if answer.status == 200:
            self._tally.compare(path, photo, path, answer.body)
        else:
            self._tally.fail(path, answer)

    async def batch(self, rng: random.Random, source: str) -> None:
        """Several photos in one request; one is broken."""
        chosen = rng.choices(self._photos, k=rng.randrange(2, 6))
        broken = rng.randrange(len(chosen))
        parts = [form(photo.data) for photo in chosen]
        parts[broken] = form(_broken(chosen[broken]))
        end = b"--b--\r\n"
        body = b"".join(part[: -len(end)] for part in parts) + end
        request = Request("", post(self._port, "/segment/batch", body, _MULTIPART))
        answer = await exchange(self._port, request, source=source)
        if answer.status != 200:
            self._tally.fail("batch", answer)
            return
        with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
            entries = json.loads(archive.read("index.json"))["images"]
            for number, (photo, entry) in enumerate(zip(chosen, entries, strict=True)):
                if entry.get("file"):
                    found = archive.read(entry["file"])
                    self._tally.compare("batch", photo, "/segment", found)
                elif entry["problem"]["type"].endswith("/worker-lost"):
                    self._tally.lost += 1
                elif number != broken:
                    self._tally.failed[f"batch: {entry['problem']}"] += 1

    async def tensors(self, rng: random.Random, source: str) -> None:
        """The Open Inference Protocol, with pixels as binary data."""
        photo = rng.choice(self._photos)
        answer = await _infer(self._port, self._model, photo, source)
        if answer.status == 200:
            self._tally.compare(_INFER, photo, _INFER, _binary_data(answer))
        else:
            self._tally.fail(_INFER, answer)

    async def broken(self, rng: random.Random, source: str) -> None:
        """A truncated photo."""
        request = Request("", post(self._port, "/segment", _broken(rng.choice(self._photos))))
        answer = await exchange(self._port, request, source=source)
        if answer.status != 422:
            self._tally.fail("a truncated photo", answer)

    async def leave(self, rng: random.Random, source: str) -> None:
        """A client that leaves at some moment, with a reset or without."""
        whole = post(self._port, rng.choice(_IMAGES), rng.choice(self._photos).data)
        sent = whole if rng.random() < 0.7 else whole[: rng.randrange(len(whole))]
        with suppress(OSError):
            connection = await connect(self._port, source)
            with connection:
                if rng.random() < 0.5:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                await asyncio.get_running_loop().sock_sendall(connection, sent)
                await asyncio.sleep(rng.random() * 0.2)
        self._tally.kinds["left"] += 1


async def _infer(port: int, model: str, photo: Photo, source: str) -> Answer:
    tensor = {
        "name": "image",
        "shape": photo.pixels.shape,
        "datatype": "UINT8",
        "parameters": {"binary_data_size": photo.pixels.size},
    }
    outputs = [{"name": "mask", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    body = head + photo.pixels.tobytes()
    request = Request("", post(port, f"/v2/models/{model}/infer", body, length))
    return await exchange(port, request, source=source)


def _binary_data(answer: Answer) -> bytes:
    return answer.body[int(answer.headers["inference-header-content-length"]) :]


def _broken(photo: Photo) -> bytes:
    return photo.data[: len(photo.data) // 2]


async def load(
    pid: int,
    ask: Callable[[random.Random, str], Awaitable[None]],
    tally: Tally,
    enough: Callable[[], bool],
    kill_every_s: float,
) -> None:
    """Let `CLIENTS` ask until it is enough, and kill a random image worker again and again."""

    async def client(number: int) -> None:
        rng = random.Random(number)  # noqa: S311 - the same each time, not a secret
        while not enough():
            await ask(rng, loopback(number))

    async def kill() -> None:
        rng = random.Random(0)  # noqa: S311
        while True:
            await asyncio.sleep(kill_every_s)
            if workers := image_workers(pid):
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    tally.kills += 1

    async with asyncio.TaskGroup() as group:
        killing = group.create_task(kill())
        await asyncio.gather(*map(client, range(CLIENTS)))
        killing.cancel()


async def mixup(
    service: Logged,
    model: str,
    count: int,
    kill_every_s: float = KILL_EVERY_S,
    photos: int = _PHOTOS,
) -> Tally:
    """Compare ``count`` masks of ``photos`` under a load of all kinds."""
    _, port = service.address
    made, tally = make_photos(photos), Tally()
    await learn(port, model, made)
    clients = Clients(port, model, made, tally)
    until_s = time.monotonic() + _MOST_S

    def enough() -> bool:
        dead = service.process.poll() is not None
        return tally.compared >= count or dead or time.monotonic() > until_s

    await load(service.process.pid, clients.ask, tally, enough, kill_every_s)
    return tally


async def kills(
    service: Logged,
    model: str,
    seconds: float,
    kill_every_s: float = KILL_EVERY_S,
    photos: int = _KILLED_PHOTOS,
) -> Tally:
    """Send sound photos, large enough to keep the workers busy."""
    _, port = service.address
    made, tally = make_photos(photos, _KILLED_CELL), Tally()
    await learn(port, model, made)
    clients = Clients(port, model, made, tally)
    until_s = time.monotonic() + seconds

    def enough() -> bool:
        return time.monotonic() > until_s or service.process.poll() is not None

    await load(service.process.pid, clients.segment, tally, enough, kill_every_s)
    return tally


def measure_kills(out: Path) -> Report:
    """Kill an image worker each second for a minute."""
    with tempfile.TemporaryDirectory() as folder:
        model = build_artefact(Path(folder) / "tiny")
        with logged(model, log_level="info") as service:
            tally = asyncio.run(kills(service, model.name, KILLS_S))
            alive = service.process.poll() is None
    return judge([tally], 0, alive=alive)


def measure_mixup(out: Path) -> Report:
    """Compare half of the masks with one process, and half with two."""
    tallies, alive = [], True
    with tempfile.TemporaryDirectory() as folder:
        model = build_artefact(Path(folder) / "tiny")
        for processes in (1, 2):
            with logged(model, log_level="info", processes=processes) as service:
                for worker in range(processes) if processes > 1 else ():
                    service.seen("listening", worker=worker)
                tallies.append(asyncio.run(mixup(service, model.name, ANSWERS // 2)))
                alive = alive and service.process.poll() is None
    return judge(tallies, ANSWERS, alive=alive)


def judge(tallies: Sequence[Tally], answers: int, *, alive: bool) -> Report:
    """Compare the tallies with the targets. ``answers``: how many masks had to be compared."""
    mixed = [one for tally in tallies for one in tally.mixed]
    failed = sum((tally.failed for tally in tallies), Counter())
    compared = sum(tally.compared for tally in tallies)
    killed = sum(tally.kills for tally in tallies)
    lost = sum(tally.lost for tally in tallies)
    targets = [
        Target("services that ended", (int(not alive),), "", at_most=0),
        Target("masks compared", (compared,), "", at_least=answers),
        Target("masks of another photo", (len(mixed),), "", at_most=0),
        Target("other failures than worker-lost", (failed.total(),), "", at_most=0),
        Target("worker-lost for each kill", (lost / max(killed, 1),), "", at_most=LOST_SHARE),
    ]
    figures = {
        "kills": killed,
        "worker_lost": lost,
        "failed": dict(failed),
        "mixed": mixed,
        "compared": [dict(tally.kinds) for tally in tallies],
    }
    return Report(targets, figures)
