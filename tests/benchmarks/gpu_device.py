"""The device under test: a GPU, or the host in its place for a dry run.

Figures from a dry run do not describe a GPU. Their results name the device and have no targets.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self
from unittest import mock

import numpy as np
import numpy.typing as npt

from service.artefact.contract import Precision, Shape
from service.artefact.preprocessing import Geometry, preprocess
from service.images.decoding import decode
from service.inference import providers
from service.inference.cuda import CudaDevice
from service.inference.lanes import NO_GRAPH, Channel, DeviceTask
from service.inference.session import DeviceOptions, Model, load_model
from service.settings import Settings
from tests.benchmarks.bench import Bench, first_line
from tests.host_device import HostDevice

try:
    from cuda import core
    from cuda.bindings import driver
except ImportError:  # then only a dry run on the CPU is possible
    core = driver = None

CPU: Final = "cpu"

PACKAGES: Final = (
    *("onnxruntime-gpu", "onnxruntime", "cuda-core", "cuda-bindings", "nvidia-cuda-runtime"),
    *("nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", "nvidia-cublas", "fastapi", "uvicorn", "numpy"),
)

_SAMPLE_EVERY_S: Final = 0.05


@dataclass(slots=True, kw_only=True)
class GpuBench(Bench):
    """A run of the GPU benchmarks. ``device``: ``cpu``, ``cuda`` or ``cuda:N``.

    ``torch_python``: a Python interpreter that has PyTorch with CUDA.
    """

    device: str
    torch_python: str

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The measured precisions, the one that the service chooses first."""
        return ("fp32",) if self.device == CPU else ("fp16",) if self.quick else ("fp16", "fp32")

    @property
    def least_s(self) -> float:
        """The shortest duration of one timing, in seconds."""
        return 0.05 if self.quick else 0.15

    @contextmanager
    def attempt(self, **row: Any) -> Iterator[None]:  # noqa: ANN401 - figures and names
        """Record the first line of an error in the block as a row, and continue."""
        try:
            yield
        # If memory runs out for one shape, the others still get their figures.
        except Exception as exc:  # noqa: BLE001
            self.add(**row, error=first_line(exc))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network on the device, and the device's buffers, copies and upsampling."""

    model: Model
    gpu: CudaDevice | HostDevice

    def wait(self) -> None:
        """Wait until all queued work is done."""
        wait(self.gpu)

    def device_s(self, queue: Callable[[], None], before: Callable[[], None]) -> float:
        """Seconds that the device needs for the work that ``queue`` queues.

        ``before`` queues longer work, so that the device does not wait for the queueing.
        """
        if not isinstance(self.gpu, CudaDevice):
            started = time.perf_counter()
            queue()
            return time.perf_counter() - started
        options = core.EventOptions(timing_enabled=True)
        before()
        started_at = self.gpu.compute.record(options=options)
        queue()
        ended_at = self.gpu.compute.record(options=options)
        ended_at.sync()
        return float(ended_at - started_at) / 1000

    def used_bytes(self) -> int:
        """The device's used memory in bytes, by all processes."""
        free, total = self.gpu.memory()
        return total - free


def wait(gpu: CudaDevice | HostDevice) -> None:
    """Wait until all work queued on the compute stream is done."""
    if isinstance(gpu, CudaDevice):
        gpu.compute.sync()


def shape_text(shape: Shape) -> str:
    """A shape as text: ``{height}x{width}``."""
    return f"{shape[0]}x{shape[1]}"


def load(bench: GpuBench, precision: Precision, *, graphs: bool = True) -> Loaded:
    """Open a network as the service does. Raises the errors of `load_model`."""
    options = DeviceOptions(graphs=graphs)
    model = load_model(bench.artefact, bench.device, precision=precision, options=options)
    return Loaded(model, model.gpu or HostDevice())


def open_channel(loaded: Loaded, images: int, output_bytes: int = 256) -> Channel:
    """Open a channel with buffers for ``images`` of the largest listed shape."""
    contract = loaded.model.contract
    pixels = images * max(height * width for height, width in contract.shapes)
    logits = pixels // contract.stride**2 * len(contract.classes) * 4
    return loaded.gpu.open_channel(pixels * 3, logits, output_bytes)


def bound_run(
    loaded: Loaded, channel: Channel, batch: int, shape: Shape, graph: int = NO_GRAPH
) -> Callable[[], None]:
    """A run of the network on a channel's buffers, bound as in the service."""
    return loaded.model.bind(channel.input_address, channel.logits_address, batch, shape, graph)


def rates(seconds: list[float], images: int) -> dict[str, float]:
    """The figures of a row: median, least and greatest images per second, and ms per run."""
    return {
        "images_per_s": images / statistics.median(seconds),
        "least": images / max(seconds),
        "greatest": images / min(seconds),
        "ms": 1000 * statistics.median(seconds),
    }


@contextmanager
def changed_options(**changes: str) -> Iterator[None]:
    """Change options of the CUDA provider for sessions opened in the block."""
    original = providers.cuda

    def changed(*args: Any, **named: Any) -> providers.Provider:  # noqa: ANN401
        name, options = original(*args, **named)
        return name, options | changes

    with mock.patch.object(providers, "cuda", changed):
        yield


def photo_tasks(bench: GpuBench, loaded: Loaded, wanted: int) -> list[DeviceTask]:
    """The photos as the service prepares them, repeated up to ``wanted``."""
    contract, settings = loaded.model.contract, Settings()
    tasks = []
    for path in bench.photos[:wanted]:
        photo = decode(path.read_bytes(), settings.max_pixels, contract.working_size)
        geometry = Geometry.plan(photo.size, contract.working_size, contract.shapes)
        image = preprocess(photo.pixels, geometry, contract.padding_color, photo.box)
        tasks.append(DeviceTask(image, geometry, with_confidence=False))
    return [tasks[number % len(tasks)] for number in range(wanted)]


def upload_photos(bench: GpuBench, loaded: Loaded, channel: Channel) -> None:
    """Fill a channel's input with photos, because arithmetic on zeros takes less power."""
    pixels = np.concatenate([task.image.ravel() for task in photo_tasks(bench, loaded, 4)])
    channel.input[:] = np.resize(pixels, channel.input.size)
    channel.upload(channel.input.size)


def read_back(
    gpu: CudaDevice | HostDevice, address: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Read float32 values from the device's memory, such as the logits of the last run."""
    wait(gpu)
    values = np.empty(shape, dtype=np.float32)
    if isinstance(gpu, CudaDevice):
        _checked(driver.cuMemcpyDtoH(values.ctypes.data, address, values.nbytes))
    else:
        ctypes.memmove(values.ctypes.data, address, values.nbytes)
    return values


def allocate(gpu: CudaDevice | HostDevice, values: npt.NDArray[Any]) -> tuple[Any, int]:
    """Copy an array into the device's memory; returns the owner and the address."""
    if not isinstance(gpu, CudaDevice):
        copy = values.copy()
        return copy, int(copy.ctypes.data)
    buffer = core.Device(gpu.ordinal).allocate(values.nbytes, stream=gpu.compute)
    gpu.compute.sync()
    _checked(driver.cuMemcpyHtoD(int(buffer.handle), values.ctypes.data, values.nbytes))
    return buffer, int(buffer.handle)


def copy_on_device(gpu: CudaDevice | HostDevice, target: int, source: int, size: int) -> None:
    """Queue a copy within the device's memory."""
    if isinstance(gpu, CudaDevice):
        _checked(driver.cuMemcpyDtoDAsync(target, source, size, gpu.compute.handle))
    else:
        ctypes.memmove(target, source, size)


def _checked(answer: tuple[Any, ...]) -> None:
    if answer[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {answer[0].name}")


def facts(device: str) -> dict[str, Any]:
    """The device's description. Raises `DeviceUnavailable` if the device is missing."""
    if device == CPU:
        return {"device": "a dry run on the CPU, whose figures do not describe a GPU"}
    gpu = CudaDevice(ordinal(device))
    _, total = gpu.memory()
    system = core.system
    return {
        "device": gpu.name,
        "gpu_memory_gib": round(total / 2**30, 1),
        "driver": _dotted(system.get_kernel_mode_driver_version),
        "cuda_of_the_driver": _dotted(system.get_user_mode_driver_version),
    }


def ordinal(device: str) -> int:
    """The GPU's number in ``cuda`` or ``cuda:N``."""
    return int(device.partition(":")[2] or 0)


def _dotted(version: Callable[[], tuple[int, ...]]) -> str:
    try:
        return ".".join(map(str, version()))
    except RuntimeError as exc:  # a container without NVML
        return f"unknown ({str(exc).splitlines()[0]})"


class Utilisation:
    """The GPU's utilisation by NVML: the share of the time in which any kernel ran.

    NVML is part of the driver and counts all processes on the GPU. It averages over up to a second,
    and does not show how well the kernels use the GPU.
    """

    def __init__(self, device: str) -> None:
        self.missing: str | None = "no GPU" if device == CPU else None
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(device,), daemon=True)

    def __enter__(self) -> Self:
        if self.missing is None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def share(self, started_s: float, ended_s: float) -> float | None:
        """Mean over a window on the clock of `time.monotonic`, in [0, 1]; None if unknown.

        The first second is left out, because its samples include the time before the window.
        """
        inside = [value for at, value in self._samples if started_s + 1.0 <= at <= ended_s]
        return statistics.fmean(inside) / 100 if inside else None

    def _watch(self, device: str) -> None:
        try:
            watched = core.Device(ordinal(device)).to_system_device()
            while not self._stop.wait(_SAMPLE_EVERY_S):
                self._samples.append((time.monotonic(), float(watched.utilization.gpu)))
        # NVML may be missing, forbidden or unsupported (MIG); its errors have no common base class.
        except Exception as exc:  # noqa: BLE001
            self.missing = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
