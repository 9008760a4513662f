"""One NVIDIA GPU: its streams, its memory, and the upsampling kernel. The only importer of CUDA.

The extra ``gpu`` installs NVIDIA's Python packages,
`cuda.core <https://nvidia.github.io/cuda-python>`_, and everything else but the driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.errors import DeviceMemoryExhausted, DeviceUnavailable

try:
    from cuda import core
    from cuda.bindings import driver
except ImportError:  # the extra `cpu`
    core = driver = None

KERNEL: Final = Path(__file__).with_name("upsampling.cu")
KERNEL_NAME: Final = "upsample"

_BLOCK: Final = 256
"""Threads of a block: a multiple of the warp's 32, and few enough for any GPU's registers."""

_TENSOR_CORES: Final = (7, 0)
"""The first compute capability with tensor cores (Volta)."""


def compile_kernel(arch: str) -> Any:  # noqa: ANN401  # cuda.core's ObjectCode, where there is one
    """Compile the upsampling for an architecture such as ``sm_90``. This needs no GPU.

    The output is machine code: a driver older than the compiler would refuse PTX.
    """
    program = core.Program(
        KERNEL.read_text(encoding="utf-8"), "c++", core.ProgramOptions(std="c++17", arch=arch)
    )
    return program.compile("cubin")


class CudaDevice:
    """GPU number ``ordinal``, with the stream on which networks and upsampling compute.

    Raises `DeviceUnavailable` with one line that states the reason: no packages, no driver, an old
    driver, no such GPU.
    """

    kind: Final = "cuda"
    """ONNX Runtime's name of this kind of device."""

    def __init__(self, ordinal: int) -> None:
        if core is None:
            raise DeviceUnavailable("the packages of the extra `gpu` are not installed")
        self.ordinal = ordinal
        # cuda.core's exceptions share no base below Exception. Any of them means: not usable.
        try:
            _require_driver()
            self._device = core.Device(ordinal)
            self._device.set_current()
            self.compute = self._device.create_stream()
            code = compile_kernel(f"sm_{self._device.arch}")
            self._kernel = code.get_kernel(KERNEL_NAME)
        except DeviceUnavailable:
            raise
        except Exception as exc:
            raise DeviceUnavailable(f"GPU {ordinal}: {first_line(exc)}") from exc

    @property
    def name(self) -> str:
        """The GPU's product name."""
        return str(self._device.name)

    @property
    def has_tensor_cores(self) -> bool:
        """Whether fp16 is faster than fp32."""
        capability = self._device.compute_capability
        return (capability.major, capability.minor) >= _TENSOR_CORES

    @property
    def compute_handle(self) -> int:
        """The compute stream's ``cudaStream_t``."""
        return int(self.compute.handle)

    def make_current(self) -> None:
        """Make this the calling thread's GPU."""
        core.Device(self.ordinal).set_current()

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes of the GPU's memory, which other processes share."""
        self.make_current()
        free, total = _checked(driver.cuMemGetInfo())
        return int(free), int(total)

    def open_channel(self, input_bytes: int, logits_bytes: int, output_bytes: int) -> CudaChannel:
        """Open a lane's buffers and streams; see `service.inference.lanes.Channel`."""
        with memory_errors("OUT_OF_MEMORY"):
            self.make_current()
            return CudaChannel(self, self._kernel, input_bytes, logits_bytes, output_bytes)


class CudaChannel:
    """`lanes.Channel` on a GPU. Copies run on their own stream, beside the compute stream."""

    def __init__(
        self,
        device: CudaDevice,
        kernel: Any,  # noqa: ANN401
        input_bytes: int,
        logits_bytes: int,
        output_bytes: int,
    ) -> None:
        self._device = device
        self._kernel = kernel
        self._copies = core.Device(device.ordinal).create_stream()
        self._host_input, self.input = _page_locked(input_bytes)
        self._host_output, self.output = _page_locked(output_bytes)
        self._input, self._logits, self._output = (
            core.Device(device.ordinal).allocate(size, stream=device.compute)
            for size in (input_bytes, logits_bytes, output_bytes)
        )
        # From here on the buffers may be used on any stream.
        device.compute.sync()
        self.input_address = int(self._input.handle)
        self.logits_address = int(self._logits.handle)
        # Blocking: a waiting thread must leave its core to the threads that decode.
        options = core.EventOptions(timing_enabled=True, blocking_sync=True)
        self._uploaded, self._inferred, self._upsampled, self._downloaded = (
            core.Device(device.ordinal).create_event(options) for _ in range(4)
        )

    def upload(self, size: int) -> None:
        """Copy the first ``size`` bytes of ``input`` to the device; what follows waits for that."""
        self._device.make_current()
        self._copy(self.input_address, int(self._host_input.handle), size)
        compute = self._device.compute
        compute.wait(self._copies.record())
        compute.record(self._uploaded)

    def upsample(self, pieces: int, most_pixels: int, classes: int) -> None:
        """Upsample the `PIECE` records at the start of the input into the device's output."""
        compute = self._device.compute
        compute.record(self._inferred)
        config = core.LaunchConfig(grid=(-(-most_pixels // _BLOCK), pieces), block=_BLOCK)
        core.launch(
            compute,
            config,
            self._kernel,
            self._input,
            self._logits,
            np.int32(classes),
            self._output,
        )
        compute.record(self._upsampled)

    def download(self, size: int) -> None:
        """Copy the first ``size`` bytes of the device's output to ``output``."""
        self._copies.wait(self._upsampled)
        self._copy(int(self._host_output.handle), int(self._output.handle), size)
        self._copies.record(self._downloaded)

    def wait(self) -> tuple[float, float]:
        """Wait for the last download; returns seconds, see `service.inference.lanes.Channel`."""
        self._downloaded.sync()
        return (
            (self._inferred - self._uploaded) / 1000,
            (self._downloaded - self._inferred) / 1000,
        )

    def _copy(self, target: int, source: int, size: int) -> None:
        _checked(driver.cuMemcpyAsync(target, source, size, self._copies.handle))


def _page_locked(size: int) -> tuple[Any, npt.NDArray[np.uint8]]:
    """Allocate host memory that the GPU accesses directly; returns its owner and its bytes."""
    buffer = core.LegacyPinnedMemoryResource().allocate(size)
    memory = (ctypes.c_uint8 * size).from_address(int(buffer.handle))
    return buffer, np.ctypeslib.as_array(memory)


def _require_driver() -> None:
    needed = driver.CUDA_VERSION // 1000
    found = _checked(driver.cuDriverGetVersion())
    if found // 1000 < needed:
        raise DeviceUnavailable(
            f"the NVIDIA driver supports CUDA {found // 1000}.{found % 1000 // 10} at most, and "
            f"CUDA {needed} is needed: update the driver"
        )


def _checked(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401
    """Return the results of a driver call. Raises `RuntimeError` on any status but success."""
    status, *results = answer
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise DeviceMemoryExhausted("the GPU has no memory left")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


@contextmanager
def memory_errors(*words: str) -> Iterator[None]:
    """Raise `DeviceMemoryExhausted` for exceptions whose text has one of ``words``."""
    try:
        yield
    except Exception as exc:
        if any(word in str(exc) for word in words):
            raise DeviceMemoryExhausted(first_line(exc)) from exc
        raise


def first_line(exc: Exception) -> str:
    """The first line of an exception's text, or its class's name."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
