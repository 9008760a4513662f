"""The parts of the GPU's layer that need no GPU: compiling the kernel, and start-up errors."""

from pathlib import Path

import pytest
from cuda.bindings import driver

from service.errors import DeviceUnavailable
from service.inference import cuda, providers


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_the_kernel_compiles_for_every_generation_that_cuda_13_knows(arch: str) -> None:
    """Turing to Blackwell: by the compiler that the service uses on the GPU's host."""
    code = cuda.compile_kernel(arch)
    assert cuda.KERNEL_NAME.encode() in code.code


def test_without_the_packages_the_reason_is_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra `cpu` is installed."""
    monkeypatch.setattr(cuda, "core", None)
    with pytest.raises(DeviceUnavailable, match="packages of the extra `gpu`"):
        cuda.CudaDevice(0)


def test_a_driver_that_cannot_be_used_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error of cuda.core is reported in one line."""

    def fail() -> None:
        raise RuntimeError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected\nat driver")

    monkeypatch.setattr(driver, "cuDriverGetVersion", fail)
    with pytest.raises(DeviceUnavailable, match=r"^GPU 2: CUDA_ERROR_NO_DEVICE[^\n]*detected$"):
        cuda.CudaDevice(2)


def test_an_old_driver_is_told_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA 13's libraries do not run on a driver for 12."""
    success = driver.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (success, 12040))
    with pytest.raises(DeviceUnavailable, match=r"supports CUDA 12\.4 at most, and CUDA 13"):
        cuda.CudaDevice(0)


def test_the_cuda_provider_computes_on_the_given_stream_and_captures_on_request() -> None:
    """Strings, as ONNX Runtime wants them; a limit only where there is one."""
    name, options = providers.cuda(1, 42, precision="fp16", graphs=True, memory_bytes=0)
    assert name == providers.CUDA
    assert options["device_id"] == "1"
    assert options["user_compute_stream"] == "42"
    assert options["enable_cuda_graph"] == "1"
    assert "gpu_mem_limit" not in options
    _, options = providers.cuda(1, 42, precision="fp32", graphs=False, memory_bytes=2**30)
    assert options["enable_cuda_graph"] == "0"
    assert options["use_tf32"] == "0"
    assert options["gpu_mem_limit"] == str(2**30)


def test_tensorrts_profile_is_what_the_contract_lists(tmp_path: Path) -> None:
    """From one photo of the smallest sides to a full batch of the largest."""
    _, options = providers.tensorrt(
        0, 42, precision="fp16", shapes=[(288, 512), (512, 288)], max_batch=16, cache=tmp_path
    )
    assert options["trt_profile_min_shapes"] == "image:1x288x288x3"
    assert options["trt_profile_max_shapes"] == "image:16x512x512x3"
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_path"] == str(tmp_path)
