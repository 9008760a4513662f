"""The device and precision of a session."""

import pytest

from service.inference import providers
from service.inference.session import DeviceOptions, load_model
from service.settings import DEFAULT_MODEL
from tests.gpu.conftest import Gpu


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_node_runs_on_the_gpu(precision: str, request: pytest.FixtureRequest) -> None:
    """The CUDA provider is the session's first, and no node is assigned to the CPU."""
    gpu: Gpu = request.getfixturevalue(precision)
    session = gpu.model.session
    assert gpu.model.provider == providers.CUDA
    assert session.get_providers()[0] == providers.CUDA
    parts = session.get_provider_graph_assignment_info()  # type: ignore[attr-defined]
    assert {part.ep_name for part in parts} == {providers.CUDA}
    assert sum(len(part.get_nodes()) for part in parts) > 0


def test_auto_takes_the_gpu_and_its_fastest_precision(fp32: Gpu) -> None:
    """The precision is fp16 with tensor cores; no reason against the GPU is reported."""
    model = load_model(DEFAULT_MODEL, "auto", options=DeviceOptions(graphs=False))
    assert model.provider == providers.CUDA
    assert model.gpu is not None
    assert model.why is None
    precision = model.manifest.files[model.file_name].precision
    assert precision == ("fp16" if fp32.device.has_tensor_cores else "fp32")


def test_the_gpu_has_a_name_and_memory(fp32: Gpu) -> None:
    """The log and the metrics report them."""
    free, total = fp32.device.memory()
    assert 0 < free < total
    assert fp32.device.name
