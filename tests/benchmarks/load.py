"""The load generator: separate processes with raw sockets over asyncio and keep-alive connections.

Reads a `Load` as JSON from stdin and writes a `Measurement` as JSON to stdout. In a closed loop
each connection sends its next photo as soon as the previous one is answered; this measures the
capacity. In an open loop photos arrive as a Poisson process, independent of the server, and latency
counts from the scheduled arrival, which avoids coordinated omission.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Final

from tests.benchmarks import usage
from tests.benchmarks.wire import Connection, arrivals, multipart, request_bytes

_ANSWER_TIMEOUT_S: Final = 120.0

_LEAD_S: Final = 0.7
"""Time for several generators to start, so that all of them measure the same window."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: POST requests to each of ``paths`` in turn, with each of ``photos`` in turn.

    ``field`` is the photo's multipart field. The loop is closed over ``connections``; with
    ``rate_per_s`` it is open and uses at most ``connections``. A warm-up of ``warm_up_s`` is not
    measured. The window ends after ``seconds`` or ``requests``, whichever comes first. ``pid`` is
    the server's; its process tree is sampled. ``begin_at_s`` is the start time on the clock of
    `time.monotonic`; None starts at once.
    """

    port: int
    paths: tuple[str, ...]
    field: str
    photos: tuple[str, ...]
    connections: int
    seconds: float
    pid: int
    warm_up_s: float = 1.0
    requests: int = 100_000
    rate_per_s: float | None = None
    seed: int = 0
    begin_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured window. ``latencies_ms`` has one entry per successful answer.

    ``throughput``: successful answers per second. ``cpu_ms``: CPU time of the server's process tree
    per answer. ``client_cpu``: the share of one core that the busiest load generator used.
    ``started_s`` and ``ended_s``: the window on the clock of `time.monotonic`.
    """

    throughput: float
    answers: int
    failures: int
    latencies_ms: list[float]
    cpu_ms: float
    client_cpu: float
    rss_mib: float
    started_s: float
    ended_s: float

    def summary(self) -> dict[str, float]:
        """The window for the results file, with latency percentiles instead of single latencies."""
        left_out = {"latencies_ms", "started_s", "ended_s"}
        figures = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {**figures, **latency_summary(self.latencies_ms)}


def latency_summary(latencies_ms: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile and mean; empty for an empty sequence."""
    if not latencies_ms:
        return {}
    ordered = sorted(latencies_ms)
    return {
        "p50_ms": statistics.median(ordered),
        "p95_ms": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "p99_ms": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "mean_ms": statistics.fmean(ordered),
    }


def measure(load: Load, generators: int = 1) -> Measurement:
    """Run a `Load` in one process, or in several that share its connections and rate."""
    if generators == 1:
        return _measure(load)
    with ThreadPoolExecutor(generators) as pool:
        return merged(list(pool.map(_measure, split(load, generators, time.monotonic() + _LEAD_S))))


def split(load: Load, generators: int, begin_at_s: float) -> list[Load]:
    """Divide ``load`` between several generators, at most one per connection."""
    count = min(generators, load.connections)
    return [
        replace(
            load,
            # Each starts with a different photo, as the connections of one generator do.
            photos=load.photos[number:] + load.photos[:number],
            connections=load.connections // count + (number < load.connections % count),
            requests=-(-load.requests // count),
            # The sum of Poisson processes is a Poisson process.
            rate_per_s=load.rate_per_s / count if load.rate_per_s is not None else None,
            seed=load.seed + number,
            begin_at_s=begin_at_s,
        )
        for number in range(count)
    ]


def merged(parts: Sequence[Measurement]) -> Measurement:
    """Combine what several generators measured in the same window of one server."""
    answers = sum(part.answers for part in parts)
    # Each generator samples the whole server.
    first = parts[0]
    server_cpu_ms = first.cpu_ms * max(1, first.answers)
    return Measurement(
        throughput=sum(part.throughput for part in parts),
        answers=answers,
        failures=sum(part.failures for part in parts),
        latencies_ms=[latency for part in parts for latency in part.latencies_ms],
        cpu_ms=server_cpu_ms / max(1, answers),
        client_cpu=max(part.client_cpu for part in parts),
        rss_mib=first.rss_mib,
        started_s=max(part.started_s for part in parts),
        ended_s=min(part.ended_s for part in parts),
    )


def _measure(load: Load) -> Measurement:
    window_s = load.warm_up_s + load.seconds
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.load"],
        input=json.dumps(asdict(load)),
        capture_output=True,
        text=True,
        check=False,
        timeout=window_s + 2 * _ANSWER_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr}")
    return Measurement(**json.loads(done.stdout))


class _Run:
    """One measured window of a `Load`."""

    def __init__(self, load: Load) -> None:
        self._load = load
        forms = (multipart(load.field, Path(photo).read_bytes()) for photo in load.photos)
        self._forms = list(forms)
        self._numbers = count()
        # (scheduled or sent, answered, successful): the times are time.monotonic's, a clock that
        # all processes of a machine share.
        self._answers: list[tuple[float, float, bool]] = []
        self._left = load.requests

    async def closed(self) -> Measurement:
        """Measure a closed loop; the load starts before the window and lasts until its end."""
        load = self._load
        start = time.monotonic() + load.warm_up_s
        end = start + load.seconds
        connections = [Connection(load.port) for _ in range(load.connections)]
        # Connect one by one: a single worker process would accept simultaneous connections.
        gap_s = min(0.05, load.warm_up_s / 2 / load.connections)
        sending = asyncio.gather(
            *(
                self._one_after_another(one, end, number * gap_s)
                for number, one in enumerate(connections)
            )
        )
        await asyncio.sleep(load.warm_up_s)
        before, cpu_s = usage.sample(load.pid), time.process_time()
        start = time.monotonic()
        await asyncio.wait([sending], timeout=end - start)
        after, cpu_s = usage.sample(load.pid), time.process_time() - cpu_s
        end = time.monotonic()
        await sending
        return self._measurement(before, after, cpu_s, start, end)

    async def _one_after_another(
        self, connection: Connection, until: float, delay_s: float = 0.0
    ) -> None:
        await asyncio.sleep(delay_s)
        while time.monotonic() < until and self._left > 0:
            self._left -= 1
            await self._send(connection, time.monotonic())

    async def open(self) -> Measurement:
        """Measure an open loop; every photo that arrives in the window counts, however late."""
        load = self._load
        assert load.rate_per_s is not None
        await self._one_after_another(Connection(load.port), time.monotonic() + load.warm_up_s)
        self._answers.clear()
        free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        for _ in range(load.connections):
            free.put_nowait(Connection(load.port))
        before, cpu_s = usage.sample(load.pid), time.process_time()
        start = time.monotonic()

        async def arrive(scheduled: float) -> None:
            connection = await free.get()
            await self._send(connection, scheduled)
            free.put_nowait(connection)

        async with asyncio.TaskGroup() as group:
            for at_s in arrivals(load.rate_per_s, load.seconds, load.seed):
                await asyncio.sleep(max(0.0, start + at_s - time.monotonic()))
                group.create_task(arrive(start + at_s))
        after, cpu_s = usage.sample(load.pid), time.process_time() - cpu_s
        return self._measurement(before, after, cpu_s, start, time.monotonic())

    async def _send(self, connection: Connection, since: float) -> None:
        number = next(self._numbers)
        path = self._load.paths[number % len(self._load.paths)]
        form = self._forms[number % len(self._forms)]
        request = request_bytes(self._load.port, path, *form)
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                status = (await connection.exchange(request)).status
        except (OSError, EOFError, TimeoutError):
            status = 0
            connection.close()
            await asyncio.sleep(0.05)
        self._answers.append((since, time.monotonic(), status == 200))

    def _measurement(
        self, before: usage.Usage, after: usage.Usage, cpu_s: float, start: float, end: float
    ) -> Measurement:
        inside = [one for one in self._answers if start <= one[1] <= end]
        latencies_ms = [(at - since) * 1000 for since, at, good in inside if good]
        elapsed = end - start
        return Measurement(
            throughput=len(latencies_ms) / elapsed,
            answers=len(latencies_ms),
            failures=len(inside) - len(latencies_ms),
            latencies_ms=latencies_ms,
            cpu_ms=1000 * (after.cpu_s - before.cpu_s) / max(1, len(latencies_ms)),
            client_cpu=cpu_s / elapsed,
            rss_mib=after.rss_mib,
            started_s=start,
            ended_s=end,
        )


def main() -> None:
    """Run the `Load` read from stdin."""
    given = json.load(sys.stdin)
    load = Load(**{**given, "photos": tuple(given["photos"]), "paths": tuple(given["paths"])})
    run = _Run(load)
    if load.begin_at_s is not None:
        time.sleep(max(0.0, load.begin_at_s - time.monotonic()))
    measured = asyncio.run(run.closed() if load.rate_per_s is None else run.open())
    json.dump(asdict(measured), sys.stdout)


if __name__ == "__main__":
    main()
