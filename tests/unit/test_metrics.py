"""Metrics: counting, encoding, and merging those of several processes."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from service.server.peers import WorkerPeers
from service.telemetry.metrics import (
    STAGES,
    EngineFacts,
    Families,
    Metrics,
    encode,
    merge,
)

TIMING_MS = dict(zip(STAGES, (7.0, 2.0, 0.5, 40.0, 60.0, 3.0, 1.0), strict=True))

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(families: Families, accept: str = "") -> Samples:
    """Every sample in the encoded text, by name and labels."""
    text, _ = encode(families, accept)
    parse = openmetrics_families if "openmetrics" in accept else text_string_to_metric_families
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text.decode())
        for sample in family.samples
    }


def sample(found: Samples, name: str, **labels: str) -> float:
    """One of them."""
    return found[name, frozenset(labels.items())]


def test_requests_are_counted_by_route() -> None:
    """By status and route, with their time and the type of a problem."""
    metrics = Metrics()
    for _ in range(2):
        metrics.request("/segment", "POST", 200, 0.2, None)
    metrics.request("/segment", "POST", 503, 0.001, "overloaded")
    found = samples(metrics.families())
    segment = {"route": "/segment", "method": "POST"}
    assert sample(found, "fcn_requests_total", **segment, status="200") == 2
    assert sample(found, "fcn_requests_total", **segment, status="503") == 1
    assert sample(found, "fcn_refusals_total", reason="overloaded") == 1
    assert sample(found, "fcn_request_seconds_bucket", route="/segment", le="0.25") == 3
    assert sample(found, "fcn_request_seconds_bucket", route="/segment", le="0.1") == 1


def test_strangers_make_no_new_series() -> None:
    """Unknown methods share one label value."""
    metrics = Metrics()
    for number in range(50):
        metrics.request("other", f"BREW{number}", 405, 0.001, "other")
    found = samples(metrics.families())
    requests = [labels for name, labels in found if name == "fcn_requests_total"]
    assert [dict(labels)["method"] for labels in requests] == ["other"]


def test_a_photo_is_counted_with_its_stages() -> None:
    """Each stage in seconds, as Prometheus recommends; pixels and bytes."""
    metrics = Metrics()
    metrics.photo(187_500, 30_000, TIMING_MS)
    metrics.batch(3)
    found = samples(metrics.families())
    for stage, value in TIMING_MS.items():
        assert sample(found, "fcn_stage_seconds_sum", stage=stage) == value / 1000
    assert sample(found, "fcn_photo_pixels_sum") == 187_500
    assert sample(found, "fcn_photo_bytes_sum") == 30_000
    assert sample(found, "fcn_batch_size_bucket", le="2.0") == 0
    assert sample(found, "fcn_batch_size_bucket", le="3.0") == 1


def test_a_model_that_is_closed_is_told_no_more() -> None:
    """Engine gauges show the last recorded state only."""
    metrics = Metrics()
    small = EngineFacts("small", "1", "int8", "CPUExecutionProvider", 2)
    large = EngineFacts("large", "2", "fp16", "CUDAExecutionProvider", 5, 1, (30, 100))
    metrics.look_at_engines([small, large])
    found = samples(metrics.families())
    assert sample(found, "fcn_queue_depth", model="small") == 2
    assert sample(found, "fcn_gpu_memory_used_bytes", gpu="1") == 30
    assert sample(found, "fcn_gpu_memory_total_bytes", gpu="1") == 100
    metrics.look_at_engines([small])
    names = {name for name, labels in samples(metrics.families()) if ("model", "large") in labels}
    assert not names


def test_every_app_has_its_own() -> None:
    """Two apps in one process do not count each other's requests."""
    first, second = Metrics(), Metrics()
    first.request("/segment", "POST", 200, 0.1, None)
    assert not [name for name, _ in samples(second.families()) if name == "fcn_requests_total"]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_both_formats_say_the_same(accept: str) -> None:
    """Prometheus's text format, and OpenMetrics on request."""
    metrics = Metrics()
    metrics.photo(100, None, TIMING_MS)
    families = merge("worker", {"0": metrics.families(), "1": None})
    found = samples(families, accept)
    assert sample(found, "fcn_worker_up", worker="0") == 1
    assert sample(found, "fcn_worker_up", worker="1") == 0
    assert sample(found, "fcn_photo_pixels_count", worker="0") == 1
    assert not [name for name, _ in found if name.endswith("_created")]


def test_merged_families_appear_once() -> None:
    """Each family has the samples of all processes, with the label."""
    families = []
    for count in (1, 2):
        metrics = Metrics()
        for _ in range(count):
            metrics.request("/segment", "POST", 200, 0.1, None)
        families.append(metrics.families())
    merged = merge("worker", {"0": families[0], "1": families[1]})
    names = [family.name for family in merged]
    assert len(names) == len(set(names))
    found = samples(merged)
    labels = {"route": "/segment", "method": "POST", "status": "200"}
    assert sample(found, "fcn_requests_total", **labels, worker="0") == 1
    assert sample(found, "fcn_requests_total", **labels, worker="1") == 2
    assert sample(found, "process_open_fds", worker="1") > 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's name has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


async def counted(number: int) -> Families:
    """The families of a process that has counted ``number`` photos."""
    metrics = Metrics()
    for _ in range(number):
        metrics.photo(100, None, TIMING_MS)
    return metrics.families()


@pytest.fixture
async def two_peers(folder: Path) -> AsyncIterator[AsyncExitStack]:
    """Workers 0 and 1 answer until the stack is closed."""
    async with AsyncExitStack() as stack:
        for number in (0, 1):
            peers = WorkerPeers(folder, number)
            await stack.enter_async_context(peers.answering(partial(counted, number)))
        yield stack


@pytest.mark.anyio
async def test_peers_are_asked(folder: Path, two_peers: AsyncExitStack) -> None:
    """Each worker gathers the exact values of all workers."""
    for number in (0, 1):
        gathered = await WorkerPeers(folder, number).gather()
        assert list(gathered) == ["0", "1"]
        found = samples(merge("worker", gathered))
        assert sample(found, "fcn_photo_pixels_count", worker="0") == 0
        assert sample(found, "fcn_photo_pixels_count", worker="1") == 1
        assert sample(found, "fcn_photo_pixels_bucket", worker="1", le="+Inf") == 1


@pytest.mark.anyio
async def test_a_dead_peer_is_reported(folder: Path, two_peers: AsyncExitStack) -> None:
    """A socket without a listener gives None; a restarted worker replaces it."""
    await two_peers.aclose()
    async with WorkerPeers(folder, 1).answering(partial(counted, 3)):
        gathered = await WorkerPeers(folder, 1).gather()
        assert sample(samples(merge("worker", gathered)), "fcn_worker_up", worker="1") == 1
    (folder / "1.sock").touch()
    assert set((await WorkerPeers(folder, 1).gather()).values()) == {None}


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_peer_that_hangs_is_not_waited_for(folder: Path, two_peers: AsyncExitStack) -> None:
    """The other workers' metrics are returned.

    The timeout is the service's own: a shorter one would expire for the other workers too when the
    machine stalls for a moment.
    """

    async def never() -> Families:
        await asyncio.Event().wait()
        raise AssertionError

    async with WorkerPeers(folder, 2).answering(never):
        gathered = await WorkerPeers(folder, 0).gather()
    assert [name for name, families in gathered.items() if families is None] == ["2"]
