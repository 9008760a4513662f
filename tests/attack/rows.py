"""The rows of the table of known attacks, each by itself, under a budget of memory.

While a row lasts, probes must be answered, and all processes together stay in the budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from service.settings import DEFAULT_MODEL
from tests.attack import bombs
from tests.attack.bombs import PERSON, busy, one_color
from tests.attack.exchange import Answer, Request, acceptable, connect, exchange
from tests.attack.framing import PHOTO, post
from tests.attack.watch import (
    MIB,
    Bystanders,
    MemoryWatch,
    Seen,
    cpu_s,
    image_workers,
    loopback,
    p99_ms,
)
from tests.benchmarks.bench import Target
from tests.processes import Logged, logged
from tests.reliability.report import Report

MEMORY_MB: Final = 2048
MARGIN: Final = 1.1
PROBE_MS: Final = 100.0
AT_ONCE_S: Final = 3.0
"""A refusal that takes longer was not made at once; uploads of megabytes are part of it."""

_LEAST_S: Final = 3.0
"""How long a row lasts at least, so that enough probes are answered beside it."""

_WARM_UP_S: Final = 0.5
_IDLE: Final = 1000
_OVERLAYS: Final = 16
_WAITERS: Final = 20

Exchanges = list[tuple[Request, Answer]]


@dataclass(frozen=True, slots=True)
class Row:
    """An attack: ``send`` gets the server, and returns what was answered.

    ``some``: at least one request must be answered with 200.
    """

    name: str
    send: Callable[[Logged], Awaitable[Exchanges]]
    some: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a row. ``wrong``: what should not be, in words."""

    name: str
    statuses: dict[str, int]
    details: list[str]
    wrong: list[str]
    seconds: float
    cpu_s: float
    peak_mib: float
    seen: Seen = field(repr=False)

    def figures(self) -> dict[str, Any]:
        """For the report's file."""
        return {
            "name": self.name,
            "statuses": self.statuses,
            "details": self.details,
            "wrong": self.wrong,
            "seconds": self.seconds,
            "cpu_s": self.cpu_s,
            "peak_mib": self.peak_mib,
            "probes_p99_ms": {path: p99_ms(one) for path, one in self.seen.probes.items()},
            "probes_failed": self.seen.failed(),
        }


def single(request: Request, copies: int = 1) -> Row:
    """A row of one request, or of some copies at once."""

    async def send(service: Logged) -> Exchanges:
        return await _together(service, [request] * copies)

    return Row(request.name if copies == 1 else f"{copies} x {request.name}", send)


def cheap(port: int, model: str) -> list[Row]:
    """The rows that take seconds in all."""
    requests = bombs.cheap(port, model)
    charsets = [one for one in requests if one.name.startswith("charset")]
    errors = [one for one in requests if one.name.startswith("H2")]

    async def in_turn(service: Logged) -> Exchanges:
        return [one for request in charsets for one in await _together(service, [request])]

    return [
        *(single(one) for one in requests if one not in charsets),
        *(single(one, copies=4) for one in errors),
        Row("charset of a form", in_turn, some=True),
        Row("M4 workers that hang", _hung),
        Row("M1 idle connections", _idle),
    ]


def large(port: int, model: str) -> list[Row]:
    """The rows of many megapixels."""
    overlay = Request(
        "overlay of 50 MP", post(port, "/segment?view=overlay", busy(7071, 7071)), photos=1
    )
    mask = Request("mask of 50 MP", post(port, "/segment", one_color(7071, 7071, PERSON)))
    unread = bombs.binary_mask(port, model, one_color(7000, 7000))

    async def overlays(service: Logged) -> Exchanges:
        return await _together(service, [overlay] * _OVERLAYS)

    return [
        *(single(one) for one in bombs.large(port)),
        Row("H3 24 answers that are not read", lambda service: _unread(service, unread, 24)),
        Row("H3 250 answers that are not read", lambda service: _unread(service, unread, 250)),
        Row("H4 16 overlays of 50 MP at once", overlays, some=True),
        single(mask, copies=2),
    ]


async def _together(service: Logged, requests: Sequence[Request]) -> Exchanges:
    """Send requests at once, each from an address of its own."""
    _, port = service.address
    answers = await asyncio.gather(
        *(exchange(port, one, source=loopback(n)) for n, one in enumerate(requests))
    )
    return list(zip(requests, answers, strict=True))


async def _idle(service: Logged) -> Exchanges:
    """Hold as many connections as one process accepts; what is sent on them is nothing."""
    _, port = service.address
    async with _held() as connections:
        for number in range(_IDLE):
            connections.append(await connect(port, loopback(number % 8)))
        await asyncio.sleep(_LEAST_S)
    return await _together(service, [Request("afterwards", post(port, "/segment", PHOTO))])


async def _unread(service: Logged, request: Request, count: int) -> Exchanges:
    """Ask for large answers on many connections, and read none of them."""
    _, port = service.address
    loop = asyncio.get_running_loop()

    async def ask(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # refused before all of it was sent
            await loop.sock_sendall(connection, request.content)

    async with _held() as connections:
        for number in range(count):
            connections.append(await connect(port, loopback(number % 8), receive_bytes=65536))
        await asyncio.gather(*map(ask, connections))
        # Until what fits in the budget has been answered.
        await asyncio.sleep(4 * _LEAST_S)
    return await _together(service, [Request("afterwards", post(port, "/segment", PHOTO))])


async def _hung(service: Logged) -> Exchanges:
    """Stop all image workers under load: who waits for one gets an answer."""
    _, port = service.address
    workers = image_workers(service.process.pid)
    photo = Request("beside workers that hang", post(port, "/segment", PHOTO))
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        return await _together(service, [photo] * _WAITERS)
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def _held() -> AsyncIterator[list[socket.socket]]:
    """Connections that are closed together."""
    connections: list[socket.socket] = []
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


async def run(service: Logged, rows: Sequence[Row], least_s: float = _LEAST_S) -> list[Outcome]:
    """Run the rows, one after the other, until the process ends."""
    _, port = service.address
    pid = service.process.pid
    outcomes = []
    with MemoryWatch.of(pid) as memory, Bystanders.of(port) as bystanders:
        with bystanders.watching():
            await asyncio.sleep(_WARM_UP_S)
        for row in rows:
            memory.peak_bytes = 0
            began_s, began_cpu_s = time.monotonic(), cpu_s(pid)
            with bystanders.watching() as seen:
                done = await row.send(service)
                await asyncio.sleep(max(0.0, least_s - (time.monotonic() - began_s)))
            outcome = Outcome(
                row.name,
                dict(Counter(f"{one.status} {one.problem}".rstrip() for _, one in done)),
                sorted({one.detail for _, one in done if one.detail}),
                [*_wrong(done, row)],
                time.monotonic() - began_s,
                cpu_s(pid) - began_cpu_s,
                memory.peak_bytes / MIB,
                seen,
            )
            outcomes.append(outcome)
            print(f"{outcome.figures()}", flush=True)
            if service.process.poll() is not None:
                break
    return outcomes


def _wrong(done: Exchanges, row: Row) -> Iterator[str]:
    for request, answer in done:
        if not acceptable(request, answer):
            yield f"{request.name}: {answer.status or 'cut'} {answer.problem}"
        elif answer.status == 503 and answer.problem == "overloaded" and answer.seconds > AT_ONCE_S:
            yield f"{request.name}: refused after {answer.seconds:.1f} s"
    if row.some and not any(answer.status == 200 for _, answer in done):
        yield "none was answered"


def measure(out: Path) -> Report:
    """Run all rows with the default model."""
    with logged(DEFAULT_MODEL, log_level="info", memory_mb=MEMORY_MB) as service:
        _, port = service.address
        rows = [*cheap(port, DEFAULT_MODEL.name), *large(port, DEFAULT_MODEL.name)]
        outcomes = asyncio.run(run(service, rows))
        alive = service.process.poll() is None
    return judge(outcomes, len(rows), alive, MEMORY_MB)


def judge(outcomes: Sequence[Outcome], rows: int, alive: bool, memory_mb: int) -> Report:
    """Compare the outcomes with the targets."""
    wrong = [f"{one.name}: {what}" for one in outcomes for what in one.wrong]
    targets = [
        Target("rows that ended the service", (rows - len(outcomes) + (not alive),), "", at_most=0),
        Target("wrong, late or cut answers", (len(wrong),), "", at_most=0),
        Target(
            "most memory of all processes",
            (max(one.peak_mib for one in outcomes),),
            "MiB",
            at_most=memory_mb * MARGIN,
        ),
        Target(
            "probes' p99 in the slowest row",
            (max(one.seen.probe_p99_ms() for one in outcomes),),
            "ms",
            at_most=PROBE_MS,
        ),
        Target("probes that failed", (sum(one.seen.failed() for one in outcomes),), "", at_most=0),
    ]
    return Report(targets, {"wrong": wrong, "rows": [one.figures() for one in outcomes]})
