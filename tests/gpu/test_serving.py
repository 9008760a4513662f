"""``fcn-segment serve`` on the GPU as a separate process, over real sockets."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from service.inference.lanes import DeviceTask
from service.inference.upsampling import Labels
from service.settings import DEFAULT_MODEL
from tests.artefacts import encode
from tests.clients import Server, mask_of, serving
from tests.gpu.conftest import Photo, differing

CLIENTS = 24
REQUESTS = 120

HALF = 0.01
"""fp16 against the CPU's fp32, for a lossless photo: see `test_parity`."""

BATCHED = 0.002
"""In a batch against a single photo: see `test_determinism`."""


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with default settings except the number of processes."""
    with serving(DEFAULT_MODEL, device="cuda", processes=request.param) as running:
        yield running


def test_a_photo_over_the_wire(
    server: Server,
    photos: list[Photo],
    prepare: Callable[..., DeviceTask],
    on_cpu: Callable[[DeviceTask], Labels],
) -> None:
    """The answer has the CPU's mask and the time of each stage, from any process."""
    for photo in photos:
        response = httpx.post(f"{server.url}/segment", content=encode(photo), timeout=60)
        assert response.status_code == 200
        assert differing(mask_of(response), on_cpu(prepare(photo)).mask) <= HALF
        stages = dict(
            stage.strip().split(";dur=") for stage in response.headers["Server-Timing"].split(",")
        )
        assert float(stages["infer"]) > 0
        assert all(float(ms) >= 0 for ms in stages.values())


def test_the_gpu_serves(server: Server) -> None:
    """``/model`` reports the CUDA provider."""
    assert httpx.get(f"{server.url}/model").json()["provider"] == "CUDAExecutionProvider"


def test_many_clients_get_their_own_masks(server: Server, photos: list[Photo]) -> None:
    """Photos batched with concurrent ones get the masks of single photos, except near ties."""
    # Each photo as it is and rotated: three listed shapes and eight sizes.
    sent = [encode(one, "JPEG", quality=95) for one in (*photos, *map(rotated, photos))]
    with httpx.Client(timeout=60) as http:
        alone = [mask_of(http.post(f"{server.url}/segment", content=photo)) for photo in sent]

        def ask(number: int) -> float:
            response = http.post(f"{server.url}/segment", content=sent[number % len(sent)])
            assert response.status_code == 200
            return differing(mask_of(response), alone[number % len(sent)])

        with ThreadPoolExecutor(CLIENTS) as pool:
            assert max(pool.map(ask, range(REQUESTS))) <= BATCHED


def rotated(photo: Photo) -> Photo:
    """The photo with its axes swapped."""
    return np.ascontiguousarray(photo.swapaxes(0, 1))


def test_json_has_confidences(server: Server, photos: list[Photo]) -> None:
    """The GPU path computes confidences too."""
    answer = httpx.post(
        f"{server.url}/segment",
        content=encode(photos[0]),
        headers={"Accept": "application/json"},
        timeout=60,
    ).json()
    assert answer["classes"]
    assert all(1 / 21 - 0.01 <= found["confidence"] <= 1 for found in answer["classes"])


def test_sigterm_stops_it_in_order(photos: list[Photo]) -> None:
    """The exit status is 0: captured graphs and buffers are released without a crash."""
    with serving(DEFAULT_MODEL, device="cuda") as server:
        content = encode(photos[0])
        assert httpx.post(f"{server.url}/segment", content=content, timeout=60).is_success
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
