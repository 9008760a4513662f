"""Short versions of the overload and soak runs, which check everything but the times."""

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
    """The missed targets and their figures."""
    return {target.name: target.median for target in report.targets if not target.met}


def test_more_than_can_be_answered_is_refused(tiny_artefact: Path) -> None:
    """Each request is answered or refused with Retry-After, and the service works afterwards."""
    with logged(tiny_artefact, threads=1, queue_size=2, log_level="info") as service:
        _, port = service.address
        request = request_bytes(port, "/segment", "image/png", PHOTO)
        pid = service.process.pid
        seen = asyncio.run(overload(port, pid, [request], rate_per_s=500, seconds=2))
    statuses = {reply.status for reply in seen.load}
    assert statuses == {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}
    assert all(
        (reply.retry_after_s or 0) >= 1
        for reply in seen.load
        if reply.status == HTTPStatus.SERVICE_UNAVAILABLE
    )
    for replies in seen.probes.values():
        assert {reply.status for reply in replies} == {HTTPStatus.OK}
    assert seen.first.status == HTTPStatus.OK


def test_resources_do_not_grow(tiny_artefact: Path, tmp_path: Path) -> None:
    """Photos of all kinds, invalid requests and disconnects leave memory and handles constant."""
    photos = [path.read_bytes() for path in serving_photos(tmp_path, None, 6)]
    with logged(tiny_artefact, log_level="info") as service:
        rounds = list(soak.soak(service, photos, rounds=4, requests=100))
    # A decoded photo has half a MiB: a leak of one in a hundred requests exceeds the limit.
    assert missed(soak.judge(rounds, early=2, growth_percent=10)) == {}
