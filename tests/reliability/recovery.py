"""``kill -9`` of a serving process under load: time until it is ready again, and lost requests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Final

from service.settings import DEFAULT_MODEL
from tests.benchmarks.bench import Target
from tests.benchmarks.photos import serving_photos
from tests.processes import load, logged
from tests.reliability.report import Report

_ROUNDS: Final = 3
_CLIENTS: Final = 6


def measure(out: Path) -> Report:
    """Kill the first of two processes several times, each time once it is ready."""
    photo = serving_photos(out / "photos", None, 1)[0].read_bytes()
    ready_s = []
    with logged(DEFAULT_MODEL, processes=2, log_level="info") as service:
        for worker in (0, 1):
            service.seen("listening", worker=worker)
        with load(service.url, _CLIENTS, photo) as outcomes:
            for life in range(1, _ROUNDS + 1):
                service.seen("request", count=len(outcomes) + _CLIENTS)
                pid = service.seen("worker started", count=life, worker=0)["pid"]
                killed = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                service.seen("listening", count=life + 1, worker=0)
                ready_s.append(time.monotonic() - killed)
        refused = [outcome for outcome in outcomes if outcome.status not in (None, 200)]
        lost = [outcome.error for outcome in outcomes if outcome.status is None]
    targets = [
        Target("longest time to ready after kill -9", (max(ready_s),), "s", at_most=10),
        Target("requests in flight lost", (len(lost),), "", at_most=_ROUNDS * _CLIENTS),
        Target("requests answered with an error", (len(refused),), "", at_most=0),
    ]
    return Report(targets, {"ready_s": ready_s, "lost": lost, "requests": len(outcomes)})
