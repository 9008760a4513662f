"""Start-up time, and memory at rest and under photos of many sizes."""

from __future__ import annotations

import time
from typing import Final

from tests.benchmarks import photos as photo_files
from tests.benchmarks import sides, usage
from tests.benchmarks.bench import Bench
from tests.benchmarks.servers import running

# Seven paths and a hundred photos have no common factor, so every photo meets every path.
_PATHS: Final = (
    *("/segment",) * 4,
    "/segment?view=overlay",
    "/segment?max_side=320",
    "/segment?classes=person,cat",
)
_EARLY: Final = 200
_ALL: Final = 2000
_AT_MOST_S: Final = 900.0


def starts(bench: Bench) -> None:
    """Measure the seconds from the start of the command until ``/readyz`` answers 200."""
    for turn in range(5):
        with running(sides.ours(bench.artefact, "auto"), bench.photos[0], bench.logs) as server:
            bench.add(part="start", round=turn, side=sides.OURS, start_s=server.start_s)


def memory(bench: Bench) -> None:
    """Measure a server's resident memory: at rest, after 200 and after 2,000 mixed requests."""
    mixed = photo_files.mixed_photos(bench.out / "photos", bench.photos)
    with running(sides.ours(bench.artefact, "auto"), bench.photos[0], bench.logs) as server:
        time.sleep(1.0)
        rss = usage.sample(server.pid).rss_mib
        bench.add(part="memory", side=sides.OURS, requests=0, rss_mib=rss)
        done = 0
        for total in (_EARLY, 300 if bench.quick else _ALL):
            window = server.closed(
                mixed, 4, _AT_MOST_S, warm_up_s=0.0, requests=total - done, paths=_PATHS
            )
            done = total
            bench.add(part="memory", side=sides.OURS, requests=total, **window.summary())
