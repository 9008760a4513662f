"""The service on a simulated GPU: the real app, network and kernel.

Compared with the CPU's path and the same network, the masks are equal except for near ties. The
photos are scikit-image's, as in ``test_default_model``.
"""

import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from anyio import create_task_group
from skimage import data

from service.errors import DeviceMemoryExhausted
from service.inference import providers, session
from service.inference.engine import LANES
from service.settings import DEFAULT_MODEL, Settings
from tests.artefacts import build_artefact, encode
from tests.clients import InProcess, in_process, mask_of
from tests.host_device import HostChannel, HostDevice

pytestmark = pytest.mark.anyio

Open = Callable[[Settings], AbstractAsyncContextManager[InProcess]]

CHELSEA: npt.NDArray[np.uint8] = data.chelsea()  # type: ignore[no-untyped-call]
ASTRONAUT: npt.NDArray[np.uint8] = data.astronaut()  # type: ignore[no-untyped-call]
PHOTOS = {
    "landscape": encode(CHELSEA, "JPEG", quality=90),
    "portrait": encode(CHELSEA.swapaxes(0, 1), "PNG"),
    "square": encode(ASTRONAUT, "JPEG", quality=90),
    "large": encode(ASTRONAUT.repeat(4, axis=0).repeat(4, axis=1), "JPEG", quality=90),
    "thin": encode(CHELSEA[:3], "PNG"),
}


@pytest.fixture
def on_host_device(monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the app in this process on a `HostDevice`."""
    real = session._open
    monkeypatch.setattr(session, "CudaDevice", HostDevice)
    monkeypatch.setattr(
        session,
        "_open_on_gpu",
        lambda network, *_: real(network, session._session_options(2), [providers.CPU]),
    )

    @asynccontextmanager
    async def opened(settings: Settings) -> AsyncIterator[InProcess]:
        async with in_process(settings.model_copy(update={"device": "cuda"})) as running:
            yield running

    return opened


async def post(running: InProcess, photo: bytes, **options: str) -> httpx.Response:
    """One photo; ``accept`` is a header, the rest are parameters."""
    headers = {"Accept": options.pop("accept", "*/*"), "Content-Type": "image/*"}
    return await running.http.post("/segment", content=photo, params=options, headers=headers)


def channels(running: InProcess) -> list[HostChannel]:
    """Return the default model's channels."""
    device: Any = running.service.engines.default.model.gpu
    found: list[HostChannel] = device.channels
    return found


async def test_the_gpus_path_answers_what_the_cpus_answers(on_host_device: Open) -> None:
    """Many sizes, at once and in batches: masks, and the confidences in the JSON."""
    # int8 on every CPU: it is fast enough everywhere, and this test is about the path only.
    settings = Settings(
        model=DEFAULT_MODEL, device="cpu", precision="int8", max_batch=2, cuda_graphs=False
    )
    wanted, described = {}, {}
    async with in_process(settings) as running:
        for name, photo in PHOTOS.items():
            wanted[name] = mask_of(await post(running, photo))
            described[name] = (await post(running, photo, accept="application/json")).json()
    found: dict[str, npt.NDArray[np.uint8]] = {}
    async with on_host_device(settings) as running:

        async def ask(name: str) -> None:
            response = await post(running, PHOTOS[name])
            assert response.status_code == 200
            found[name] = mask_of(response)

        async with create_task_group() as group:
            for name in PHOTOS:
                group.start_soon(ask, name)
        for name, photo in PHOTOS.items():
            assert (found[name] == wanted[name]).mean() >= 0.9999
            answer = (await post(running, photo, accept="application/json")).json()
            assert [one["name"] for one in answer["classes"]] == [
                one["name"] for one in described[name]["classes"]
            ]
            for ours, theirs in zip(answer["classes"], described[name]["classes"], strict=True):
                assert ours["confidence"] == pytest.approx(theirs["confidence"], abs=1 / 255)


async def test_stage_times_are_the_devices_own(
    on_host_device: Open, make_settings: Callable[..., Settings]
) -> None:
    """`infer` is the network alone, by the device's clock."""
    async with on_host_device(make_settings()) as running:
        response = await post(running, PHOTOS["landscape"])
    stages = dict(
        part.strip().split(";dur=") for part in response.headers["Server-Timing"].split(",")
    )
    assert list(stages) == ["decode", "preprocess", "queue", "infer", "upsample", "encode"]
    assert (float(stages["infer"]), float(stages["upsample"])) == (1.0, 2.0)
    assert float(stages["queue"]) >= 0


async def test_a_reload_goes_through_the_lanes_too(
    on_host_device: Open, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """The new model is warm on its own lanes; the old one's buffers are freed."""
    folder = build_artefact(tmp_path / "tiny")
    async with on_host_device(make_settings(model=folder)) as running:
        engines = running.service.engines
        first = await post(running, PHOTOS["landscape"])
        old = [weakref.ref(channel) for channel in channels(running)]
        build_artefact(folder, version="2")
        await engines.reload()
        second = await post(running, PHOTOS["landscape"])
        assert (first.status_code, second.status_code) == (200, 200)
        assert (first.headers["X-Model"], second.headers["X-Model"]) == ("tiny/1", "tiny/2")
        assert np.array_equal(mask_of(first), mask_of(second))
        new = channels(running)
        assert len(new) == len(old) == LANES
        assert all(channel.commands for channel in new)
        gc.collect()
        assert [channel() for channel in old] == [None] * LANES


async def test_short_memory_is_503_and_the_next_request_works(
    on_host_device: Open, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 with a time to retry; the process survives."""
    async with on_host_device(make_settings()) as running:
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise DeviceMemoryExhausted("Failed to allocate memory")

            patch.setattr(HostChannel, "upload", fail)
            response = await post(running, PHOTOS["landscape"])
            assert response.status_code == 503
            assert response.json()["type"] == "/problems/overloaded"
            assert int(response.headers["Retry-After"]) >= 1
        assert (await post(running, PHOTOS["landscape"])).status_code == 200
