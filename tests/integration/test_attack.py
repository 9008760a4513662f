"""Short versions of the attacks, which check everything but the times."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.artefacts import build_artefact, encode, paint
from tests.attack import cases, mixup, overload, rows
from tests.processes import Logged, logged
from tests.reliability.report import Report

pytestmark = pytest.mark.anyio

MEMORY_MB = 1024
TIMES = ("p99", "CPU", "each kill")
"""Targets whose names have one of these depend on the machine, or on how often it kills."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """A server process on the tiny artefact, with little memory and short limits."""
    model = build_artefact(tmp_path_factory.mktemp("attack") / "tiny")
    with logged(model, log_level="info", memory_mb=MEMORY_MB, photo_cpu_s=0.5) as running:
        yield running


def missed(report: Report) -> dict[str, float]:
    """The missed targets and their figures, without those that depend on the machine."""
    return {
        target.name: target.median
        for target in report.targets
        if not target.met and not any(word in target.name for word in TIMES)
    }


async def test_hostile_requests(service: Logged) -> None:
    """Each is answered, none with 500 or 504, and the process survives."""
    found = await cases.attack(service, seed=2, numbers=range(50))
    report = cases.judge(found, 50, service.process.poll() is None, {})
    assert missed(report) == {}
    assert sum(one.status == 200 for one in found) > 3


async def test_known_attacks(service: Logged) -> None:
    """Each gets 4xx or a right answer, in the budget of memory, and probes are answered."""
    _, port = service.address
    attacks = [*rows.cheap(port, "tiny"), *rows.megapixels(port, "tiny", 4, 1_500_000)]
    outcomes = await rows.run(service, attacks, least_s=0.1)
    report = rows.judge(outcomes, len(attacks), service.process.poll() is None, MEMORY_MB)
    assert report.figures["wrong"] == []
    assert missed(report) == {}


async def test_more_work_than_can_be_done(service: Logged) -> None:
    """Photos of all sizes are answered or refused with Retry-After; none is lost."""
    sizes = (((64, 96), 60), ((1000, 700), 30), ((3000, 2000), 10))
    ids = np.arange(24, dtype=np.uint8).reshape(4, 6) % 21
    photos = [
        (encode(np.asarray(Image.fromarray(paint(ids)).resize(size)), "JPEG"), share)
        for size, share in sizes
    ]
    priced = await overload.priced(service, photos)
    observed = await overload.overload(service, priced, capacity_s=0.5, load_s=1.5)
    assert set(missed(overload.judge(observed, True))) <= {"goodput of the capacity"}
    assert any(one.answer.status == 200 for one in observed.load)


async def test_workers_are_killed(service: Logged) -> None:
    """A photo whose worker is killed is tried again, and its mask is its own."""
    tally = await mixup.kills(service, "tiny", seconds=3.0, kill_every_s=0.3, photos=5)
    assert missed(mixup.judge([tally], 1, alive=service.process.poll() is None)) == {}
    assert tally.lost < tally.kills


@pytest.mark.parametrize("processes", [1, 2])
def test_no_answer_is_another_photos(tmp_path: Path, processes: int) -> None:
    """Masks are their photos' own, beside broken photos, clients that leave, and kills."""
    model = build_artefact(tmp_path / "tiny")
    with logged(model, log_level="info", processes=processes) as running:
        if processes > 1:
            for worker in range(processes):
                running.seen("listening", worker=worker)
        tally = asyncio.run(mixup.mixup(running, "tiny", 150, kill_every_s=0.3, photos=12))
        alive = running.process.poll() is None
    assert missed(mixup.judge([tally], 150, alive=alive)) == {}
