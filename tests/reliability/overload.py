"""Overload: five times as many photos as the service can answer, for a minute, and the recovery.

The loop is open: photos arrive as a Poisson process, independent of the service, and none waits for
another's connection. All times count from the scheduled arrival, which avoids coordinated omission.
The generator runs on the service's machine and takes CPU time from it; ``lag`` in the figures is
its own delay.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import cycle
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.settings import DEFAULT_MODEL, Settings
from tests.benchmarks.bench import Target
from tests.benchmarks.photos import serving_photos
from tests.benchmarks.wire import Connection, arrivals, multipart, request_bytes
from tests.processes import logged
from tests.reliability import resources
from tests.reliability.report import Report

FACTOR: Final = 5

_CONNECTIONS: Final = 8
_CAPACITY_S: Final = 10.0
_PHOTOS: Final = 16
_PROBES: Final = ("/readyz", "/metrics")
_PROBE_EVERY_S: Final = 0.1
_SAMPLE_EVERY_S: Final = 1.0

_LAST_S: Final = 1.0
"""Of the requests refused in these last seconds of the load, one in `FACTOR` retries on time.

The service can answer that many. If all retried, they would overload it again.
"""


class Reply(NamedTuple):
    """The outcome of a request; times are on the clock of `time.monotonic`.

    ``status`` 0: the connection broke. ``retry_after_s``: the ``Retry-After`` header, if any.
    """

    due_s: float
    sent_s: float
    ended_s: float
    status: int
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """All observations of a run.

    ``load``: the arriving photos. ``probes``: the requests sent meanwhile, by path. ``returned``:
    the retries after ``Retry-After``. ``first``: the first request after the load. ``rss_mib``: the
    service's memory, sampled once a second.
    """

    load: Sequence[Reply]
    probes: Mapping[str, Sequence[Reply]]
    returned: Sequence[Reply]
    first: Reply
    rss_mib: Sequence[float]


class Clients:
    """Connections to one port, one for each concurrent request."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []

    async def send(self, request: bytes, due_s: float) -> Reply:
        """Send a request at the time ``due_s``."""
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        connection = self._idle.pop() if self._idle else Connection(self._port)
        sent_s = time.monotonic()
        try:
            answer = await connection.exchange(request)
        except (OSError, EOFError):
            connection.close()
            return Reply(due_s, sent_s, time.monotonic(), 0)
        ended_s = time.monotonic()
        self._idle.append(connection)
        wait = answer.headers.get("retry-after")
        return Reply(due_s, sent_s, ended_s, answer.status, None if wait is None else float(wait))

    async def closed_loop(self, requests: Iterable[bytes], until_s: float) -> list[Reply]:
        """Send each request as soon as the previous one is answered."""
        replies = []
        for request in requests:
            if time.monotonic() >= until_s:
                break
            replies.append(await self.send(request, time.monotonic()))
        return replies

    def close(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.close()


def measure(out: Path, seconds: float = 60.0) -> Report:
    """Measure the default model's capacity, then send `FACTOR` times that for ``seconds``."""
    photos = [path.read_bytes() for path in serving_photos(out / "photos", None, _PHOTOS)]
    with logged(DEFAULT_MODEL, log_level="info") as service:
        _, port = service.address
        requests = [request_bytes(port, "/segment", *multipart("image", one)) for one in photos]
        capacity = asyncio.run(_capacity(port, requests))
        rate = FACTOR * capacity
        print(f"Capacity {capacity:.1f} photos/s; sending {rate:.0f}/s for {seconds:.0f} s.")
        observed = asyncio.run(overload(port, service.process.pid, requests, rate, seconds))
    report = judge(observed, Settings().deadline_s)
    report.figures.update(capacity_per_s=capacity, rate_per_s=rate, seconds=seconds)
    return report


async def _capacity(port: int, requests: Sequence[bytes]) -> float:
    """Photos answered per second in a closed loop."""
    clients = Clients(port)
    photos = cycle(requests)
    await clients.closed_loop(requests, time.monotonic() + _CAPACITY_S)
    until_s = time.monotonic() + _CAPACITY_S
    loops = [clients.closed_loop(photos, until_s) for _ in range(_CONNECTIONS)]
    replies = [reply for loop in await asyncio.gather(*loops) for reply in loop]
    clients.close()
    return len(_of(replies, HTTPStatus.OK)) / _CAPACITY_S


async def overload(
    port: int, pid: int, requests: Sequence[bytes], rate_per_s: float, seconds: float
) -> Observed:
    """Send the requests in turn, ``rate_per_s`` per second, to the server process ``pid``."""
    clients = Clients(port)
    photos = cycle(requests)
    begin_s = time.monotonic()
    load: list[Reply] = []
    returned: list[Reply] = []
    probes: dict[str, list[Reply]] = {path: [] for path in _PROBES}
    rss_mib: list[float] = []
    turns = cycle(range(FACTOR))

    async def ask(request: bytes, at_s: float) -> None:
        reply = await clients.send(request, begin_s + at_s)
        load.append(reply)
        if reply.retry_after_s is not None and at_s >= seconds - _LAST_S and next(turns) == 0:
            returned.append(await clients.send(request, reply.ended_s + reply.retry_after_s))

    async def probe(path: str) -> None:
        for number in range(int(seconds / _PROBE_EVERY_S)):
            due_s = begin_s + number * _PROBE_EVERY_S
            probes[path].append(await clients.send(request_bytes(port, path), due_s))

    async def watch() -> None:
        for _ in range(int(seconds / _SAMPLE_EVERY_S)):
            await asyncio.sleep(_SAMPLE_EVERY_S)
            rss_mib.append(resources.sample(pid).rss_mib)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        for path in _PROBES:
            group.create_task(probe(path))
        for at_s in arrivals(rate_per_s, seconds, seed=0):
            await asyncio.sleep(max(0.0, begin_s + at_s - time.monotonic()))
            group.create_task(ask(next(photos), at_s))
    first = await clients.send(next(photos), time.monotonic())
    clients.close()
    return Observed(load, probes, returned, first, rss_mib)


def judge(observed: Observed, deadline_s: float) -> Report:
    """Compare the observations with the targets; ``deadline_s`` is the service's."""
    load = observed.load
    accepted = _of(load, HTTPStatus.OK)
    refused = _of(load, HTTPStatus.SERVICE_UNAVAILABLE)
    with_wait = [reply for reply in refused if reply.retry_after_s is not None]
    too_long_s = waits_too_long_s(accepted, with_wait)
    rss = np.asarray(observed.rss_mib)
    sixth = max(1, len(rss) // 6)
    growth = rss[-sixth:].mean() / rss[:sixth].mean() - 1
    again = len(observed.returned) - len(_of(observed.returned, HTTPStatus.OK))
    latencies = {
        "accepted": latencies_ms(accepted),
        "refused": latencies_ms(refused),
        **{path: latencies_ms(replies) for path, replies in observed.probes.items()},
        "first": latencies_ms([observed.first]),
        "lag": 1000 * np.array([reply.sent_s - reply.due_s for reply in load]),
    }
    p99 = {name: _percentile(found, 99) for name, found in latencies.items()}
    targets = [
        _at_most("neither accepted nor refused", len(load) - len(accepted) - len(refused), 0),
        _at_most("accepted: p99 latency", p99["accepted"] / 1000, deadline_s, "s"),
        _at_most("refused: p99 latency", p99["refused"], 50, "ms"),
        _at_most("refused without Retry-After", len(refused) - len(with_wait), 0),
        _at_most("Retry-After too short by, p95", -_percentile(too_long_s, 5), 0, "s"),
        _at_most("Retry-After too long by, p99", _percentile(too_long_s, 99), 2, "s"),
        _at_most("refused again after Retry-After", again, 0),
        *(_at_most(f"{path}: p99 latency", p99[path], 100, "ms") for path in _PROBES),
        _at_most("memory growth, last sixth over first", 100 * float(growth), 3, "%"),
        _at_most("first request afterwards failed", observed.first.status != HTTPStatus.OK, 0),
    ]
    figures = {
        "statuses": dict(Counter(reply.status for reply in load)),
        "came_back": len(observed.returned),
        "retry_after_s": dict(Counter(reply.retry_after_s for reply in with_wait)),
        "retry_after_too_long_s": _spread(too_long_s),
        "rss_mib": observed.rss_mib,
        "latencies_ms": {name: _spread(found) for name, found in latencies.items()},
    }
    return Report(targets, figures)


def waits_too_long_s(
    accepted: Sequence[Reply], refused: Sequence[Reply]
) -> npt.NDArray[np.float64]:
    """How much longer each ``Retry-After`` was than the work queued ahead, in seconds.

    That work is the requests accepted before the refusal and not yet answered; the last of their
    answers empties the queue. A negative value means that ``Retry-After`` was too short.
    """
    sent_s = np.array([reply.sent_s for reply in accepted])
    ended_s = np.array([reply.ended_s for reply in accepted])
    return np.array(
        [
            (reply.retry_after_s or 0.0)
            - np.max(ended_s[sent_s <= reply.ended_s] - reply.ended_s, initial=0.0)
            for reply in refused
        ]
    )


def latencies_ms(replies: Sequence[Reply]) -> npt.NDArray[np.float64]:
    """Latencies from the scheduled arrival."""
    return 1000 * np.array([reply.ended_s - reply.due_s for reply in replies])


def _of(replies: Sequence[Reply], status: HTTPStatus) -> list[Reply]:
    return [reply for reply in replies if reply.status == status]


def _percentile(figures: npt.NDArray[np.float64], percent: float) -> float:
    """A percentile; nan without figures, which misses every target."""
    return float(np.percentile(figures, percent)) if len(figures) else float("nan")


def _spread(figures: npt.NDArray[np.float64]) -> dict[str, float]:
    return {f"p{percent}": _percentile(figures, percent) for percent in (0, 50, 99, 100)}


def _at_most(name: str, figure: float, bound: float, unit: str = "") -> Target:
    return Target(name, (figure,), unit, at_most=bound)
