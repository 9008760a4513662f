"""The device's highest measured rates, and the least work that the network needs."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from onnx import TensorProto

from service.inference import providers
from service.inference.cuda import CudaDevice
from tests.benchmarks.bench import seconds_each
from tests.benchmarks.gpu_cost import matrix_product, network_cost
from tests.benchmarks.gpu_device import (
    CPU,
    GpuBench,
    allocate,
    copy_on_device,
    ordinal,
    shape_text,
    wait,
)
from tests.benchmarks.gpu_network import LANDSCAPE, SQUARE
from tests.host_device import HostDevice

_BATCH: Final = 16
"""Images that share one reading of the weights."""


def roofline(bench: GpuBench) -> None:
    """Measure the rates of a large matrix product and a large copy; compute the network's cost."""
    for shape in (SQUARE, LANDSCAPE):
        cost = network_cost(bench.artefact / "network.onnx", shape)
        bench.add(
            part="roofline",
            what="network",
            shape=shape_text(shape),
            multiply_adds=cost.multiply_adds,
            fp16_bytes=cost.bytes_of(_BATCH, 2) // _BATCH,
        )
    with bench.attempt(part="roofline", what="matrices"):
        _matrices(bench)
    with bench.attempt(part="roofline", what="copies"):
        _copies(bench)


def _matrices(bench: GpuBench) -> None:
    """With ONNX Runtime, which uses the same matrix library as PyTorch."""
    gpu = _open(bench.device)
    dtype: np.dtype[Any]
    if isinstance(gpu, CudaDevice):
        ort.preload_dlls()
        size, dtype, element = 8192, np.dtype("float16"), TensorProto.FLOAT16
        provider = providers.cuda(
            gpu.ordinal, gpu.compute_handle, precision="fp16", graphs=False, memory_bytes=0
        )
    else:
        size, dtype, element = 1024, np.dtype("float32"), TensorProto.FLOAT
        provider = (providers.CPU, {})
    session = ort.InferenceSession(matrix_product(size, element), providers=[provider])
    if session.get_providers()[0] != provider[0]:
        raise RuntimeError(f"ONNX Runtime fell back to {session.get_providers()[0]}")
    rng = np.random.default_rng(0)
    # Values like activations, because products of zeros take less power.
    matrix = rng.standard_normal((size, size), dtype=np.float32).astype(dtype)
    held = [allocate(gpu, matrix) for _ in range(3)]
    binding = session.io_binding()
    place = (gpu.kind, gpu.ordinal, dtype.type, (size, size))
    binding.bind_input("a", *place, held[0][1])
    binding.bind_input("b", *place, held[1][1])
    binding.bind_output("c", *place, held[2][1])
    run_options = ort.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    seconds = seconds_each(
        lambda: session.run_with_iobinding(binding, run_options), lambda: wait(gpu), bench.least_s
    )
    bench.add(
        part="roofline",
        what="matrices",
        side="ONNX Runtime",
        precision=dtype.name,
        size=size,
        tflop_per_s=2 * size**3 / min(seconds) / 1e12,
    )


def _copies(bench: GpuBench) -> None:
    """Bytes read and bytes written both count."""
    gpu = _open(bench.device)
    size = 2**30 if isinstance(gpu, CudaDevice) else 2**26
    (source, source_at), (target, target_at) = (
        allocate(gpu, np.ones(size, dtype=np.uint8)) for _ in range(2)
    )
    seconds = seconds_each(
        lambda: copy_on_device(gpu, target_at, source_at, size), lambda: wait(gpu), bench.least_s
    )
    bench.add(
        part="roofline",
        what="copies",
        mib=size >> 20,
        gb_per_s=2 * size / min(seconds) / 1e9,
    )
    del source, target


def _open(device: str) -> CudaDevice | HostDevice:
    return HostDevice() if device == CPU else CudaDevice(ordinal(device))
