"""Tests that need a GPU; they are skipped only where there is none.

    make test-gpu
    make test-gpu ARGS="--data VOCdevkit"

A GPU that cannot be used (missing packages, outdated driver) fails the tests.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from skimage import data

from service.artefact.contract import Precision, Shape
from service.artefact.preprocessing import Geometry, preprocess
from service.inference.cuda import CudaDevice
from service.inference.lanes import DeviceTask, Lane
from service.inference.session import DeviceOptions, Model, load_model
from service.inference.upsampling import Labels, upsample
from service.settings import DEFAULT_MODEL

MAX_BATCH = 8
MAX_SIDE = 2048
_NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE, from ``cuda.h``."""

Photo = npt.NDArray[np.uint8]


def no_device() -> str | None:
    """The reason why there is no CUDA device; None if there is one, usable or not.

    It asks the driver directly, so that a fault in the service does not look like a missing GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        if any(Path("/dev").glob("nvidia[0-9]*")):
            return None
        return f"no CUDA device: {exc}"
    if driver.cuInit(0) == _NO_DEVICE:
        return "no CUDA device: the driver found none"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--data``, with which fp16 is scored too."""
    parser.addoption("--data", type=Path, metavar="VOCdevkit", help="score fp16 on its val list")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip this folder without a GPU; deselect tests that need ``--data`` without it."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if (reason := no_device()) is not None:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--data") is None:
        without = [item for item in here if "devkit" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session")
def devkit(request: pytest.FixtureRequest) -> Path:
    """The ``VOCdevkit`` given with ``--data``."""
    folder: Path = request.config.getoption("--data")
    return folder


@dataclass
class Gpu:
    """A network on the GPU, opened once because opening is slow.

    Each lane that it opens has its own number, and therefore its own CUDA graphs.
    """

    model: Model
    device: CudaDevice
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _numbers: Iterator[int] = field(default_factory=count)

    def open_lane(self, *, graphs: bool = True, max_batch: int = MAX_BATCH) -> Lane:
        """A lane as the service opens it, not warmed up. Use it from one thread."""
        return Lane(
            next(self._numbers),
            self.device.open_channel,
            self.model,
            self.model.contract,
            max_batch=max_batch,
            max_side=MAX_SIDE,
            graphs=graphs,
            lock=self._lock,
        )


def open_gpu(precision: Precision, *, graphs: bool = True) -> Gpu:
    """The default artefact on the first GPU."""
    options = DeviceOptions(graphs=graphs, max_batch=MAX_BATCH)
    model = load_model(DEFAULT_MODEL, "cuda", precision=precision, options=options)
    assert model.gpu is not None
    return Gpu(model, model.gpu)


@pytest.fixture(scope="session")
def fp32() -> Gpu:
    """The network in fp32, for comparison with the CPU."""
    return open_gpu("fp32")


@pytest.fixture(scope="session")
def fp16() -> Gpu:
    """The network in fp16, as the service runs it."""
    return open_gpu("fp16")


@pytest.fixture(scope="session")
def fp32_lane(fp32: Gpu) -> Lane:
    """A warm lane with CUDA graphs."""
    lane = fp32.open_lane()
    lane.warm_up()
    return lane


@pytest.fixture(scope="session")
def fp16_lane(fp16: Gpu) -> Lane:
    """A warm lane with CUDA graphs."""
    lane = fp16.open_lane()
    lane.warm_up()
    return lane


@pytest.fixture(scope="session")
def photos() -> list[Photo]:
    """Real photos, ``(H, W, 3) uint8`` RGB: people, a cat, a cup, and no VOC class."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [np.asarray(getattr(data, name)()) for name in names]


@pytest.fixture(scope="session")
def prepare(fp32: Gpu) -> Callable[..., DeviceTask]:
    """A function that makes a task of a photo as the service does, optionally resized."""
    contract = fp32.model.contract

    def make(
        photo: Photo,
        size: Shape | None = None,
        *,
        max_side: int = contract.working_size,
        with_confidence: bool = False,
    ) -> DeviceTask:
        if size is not None:
            photo = resized(photo, size[::-1])
        geometry = Geometry.plan(photo.shape[:2], max_side, contract.shapes)
        image = preprocess(photo, geometry, contract.padding_color)
        return DeviceTask(image, geometry, with_confidence)

    return make


@pytest.fixture(scope="session")
def on_cpu() -> Callable[[DeviceTask], Labels]:
    """A function that runs a task on the CPU path in fp32."""
    model = load_model(DEFAULT_MODEL, "cpu", precision="fp32")

    def labels(task: DeviceTask) -> Labels:
        logits = model.run(task.image[None])[0]
        return upsample(logits, task.geometry, with_confidence=task.with_confidence)

    return labels


def resized(photo: Photo, size: tuple[int, int]) -> Photo:
    """The photo resized to ``size`` (width, height)."""
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))


def masks(lane: Lane, tasks: Sequence[DeviceTask]) -> list[npt.NDArray[np.uint8]]:
    """The masks of one batch."""
    return [result.labels.mask for result in lane.run(tasks)]


def differing(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """The share of pixels in which two masks differ."""
    assert one.shape == other.shape
    return float((one != other).mean())
