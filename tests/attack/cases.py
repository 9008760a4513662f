"""Thousands of hostile requests, one after the other: what does the worst of them cost?

A request is made from a seed and its number alone, so that it can be repeated:
``python -m tests.attack cases --seed S --only N``. CPU time and memory are those of all the
service's processes while the request was the only one. Afterwards the costliest are sent again
beside an ordinary client, on the tiny network and on the default one.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

from service.settings import DEFAULT_MODEL
from tests.artefacts import build_artefact
from tests.attack import framing, images, messages
from tests.attack.exchange import Request, acceptable, exchange
from tests.attack.watch import MIB, Bystanders, MemoryWatch, Seen, cpu_s, memory_bytes
from tests.benchmarks.bench import Target
from tests.benchmarks.photos import serving_photos
from tests.processes import Logged, logged
from tests.reliability.report import Report

CASES: Final = 10_000
CPU_S: Final = 5.0
MEMORY_MIB: Final = 1536.0
SLOWER: Final = 3.0
PROBE_MS: Final = 100.0

_SHOWN: Final = 10
_WORST: Final = 50
_GREW_MIB: Final = 8
_BESIDE_S: Final = 60.0
_BEFORE_S: Final = 20.0
_ACCEPTS: Final = ("*/*", "*/*", "*/*", "image/png", "image/webp, */*;q=0.1", "application/json")
_CONFIG: Final = (
    '<View><Image name="i" value="$i"/><BrushLabels name="b" toName="i">'
    '<Label value="person"/><Label value="any" predicted_values="background,cat,dog"/>'
    "</BrushLabels></View>"
)


class Measured(NamedTuple):
    """A case and what it cost.

    ``peak_mib``: of all processes together; ``before_mib``: what they had before it, which includes
    what workers keep of an earlier case until they have been idle for a while; ``log``: what the
    service logged about an answer of 500.
    """

    number: int
    name: str
    status: int
    problem: str
    acceptable: bool
    seconds: float
    cpu_s: float
    peak_mib: float
    before_mib: float
    photos: int
    log: str = ""

    @property
    def cpu_per_photo_s(self) -> float:
        """CPU seconds for each photo in it."""
        return self.cpu_s / self.photos


def draw(seed: int, number: int, port: int, model: str = "tiny") -> Request:
    """The request of a number."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311 - the same each time, not a secret
    kind = rng.random()
    if kind < 0.25:
        message = next(messages.requests(rng.getrandbits(32), 1, model))
        headers = [f"{name}: {value}" for name, value in message.headers.items()]
        head = framing.post(port, message.path, message.body, *headers)
        return Request(message.name.partition(": ")[2], head)
    if kind < 0.45:
        return framing.draw(rng, port)
    name, data = images.case(seed, number)
    return _with_image(rng, port, name, data, model)


def _with_image(rng: random.Random, port: int, name: str, data: bytes, model: str) -> Request:
    """A hostile file, sent in one of the ways in which photos can be sent."""
    query = rng.choice(["", *_queries(rng)])
    accept = f"Accept: {rng.choice(_ACCEPTS)}"
    way = rng.random()
    if way < 0.6:
        path = f"/segment{query}"
        return Request(f"{name}, {path}", framing.post(port, path, data, accept))
    if way < 0.75:
        path = f"/segment{query}"
        content_type = "Content-Type: multipart/form-data; boundary=b"
        body = framing.form(data)
        return Request(f"{name}, form", framing.post(port, path, body, content_type, accept))
    if way < 0.8:
        many = rng.choice([1, 1, 2, 4])
        part = framing.form(data)[: -len(b"--b--\r\n")]
        content_type = "Content-Type: multipart/form-data; boundary=b"
        path = f"/segment/batch{query}"
        content = framing.post(port, path, part * many + b"--b--\r\n", content_type)
        return Request(f"{name}, batch of {many}", content, photos=many)
    text = base64.b64encode(data).decode()
    if way < 0.87:
        content = framing.post(port, "/hf/image-segmentation", data)
        return Request(f"{name}, /hf", content)
    if way < 0.93:
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
        body = json.dumps({"inputs": [tensor]}).encode()
        return Request(f"{name}, /v2", framing.post(port, f"/v2/models/{model}/infer", body))
    tasks = [{"data": {"i": f"data:image/png;base64,{text}"}}]
    body = json.dumps({"tasks": tasks, "label_config": _CONFIG}).encode()
    return Request(f"{name}, Label Studio", framing.post(port, "/label-studio/predict", body))


def _queries(rng: random.Random) -> Sequence[str]:
    side = rng.choice([64, 512, 2048])
    return (
        f"?max_side={side}",
        f"?view=overlay&max_side={side}",
        f"?view=cutout&max_side={side}",
        f"?view=confidence&max_side={side}",
        f"?view=json&mask=polygons&max_side={side}",
        f"?view=json&mask=rle&max_side={side}",
        "?view=json&mask=png",
        "?view=overlay&alpha=1&classes=person",
    )


async def attack(
    service: Logged, seed: int, numbers: Iterable[int], model: str = "tiny"
) -> list[Measured]:
    """Send the requests of these numbers, one after the other, until the process ends."""
    _, port = service.address
    pid = service.process.pid
    done = []
    with MemoryWatch.of(pid) as memory:
        for number in numbers:
            request = draw(seed, number, port, model)
            before_bytes = memory.peak_bytes = memory_bytes(pid)
            before_s = cpu_s(pid)
            answer = await exchange(port, request)
            peak_bytes = max(memory.peak_bytes, memory_bytes(pid))
            done.append(
                Measured(
                    number,
                    request.name,
                    answer.status,
                    answer.problem,
                    acceptable(request, answer),
                    answer.seconds,
                    cpu_s(pid) - before_s,
                    peak_bytes / MIB,
                    before_bytes / MIB,
                    request.photos,
                    str(service.seen("unforeseen error")) if answer.status == 500 else "",
                )
            )
            if service.process.poll() is not None:
                break
    return done


async def beside(
    service: Logged, seed: int, numbers: Iterable[int], model: str, photo: bytes, every_s: float
) -> tuple[Seen, Seen]:
    """What bystanders see without the requests, and while they are sent in turn."""
    _, port = service.address
    one = Request("photo", framing.post(port, "/segment", photo))
    # Made before, so that making them takes no CPU time from the service meanwhile.
    requests = [draw(seed, number, port, model) for number in numbers]
    with Bystanders.of(port, one, every_s) as bystanders:
        with bystanders.watching() as before:
            await asyncio.sleep(_BEFORE_S)
        with bystanders.watching() as during:
            await _again(service, requests)
    return before, during


async def _again(service: Logged, requests: Sequence[Request]) -> None:
    """Send the requests in turn for `_BESIDE_S`, or until the process ends."""
    _, port = service.address
    until_s = time.monotonic() + _BESIDE_S
    for request in cycle(requests):
        if time.monotonic() > until_s or service.process.poll() is not None:
            return
        await exchange(port, request)


@dataclass(frozen=True, slots=True)
class _Share:
    """Numbers of cases for one process, which has a service of its own."""

    folder: str
    seed: int
    numbers: range

    def send(self) -> tuple[list[Measured], bool]:
        """Send them all; returns what they cost, and whether the service lives."""
        model = build_artefact(Path(tempfile.mkdtemp(dir=self.folder)) / "tiny")
        with logged(model, log_level="info") as service:
            done = asyncio.run(attack(service, self.seed, self.numbers))
            return done, service.process.poll() is None


def measure(out: Path, cases: int = CASES, seed: int = 1) -> Report:
    """Send ``cases`` requests, then the costliest again beside an ordinary client."""
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        shares = [_Share(folder, seed, range(n, cases, processes)) for n in range(processes)]
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            results = list(pool.map(_Share.send, shares))
        found = [one for done, _ in results for one in done]
        alive = all(lives for _, lives in results)
        again = [one.number for one in _costly(found)[:_WORST]]
        large = [one.number for one in _large(found)[:_SHOWN]]
        random.Random(seed).shuffle(again)  # noqa: S311
        photo = serving_photos(out / "photos", None, 1)[0].read_bytes()
        compared = {}
        tiny = build_artefact(Path(folder) / "tiny")
        for model, name, every_s in ((tiny, "tiny", 0.1), (DEFAULT_MODEL, "default", 0.5)):
            with logged(model, log_level="info") as service:
                if model is DEFAULT_MODEL:
                    found += asyncio.run(attack(service, seed, [*large, *again], model.name))
                compared[name] = asyncio.run(
                    beside(service, seed, again, model.name, photo, every_s)
                )
                alive = alive and service.process.poll() is None
    return judge(found, cases, alive, compared)


def judge(
    found: Sequence[Measured],
    cases: int,
    alive: bool,
    compared: dict[str, tuple[Seen, Seen]],
) -> Report:
    """Compare what was measured with the targets."""
    costly, large = _costly(found), _large(found)
    wrong = [one for one in found if not one.acceptable]
    targets = [
        Target("requests sent", (len(found),), "", at_least=cases),
        Target("services that ended", (int(not alive),), "", at_most=0),
        Target("answers that are 500, 504, or cut", (len(wrong),), "", at_most=0),
        Target("most CPU time for one photo", (costly[0].cpu_per_photo_s,), "s", at_most=CPU_S),
        Target("most memory of all processes", (large[0].peak_mib,), "MiB", at_most=MEMORY_MIB),
    ]
    figures: dict[str, Any] = {
        "statuses": dict(Counter(str(one.status) for one in found)),
        "problems": dict(Counter(one.problem for one in found if one.problem)),
        "costliest": [one._asdict() for one in costly[:_SHOWN]],
        "largest": [one._asdict() for one in large[:_SHOWN]],
        "wrong": [one._asdict() for one in wrong],
    }
    for name, (before, during) in compared.items():
        slower = during.photo_p99_ms() / before.photo_p99_ms()
        targets += [
            Target(f"{name}: an ordinary client's p99", (slower,), "x", at_most=SLOWER),
            Target(f"{name}: probes' p99", (during.probe_p99_ms(),), "ms", at_most=PROBE_MS),
            Target(f"{name}: failed beside it", (during.failed(),), "", at_most=0),
        ]
        figures[f"beside, {name}"] = {
            "before_p99_ms": before.photo_p99_ms(),
            "during_p99_ms": during.photo_p99_ms(),
            "photos": during.statuses(),
        }
    return Report(targets, figures)


def _costly(found: Sequence[Measured]) -> list[Measured]:
    return sorted(found, key=lambda one: one.cpu_per_photo_s, reverse=True)


def _large(found: Sequence[Measured]) -> list[Measured]:
    grew = [one for one in found if one.peak_mib > one.before_mib + _GREW_MIB]
    return sorted(grew or found, key=lambda one: one.peak_mib, reverse=True)
