"""The long runs for overload and endurance, in short: all of what they watch but the times."""

import asyncio
from http import HTTPStatus
from pathlib import Path

from tests.artefacts import encode, two_class_photo
from tests.benchmarks.photos import serving_photos
from tests.benchmarks.wire import request_bytes
from tests.processes import logged
from tests.reliability import soak
from tests.reliability.overload import overload
from tests.reliability.report import Report

PHOTO = encode(two_class_photo())


def missed(report: Report) -> dict[str, float]:
    """The promises that were not kept."""
    return {gate.name: gate.median for gate in report.gates if not gate.kept}


def test_more_than_can_be_answered_is_refused(tiny_artefact: Path) -> None:
    """Each is answered or told when to come back, and everything is as before afterwards."""
    with logged(tiny_artefact, threads=1, queue_size=2, log_level="info") as service:
        _, port = service.address
        request = request_bytes(port, "/segment", "image/png", PHOTO)
        pid = service.process.pid
        seen = asyncio.run(overload(port, pid, [request], rate_per_s=500, seconds=2))
    statuses = {reply.status for reply in seen.load}
    assert statuses == {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}
    assert all(
        (reply.told_s or 0) >= 1
        for reply in seen.load
        if reply.status == HTTPStatus.SERVICE_UNAVAILABLE
    )
    for replies in seen.probes.values():
        assert {reply.status for reply in replies} == {HTTPStatus.OK}
    assert seen.first.status == HTTPStatus.OK


def test_nothing_piles_up(tiny_artefact: Path, tmp_path: Path) -> None:
    """Photos of all kinds, errors, and clients that go: what is held stays the same."""
    photos = [path.read_bytes() for path in serving_photos(tmp_path, None, 6)]
    with logged(tiny_artefact, log_level="info") as service:
        rounds = list(soak.soak(service, photos, rounds=4, requests=100))
    # One decoded photo has half a MiB: if one in a hundred requests kept its own, it would show.
    assert missed(soak.judge(rounds, early=2, growth_percent=10)) == {}
