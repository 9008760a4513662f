"""Reloading artefacts without losing a request; refused artefacts change nothing."""

import asyncio
import gc
import signal
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import structlog
from httpx import Response

from service.artefact.manifest import MANIFEST_NAME
from service.inference.engine import Engine
from service.settings import Settings
from tests.artefacts import build_artefact, encode, make_contract, two_class_photo
from tests.clients import InProcess, in_process
from tests.faults import build_artefact_in_two_files, build_heavy_artefact
from tests.processes import PATIENCE_S, load, logged
from tests.reliability.resources import sample

PHOTO = encode(two_class_photo())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two artefacts of version 1."""
    for name in ("first", "second"):
        build_artefact(tmp_path / name, name=name)
    return tmp_path


@pytest.fixture
async def client(folder: Path, make_settings: Callable[..., Settings]) -> AsyncIterator[InProcess]:
    """The app on `first`."""
    async with in_process(make_settings(model=folder / "first")) as running:
        yield running


async def post(client: InProcess, model: str | None = None) -> Response:
    """Send the photo."""
    return await client.http.post(
        "/segment", content=PHOTO, params={} if model is None else {"model": model}
    )


async def versions(client: InProcess) -> dict[str, str]:
    """The versions in ``GET /models`` by name, in order."""
    models = (await client.http.get("/models")).json()["models"]
    return {one["name"]: one["version"] for one in models}


async def reloads(client: InProcess) -> dict[str, float]:
    """The number of reloads by outcome."""
    lines = (await client.http.get("/metrics")).text.splitlines()
    counts = (line.split('"') for line in lines if line.startswith("fcn_reloads_total"))
    return {outcome: float(rest.split()[-1]) for _, outcome, rest in counts}


async def post_until(client: InProcess, model: str) -> list[Response]:
    """Send the photo until this model answers; returns all responses."""
    answers = [await post(client)]
    while answers[-1].headers["X-Model"] != model:
        answers.append(await post(client))
    return answers


@pytest.mark.anyio
async def test_a_new_version_is_taken_up_under_load(client: InProcess, folder: Path) -> None:
    """No request is lost; every endpoint reports the new version."""
    build_artefact(folder / "first", name="first", version="2")
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        asking = [group.create_task(post_until(client, "first/2")) for _ in range(4)]
        assert (await post(client)).headers["X-Model"] == "first/1"
        await client.service.engines.reload()
    answers = [answer for one in asking for answer in one.result()]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert (await client.http.get("/model")).json()["version"] == "2"
    assert await versions(client) == {"first": "2", "second": "1"}
    metrics = (await client.http.get("/metrics")).text
    assert 'fcn_model_info{model="first",precision="fp32",provider="CPUExec' in metrics
    assert 'version="2"' in metrics
    assert 'version="1"' not in metrics
    assert await reloads(client) == {"refused": 0, "taken": 1}


@pytest.mark.anyio
async def test_who_holds_the_old_one_is_answered_by_it(client: InProcess, folder: Path) -> None:
    """When its last user is done, it is closed and its memory is freed."""
    engines = client.service.engines
    build_artefact(folder / "first", name="first", version="2")
    async with engines.use() as old:
        reloading = asyncio.create_task(engines.reload())
        async with asyncio.timeout(30):
            await post_until(client, "first/2")
        with old.held():
            pass  # another user's release changes nothing
        await asyncio.sleep(0)
        assert not reloading.done()
        assert engines.running_s == 0
        freed = weakref.ref(old), weakref.ref(old.model.session)  # type: ignore[attr-defined]
        del old
    await reloading
    gc.collect()
    assert [one() for one in freed] == [None, None]


def test_reloads_keep_no_memory(tmp_path: Path) -> None:
    """After thirty reloads, the process has grown by less than two models."""
    weights_mib = 8
    folder = build_heavy_artefact(tmp_path / "tiny", weights_mib * 2**20)
    with logged(folder, log_level="info") as service:
        service.seen("listening")
        pid = service.process.pid

        def reload(first: int, last: int) -> None:
            for number in range(first, last + 1):
                service.process.send_signal(signal.SIGHUP)
                service.seen("model replaced", count=number)

        reload(1, 5)
        before = sample(pid)
        reload(6, 35)
        deadline = time.monotonic() + PATIENCE_S
        # A model is logged before its predecessor is closed.
        while (after := sample(pid)).rss_mib - before.rss_mib >= 2 * weights_mib:
            assert time.monotonic() < deadline, (before, after)
        assert after.descriptors == before.descriptors


def truncate(folder: Path) -> None:
    """Truncate the network, as an interrupted copy does."""
    path = folder / "network.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def mismatch(folder: Path) -> None:
    """Store a graph that differs from the manifest."""
    build_artefact(folder, metadata=make_contract(name="first", version="3").to_metadata())


def change_stride(folder: Path) -> None:
    """Store an error that only the warm-up detects."""
    build_artefact(folder, name="first", stride=8)


def remove(folder: Path) -> None:
    """Delete the manifest."""
    (folder / MANIFEST_NAME).unlink()


def take_a_name(folder: Path) -> None:
    """Use the name of another loaded model."""
    build_artefact(folder, name="second")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "network.onnx: sha256 is"),
        (mismatch, "name is 'tiny' in manifest.json, but 'first'"),
        (change_stride, "stride 16 makes logits"),
        (remove, "manifest.json: No such file"),
        (take_a_name, "its name is second now, which another has"),
    ],
)
@pytest.mark.anyio
async def test_what_cannot_be_served_is_refused(
    client: InProcess, folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    """It is logged and counted; the old model stays, and a repaired one is loaded."""
    assert (await post(client, "second")).status_code == 200
    spoil(folder / "first")
    with structlog.testing.capture_logs() as lines:
        await client.service.engines.reload()
    (line,) = [line for line in lines if line["event"] == "reload refused"]
    assert (line["model"], line["exc_info"]) == ("first", False)
    assert reason in line["reason"]
    assert (await post(client)).headers["X-Model"] == "first/1"
    assert await reloads(client) == {"refused": 1, "taken": 1}
    assert await versions(client) == {"first": "1", "second": "1"}
    build_artefact(folder / "first", name="first", version="2")
    await client.service.engines.reload()
    assert (await post(client)).headers["X-Model"] == "first/2"


@pytest.mark.anyio
async def test_what_would_run_elsewhere_is_refused(
    client: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU without memory for two models must not make the service fall back to the CPU."""
    engines = client.service.engines
    load = engines.load

    async def fall_back(folder: Path) -> Engine:
        engine = await load(folder)
        engine.model = replace(engine.model, provider="OtherProvider")  # type: ignore[type-var]
        return engine

    monkeypatch.setattr(engines, "load", fall_back)
    await engines.reload()
    assert await reloads(client) == {"refused": 1, "taken": 0}
    assert (await client.http.get("/model")).json()["provider"] == "CPUExecutionProvider"


@pytest.mark.anyio
async def test_what_nobody_foresaw_is_refused_too(
    client: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error is logged with its traceback."""

    async def fail(_: Path) -> Engine:
        raise RuntimeError("driver")

    monkeypatch.setattr(client.service.engines, "load", fail)
    with structlog.testing.capture_logs() as lines:
        await client.service.engines.reload()
    assert [(line["reason"], line["exc_info"]) for line in lines] == [("driver", True)]
    assert (await post(client)).status_code == 200


@pytest.mark.anyio
async def test_the_models_beside_it_reload_too(client: InProcess, folder: Path) -> None:
    """Loaded models reload; others appear and disappear with their folders."""
    assert (await post(client, "second")).headers["X-Model"] == "second/1"
    build_artefact(folder / "second", name="renamed", version="2")
    build_artefact(folder / "third", name="third")
    await client.service.engines.reload()
    # No folder has a model `second` any more, so the loaded one stays.
    assert await versions(client) == {"first": "1", "renamed": "2", "third": "1", "second": "1"}
    assert (await post(client, "second")).headers["X-Model"] == "second/1"
    assert (await post(client, "third")).status_code == 200
    build_artefact(folder / "second", name="second", version="3")
    await client.service.engines.reload()
    assert await versions(client) == {"first": "1", "second": "3", "third": "1"}
    assert (await post(client, "second")).headers["X-Model"] == "second/3"
    assert (await post(client, "renamed")).status_code == 404


@pytest.mark.anyio
async def test_another_model_takes_the_place_of_the_default(
    client: InProcess, folder: Path
) -> None:
    """The default then has the new name."""
    build_artefact(folder / "first", name="other", version="7")
    await client.service.engines.reload()
    assert await versions(client) == {"other": "7", "second": "1"}
    assert (await post(client)).headers["X-Model"] == "other/7"
    assert (await post(client, "first")).status_code == 404


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hangup_reloads_under_load(tmp_path: Path, processes: int) -> None:
    """The main process gets the signal; no process loses a request."""
    folder = build_artefact(tmp_path / "tiny")
    with logged(folder, processes=processes) as service:
        workers = [{}] if processes == 1 else [{"worker": worker} for worker in range(processes)]
        for worker in workers:
            service.seen("listening", **worker)
        with load(service.url, 4, PHOTO) as outcomes:
            service.seen("request", path="/segment", count=4)
            build_artefact(folder, version="2")
            service.process.send_signal(signal.SIGHUP)
            for worker in workers:
                service.seen("model replaced", version="2", **worker)
            # By then each client has begun another request.
            service.seen("request", path="/segment", count=len(outcomes) + 8)
        assert {outcome.status for outcome in outcomes} == {200}
        assert {outcome.headers["X-Model"] for outcome in outcomes} == {"tiny/1", "tiny/2"}
        assert outcomes[-1].headers["X-Model"] == "tiny/2"
        service.process.terminate()
        assert service.wait() == 0


@pytest.mark.parametrize(("processes", "loading"), [(1, "model ready"), (2, "worker started")])
def test_a_hangup_while_the_model_loads_is_kept(
    tiny_artefact: Path, processes: int, loading: str
) -> None:
    """The reload runs as soon as the model is ready."""
    with logged(tiny_artefact, processes=processes) as service:
        service.seen(loading, count=processes)
        service.process.send_signal(signal.SIGHUP)
        service.seen("model replaced", count=processes)


def test_files_that_change_under_a_server_change_nothing(tmp_path: Path) -> None:
    """Truncated files would crash a process that maps them; here they are refused."""
    folder = build_artefact_in_two_files(tmp_path / "tiny")
    with logged(folder, precision="int8", threads=1) as service:

        def post_photo() -> bytes:
            answer = httpx.post(f"{service.url}/segment", content=PHOTO, timeout=PATIENCE_S)
            assert answer.status_code == 200
            return answer.content

        mask = post_photo()
        for path in folder.iterdir():
            path.open("wb").close()
        assert post_photo() == mask
        service.process.send_signal(signal.SIGHUP)
        assert MANIFEST_NAME in service.seen("reload refused")["reason"]
        assert post_photo() == mask
        build_artefact_in_two_files(folder)
        service.process.send_signal(signal.SIGHUP)
        service.seen("model replaced")
        assert post_photo() == mask
