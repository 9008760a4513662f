"""Memory does not grow, and running out of memory is handled."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import islice, product
from typing import Any

import anyio
import httpx
import pytest

from service.errors import SegmentError
from service.settings import DEFAULT_MODEL, Settings
from tests.artefacts import encode
from tests.clients import InProcess, fails, in_process
from tests.gpu.conftest import Photo, resized

pytestmark = pytest.mark.anyio

REQUESTS = 300
AT_ONCE = 12

GROWTH_BYTES = 64 * 2**20
"""The driver loads kernels at their first use, and the composition of batches is random."""

SIZES = [
    *((500, 375), (375, 500), (512, 512), (224, 224), (640, 480), (480, 640), (1920, 1080)),
    *((97, 331), (1000, 200), (1, 333), (334, 500), (4000, 3000)),
]
"""Widths and heights of the photos."""

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {"quality": 90}),
    ("PNG", {"compress_level": 1}),
    ("WEBP", {"quality": 80}),
]
ASKED: list[tuple[str, dict[str, str]]] = [
    ("image/png", {}),
    ("application/json", {}),
    ("image/png", {"max_side": "320"}),
    ("image/jpeg", {"view": "overlay"}),
    ("application/json", {"max_side": "768", "mask": "none"}),
]


@asynccontextmanager
async def opened(**changes: Any) -> AsyncIterator[InProcess]:  # noqa: ANN401
    """Open the app on the GPU, in this process."""
    settings = Settings(**{"model": DEFAULT_MODEL, "device": "cuda", **changes})
    async with in_process(settings) as running:
        yield running


async def post(
    running: InProcess, photo: bytes, accept: str = "image/png", **parameters: str
) -> httpx.Response:
    """Send one photo."""
    headers = {"Accept": accept, "Content-Type": "image/*"}
    return await running.http.post("/segment", content=photo, params=parameters, headers=headers)


def used_bytes(running: InProcess) -> int:
    """The GPU's used memory in bytes, by all processes; no other process may use the GPU."""
    gpu = running.service.engines.default.model.gpu
    assert gpu is not None
    free, total = gpu.memory()
    return total - free


async def test_memory_does_not_grow_with_the_requests(photos: list[Photo]) -> None:
    """300 requests of many sizes, formats and answers use no more memory the second time."""
    files = [
        encode(resized(photo, size), image_format, **options)
        for photo, size, (image_format, options) in zip(
            photos * len(SIZES), SIZES * len(photos), FORMATS * len(SIZES), strict=False
        )
    ]
    async with opened(max_batch=4) as running:
        taken = []
        for _ in range(2):
            statuses = await send(running, files)
            assert statuses == [200] * REQUESTS
            taken.append(used_bytes(running))
    assert taken[1] <= taken[0] + GROWTH_BYTES


async def send(running: InProcess, files: list[bytes]) -> list[int]:
    """Send `REQUESTS` requests, `AT_ONCE` at a time; returns the statuses."""
    pairs = list(product(range(len(files)), range(len(ASKED))))
    wanted = islice((pairs[nth * 7 % len(pairs)] for nth in range(10**6)), REQUESTS)
    statuses: list[int] = []

    async def client() -> None:
        for file, asked in wanted:
            accept, parameters = ASKED[asked]
            response = await post(running, files[file], accept, **parameters)
            statuses.append(response.status_code)

    async with anyio.create_task_group() as group:
        for _ in range(AT_ONCE):
            group.start_soon(client)
    return statuses


async def test_a_batch_that_does_not_fit_into_memory_fails_alone(photos: list[Photo]) -> None:
    """Each of its members gets 503 with Retry-After; the next request is answered.

    The limit is about the least with which the service starts, so 2048x2048, which takes sixteen
    times the warm-up's memory, does not fit.
    """
    photo = encode(resized(photos[0], (600, 600)), "JPEG")
    async with least_memory() as running:
        before = (await post(running, photo)).content
        large: list[httpx.Response] = []

        async def ask() -> None:
            large.append(await post(running, photo, max_side="1280"))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
        for response in large:
            assert response.status_code == 503
            assert response.json()["type"] == "/problems/overloaded"
            assert int(response.headers["Retry-After"]) >= 1
        after = await post(running, photo)
        assert (after.status_code, after.content) == (200, before)
        assert (await running.http.get("/readyz")).status_code == 200


@asynccontextmanager
async def least_memory() -> AsyncIterator[InProcess]:
    """Open the app with about the least memory with which it starts."""
    async with AsyncExitStack() as stack:
        limit_mb = 64
        while True:
            context = opened(max_batch=1, cuda_graphs=False, gpu_memory_mb=limit_mb)
            try:
                running = await stack.enter_async_context(context)
            except SegmentError:
                assert limit_mb < 2**15, "it does not start even with 32 GiB"
                limit_mb = limit_mb * 5 // 4
            else:
                break
        yield running


def test_too_little_memory_to_start() -> None:
    """The last line reports it without a traceback. ONNX Runtime may log lines before it."""
    too_little = {"gpu_memory_mb": 1, "log_level": "error"}
    status, stderr = fails("serve", "--port", "0", model=DEFAULT_MODEL, device="cuda", **too_little)
    assert status == 1
    assert stderr.splitlines()[-1].startswith("fcn-segment: ")
    assert "Traceback" not in stderr
