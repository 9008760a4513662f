"""``GET /metrics`` of the app, and of several processes behind one port."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.settings import Settings
from tests.artefacts import encode, two_class_photo
from tests.clients import InProcess, in_process, serving
from tests.fakes import FakeSession
from tests.host_device import HostDevice

PHOTO = encode(two_class_photo())

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """Every sample, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(client: InProcess) -> Samples:
    """What the app tells."""
    response = await client.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return read(response.text)


def value(found: Samples, name: str, **labels: str) -> float:
    """One sample; 0 where there is none yet."""
    return found.get((name, frozenset(labels.items())), 0.0)


@pytest.mark.anyio
async def test_a_photo_in_the_metrics(client: InProcess) -> None:
    """Counted once: as a request, in every stage, in its batch."""
    assert (await client.http.post("/segment", content=PHOTO)).status_code == 200
    found = await scrape(client)
    segment = {"route": "/segment", "method": "POST", "status": "200"}
    assert value(found, "fcn_requests_total", **segment) == 1
    assert value(found, "fcn_request_seconds_count", route="/segment") == 1
    for stage in ("decode", "preprocess", "queue", "infer", "upsample", "encode"):
        assert value(found, "fcn_stage_seconds_count", stage=stage) == 1
    assert value(found, "fcn_photo_pixels_sum") == 64 * 96
    assert value(found, "fcn_photo_bytes_sum") == len(PHOTO)
    assert value(found, "fcn_batch_size_sum") == 1
    assert value(found, "fcn_ready") == 1
    model = {"model": "tiny", "version": "1", "precision": "fp32"}
    assert value(found, "fcn_model_info", **model, provider="CPUExecutionProvider") == 1
    assert value(found, "process_resident_memory_bytes") > 0


@pytest.mark.anyio
async def test_refusals_by_reason(client: InProcess) -> None:
    """Whatever was wrong, by the type that the caller was told."""
    await client.http.post("/segment", content=b"no photo")
    await client.http.post("/segment", content=b"")
    await client.http.post("/segment?max_side=1", content=PHOTO)
    await client.http.get("/nowhere")
    await client.http.get("/nowhere/else")
    found = await scrape(client)
    for reason in ("unsupported-image-type", "no-image", "invalid-parameter"):
        assert value(found, "fcn_refusals_total", reason=reason) == 1
    assert value(found, "fcn_refusals_total", reason="not-found") == 2


@pytest.mark.anyio
async def test_paths_are_no_labels(client: InProcess) -> None:
    """A route with placeholders is one route, and all that are none are one too."""
    for number in range(5):
        await client.http.get(f"/nowhere/{number}")
        await client.http.get(f"/static/{number}")
    routes = {dict(labels).get("route") for name, labels in await scrape(client)}
    assert routes <= {"other", "/static/{path:path}", None}


@pytest.mark.anyio
async def test_what_waits_is_told(make_settings: Callable[..., Settings]) -> None:
    """In flight, waiting for the device, and what was refused because of both."""
    session = FakeSession()
    async with in_process(make_settings(queue_size=3), session) as client:
        session.gate.clear()
        session.started.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(client.http.post("/segment", content=PHOTO))
            found: Samples = {}
            while value(found, "fcn_queue_depth", model="tiny") < 2:
                await asyncio.sleep(0)  # in one process a request need not wait for anything
                found = await scrape(client)
            refused = await client.http.post("/segment", content=PHOTO)
            found = await scrape(client)
            session.gate.set()
        assert refused.status_code == 503
        assert value(found, "fcn_in_flight") == 3
        assert value(found, "fcn_in_flight_limit") == 3
        assert value(found, "fcn_queue_depth", model="tiny") == 2
        assert value(found, "fcn_refusals_total", reason="overloaded") == 1
        found = await scrape(client)
        assert value(found, "fcn_in_flight") == value(found, "fcn_queue_depth", model="tiny") == 0


@pytest.mark.anyio
async def test_draining_is_not_ready(client: InProcess) -> None:
    """Metrics are told to the end."""
    client.service.begin_draining()
    assert value(await scrape(client), "fcn_ready") == 0


@pytest.mark.anyio
async def test_a_gpus_memory(client: InProcess) -> None:
    """In use and in total, of the GPU that the model runs on."""
    engine = client.service.engines.default
    engine.model = dataclasses.replace(engine.model, gpu=HostDevice(1))  # type: ignore[type-var]
    found = await scrape(client)
    assert value(found, "fcn_gpu_memory_used_bytes", gpu="1") == 1 << 28
    assert value(found, "fcn_gpu_memory_total_bytes", gpu="1") == 1 << 30


@pytest.mark.anyio
async def test_openmetrics(client: InProcess) -> None:
    """Who asks for it gets it, as Prometheus does."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    response = await client.http.get("/metrics", headers={"Accept": accept})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_probes_are_not_in_the_log(tiny_artefact: Path) -> None:
    """Unless they fail, or somebody reads at debug level."""
    paths = ("/healthz", "/readyz", "/metrics", "/classes")
    for level, logged in (("info", ["/classes"]), ("debug", [*paths])):
        with serving(tiny_artefact, log_level=level) as server:
            for path in paths:
                assert httpx.get(f"{server.url}{path}").status_code == 200
            server.process.terminate()
            assert server.process.stderr is not None
            lines = [json.loads(line) for line in server.process.stderr]
        assert [line["path"] for line in lines if line["event"] == "request"] == logged


def test_processes_tell_together(tiny_artefact: Path) -> None:
    """Whichever is scraped, the counts are those of all; a killed one's begin anew."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tiny_artefact, processes=2, device="cpu"))
        found: Samples = {}
        while value(found, "fcn_worker_up", worker="1") < 1:
            found = read(httpx.get(f"{server.url}/metrics").text)
        for _ in range(12):
            assert httpx.post(f"{server.url}/segment", content=PHOTO).status_code == 200
        for _ in range(4):
            found = read(httpx.get(f"{server.url}/metrics").text)
            assert sum(value(found, "fcn_photo_pixels_count", worker=str(n)) for n in (0, 1)) == 12
            assert value(found, "fcn_ready", worker="0") == value(found, "fcn_ready", worker="1")
