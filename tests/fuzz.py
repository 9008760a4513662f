"""``make fuzz``: damaged image files, each through the whole app, until there are enough of them.

Every file must be answered with 200 or a 4xx problem within `CPU_S` seconds of CPU time and
`PEAK_BYTES` of memory, and the process must survive. Each process takes files from
`tests.mutations` in rounds; each round has a seed and can be repeated. Hypothesis shrinks a failing
file and saves it; a file that kills the process is saved as it is. ``--replay FILE`` sends one
again.

Exit status: 0, or 1 if a file failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given
from tqdm import tqdm

from service.settings import Settings
from service.telemetry import logs
from tests.artefacts import build_artefact, encode, two_class_photo
from tests.clients import in_process
from tests.mutations import hostile_files

CPU_S: Final = 2.0
"""CPU time limit of any file, in seconds; exceeding it ends the process."""

MAX_PIXELS: Final = 1_000_000
PEAK_BYTES: Final = 64 * MAX_PIXELS + (32 << 20)
"""Memory limit of one file: an allowance per pixel of the cap, plus a constant."""

ROUND: Final = 500
"""Files of one round; few, because Hypothesis stores all of them."""


class Sent(NamedTuple):
    """A file's outcome, and its CPU time in seconds."""

    outcome: str
    cpu_s: float


Send = Callable[[bytes], Sent]
"""Sends a file to the app. Raises `AssertionError` if the answer is wrong."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A file with a wrong answer."""

    data: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Round:
    """Outcomes of one round's files; ``cpu_s`` is the slowest file's time."""

    outcomes: Counter[str]
    cpu_s: float
    failure: Failure | None


@dataclass(slots=True)
class Worker:
    """A fuzzing process; it writes the file that it works on to ``current``."""

    process: SpawnProcess
    connection: Connection
    current: Path
    seed: int = 0


@dataclass(slots=True)
class Totals:
    """Outcomes of all files so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    failures: list[dict[str, object]] = field(default_factory=list)

    def add(self, done: Round) -> None:
        """Count a round."""
        self.outcomes += done.outcomes
        self.cpu_s = max(self.cpu_s, done.cpu_s)

    def keep(self, failure: Failure, seed: int, folder: Path) -> None:
        """Save a failing file."""
        name = hashlib.sha256(failure.data).hexdigest()[:16]
        path = folder / f"{name}.bin"
        path.write_bytes(failure.data)
        self.failures.append({"file": str(path), "reason": failure.reason, "seed": seed})
        tqdm.write(f"FAILED {path}: {failure.reason}", file=sys.stderr)


def fuzz(send: Send, seed: int, cases: int) -> Round:
    """Send ``cases`` damaged files, or fewer if one fails, which is then shrunk."""
    outcomes: Counter[str] = Counter()
    longest_s = 0.0
    failure: Failure | None = None

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(hostile_files())
    def send_each(data: bytes) -> None:
        nonlocal failure, longest_s
        try:
            sent = send(data)
        # Any exception is a failure.
        except Exception as exc:
            failure = Failure(data, f"{type(exc).__name__}: {exc}"[:500])
            raise
        outcomes[sent.outcome] += 1
        longest_s = max(longest_s, sent.cpu_s)

    with contextlib.suppress(Exception):  # `failure` has the file, shrunk by Hypothesis
        send_each()
    return Round(outcomes, longest_s, failure)


@contextlib.contextmanager
def running_app(model: Path) -> Iterator[Send]:
    """The app on an artefact, in this process and without a socket."""
    settings = Settings(
        model=model, device="cpu", threads=1, decode_workers=1, max_pixels=MAX_PIXELS
    )
    with asyncio.Runner() as runner:
        app = in_process(settings)
        client = runner.run(app.__aenter__())

        def send(data: bytes) -> Sent:
            started = time.process_time()
            response = runner.run(client.http.post("/segment", content=data))
            cpu_s = time.process_time() - started
            kind = response.headers["Content-Type"]
            if response.status_code == 200:
                assert kind == "image/png", kind
                return Sent("200", cpu_s)
            assert 400 <= response.status_code < 500, response.text
            assert kind == "application/problem+json", kind
            return Sent(f"{response.status_code} {response.json()['type']}", cpu_s)

        try:
            yield send
        finally:
            runner.run(app.__aexit__(None, None, None))


def bounded(send: Send, current: Path) -> Send:
    """``send`` under the limits, with each file written to ``current`` before it is sent."""
    send(encode(two_class_photo()))  # loads everything before the first measurement

    def send_bounded(data: bytes) -> Sent:
        current.write_bytes(data)
        before = _memory_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        # The signal's default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            sent = send(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        taken = _memory_bytes("VmHWM") - before
        assert taken <= PEAK_BYTES, f"{taken} bytes of memory"
        return sent

    return send_bounded


def _memory_bytes(name: str) -> int:
    """This process's memory: ``VmRSS`` now, or ``VmHWM`` at its peak."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def _work(connection: Connection, model: Path, current: Path) -> None:
    """Run a worker's process: fuzz each seed that it receives, until the pipe closes."""
    logs.configure("error", "json")
    with running_app(model) as send, contextlib.suppress(EOFError):
        limited = bounded(send, current)
        while True:
            seed, cases = connection.recv()
            connection.send(fuzz(limited, seed, cases))


def _start(model: Path, folder: Path, number: int) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    current = folder / f"current-{number}"
    process = context.Process(target=_work, args=(theirs, model, current), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours, current)


def _collect(worker: Worker) -> Round | Failure:
    """Receive a worker's round, or the file that killed it."""
    try:
        done: Round = worker.connection.recv()
    except EOFError:
        worker.process.join()
        status = worker.process.exitcode or 0
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        if status == -signal.SIGPROF:
            reason += f": more than {CPU_S} s of CPU time"
        return Failure(worker.current.read_bytes(), f"the process ended with {reason}")
    return done


def run(given: argparse.Namespace, folder: Path) -> Totals:
    """Fuzz in several processes until all files are sent or the time is up."""
    totals = Totals()
    model = build_artefact(folder / "tiny")
    until = time.monotonic() + given.minutes * 60
    seeds = iter(range(given.seed, given.seed + -(-given.cases // ROUND)))
    workers = [_start(model, folder, number) for number in range(given.processes)]
    busy: set[int] = set()

    def give_work(number: int) -> None:
        seed = next(seeds, None) if time.monotonic() < until else None
        if seed is not None:
            workers[number].seed = seed
            workers[number].connection.send((seed, min(ROUND, given.cases)))
            busy.add(number)

    for number in range(given.processes):
        give_work(number)
    with tqdm(total=given.cases, unit="file", smoothing=0) as bar:
        while busy:
            ready = wait([workers[number].connection for number in busy])
            for number in [number for number in busy if workers[number].connection in ready]:
                worker, done = workers[number], _collect(workers[number])
                busy.remove(number)
                failure = done if isinstance(done, Failure) else done.failure
                if isinstance(done, Round):
                    totals.add(done)
                    bar.update(done.outcomes.total())
                else:
                    workers[number] = _start(model, folder, number)
                if failure is not None:
                    totals.keep(failure, worker.seed, given.out)
                give_work(number)
    return totals


def replay(path: Path, folder: Path) -> int:
    """Send one file again and print its outcome."""
    with running_app(build_artefact(folder / "tiny")) as send:
        print(bounded(send, folder / "current")(path.read_bytes()).outcome)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (%(default)s)")
    parser.add_argument("--minutes", type=float, default=14, help="at most (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="folder (%(default)s)")
    parser.add_argument("--replay", type=Path, help="send this file again, and nothing else")
    return parser


def main() -> int:
    """Run the command line."""
    given = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.replay:
            return replay(given.replay, folder)
        given.out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        totals = run(given, folder)
    report: dict[str, Any] = {
        "cases": totals.outcomes.total(),
        "seconds": round(time.monotonic() - started, 1),
        "seed": given.seed,
        "outcomes": dict(totals.outcomes.most_common()),
        "longest_cpu_s": round(totals.cpu_s, 3),
        "failures": totals.failures,
    }
    (given.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 1 if totals.failures else 0


if __name__ == "__main__":
    sys.exit(main())
