"""Loading an artefact: every disagreement stops it, in one line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest

from service.artefact.manifest import FileEntry, load_manifest
from service.errors import (
    ArtefactError,
    ContractError,
    DeviceMemoryExhausted,
    DeviceUnavailable,
    IntegrityError,
)
from service.inference import providers, session
from service.inference.lanes import NO_GRAPH
from service.inference.session import DeviceOptions, PrecisionChoice, load_model
from tests.artefacts import STRIDE, add_precision, build_artefact, make_contract, two_class_photo
from tests.fakes import FakeSession
from tests.host_device import HostDevice


def test_a_good_artefact_loads_and_runs(tiny_artefact: Path) -> None:
    """Contract, manifest and graph agree; batches of any size and shape run on the CPU."""
    model = load_model(tiny_artefact, "cpu", threads=1)
    assert model.contract == make_contract()
    assert model.provider == "CPUExecutionProvider"
    model.warm_up()
    photo = two_class_photo()
    logits = model.run(np.stack([photo, photo]))
    assert logits.shape == (2, 21, 64 // STRIDE, 96 // STRIDE)
    assert logits.dtype == np.float32
    assert logits[1, :, 0, -1].argmax() == 15


def test_the_sha256_is_checked_before_the_graph_is_read(tmp_path: Path) -> None:
    """A changed file is never handed to ONNX Runtime."""
    folder = build_artefact(tmp_path)
    (folder / "network.onnx").write_bytes(b"not even a graph")
    with pytest.raises(IntegrityError, match=r"network\.onnx: sha256 is"):
        load_model(folder)


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    """ONNX Runtime's own error is reported in one line."""
    folder = build_artefact(tmp_path)
    path = folder / "network.onnx"
    path.write_bytes(b"not a graph")
    entry = FileEntry.of(path, "fp32")
    load_manifest(folder).model_copy(update={"files": {path.name: entry}}).write(folder)
    with pytest.raises(ArtefactError, match="ONNX Runtime cannot load it") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_graph_without_contract_is_refused(tmp_path: Path) -> None:
    """The missing keys are named, and the file."""
    folder = build_artefact(tmp_path, metadata={"someone": "else"})
    with pytest.raises(ContractError, match=r"network\.onnx: .*lacks fcn.schema_version"):
        load_model(folder)


def test_a_graph_of_another_version_than_the_manifest_is_refused(tmp_path: Path) -> None:
    """Both must come from one export."""
    folder = build_artefact(tmp_path, metadata=make_contract(version="9").to_metadata())
    with pytest.raises(ContractError, match=r"version is '1' in manifest\.json, but '9'"):
        load_model(folder)


def test_the_warm_up_finds_a_wrong_stride(tmp_path: Path) -> None:
    """Symbolic dimensions hide the size; the first run shows it."""
    folder = build_artefact(tmp_path, stride=32)
    model = load_model(folder, "cpu", threads=1)
    with pytest.raises(ContractError, match=r"stride 16 makes logits \[1, 21, 4, 6\] of a 64x96"):
        model.warm_up()


def test_the_warm_up_runs_every_listed_shape(tiny_artefact: Path) -> None:
    """Each shape runs once, and the largest twice."""
    fake = FakeSession()
    load_model(tiny_artefact, session=fake).warm_up()
    assert len(fake.threads) == len(fake.contract.shapes) + 1


def test_a_gpu_that_cannot_be_used_stops_the_start_or_is_done_without(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it was asked for, the error states the reason; with auto, the CPU serves and keeps it."""

    def refuse(ordinal: int) -> NoReturn:
        raise DeviceUnavailable(f"GPU {ordinal}: CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(session, "CudaDevice", refuse)
    with pytest.raises(DeviceUnavailable, match=r"device cuda:3 was asked for, but GPU 3: CUDA"):
        load_model(tiny_artefact, "cuda:3")
    model = load_model(tiny_artefact, "auto")
    assert model.provider == "CPUExecutionProvider"
    assert model.gpu is None
    assert model.why == "GPU 0: CUDA_ERROR_NO_DEVICE"
    assert load_model(tiny_artefact, "cpu").why is None


def test_a_runtime_without_cuda_says_what_it_offers(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra `cpu` on a machine with a GPU."""
    monkeypatch.setattr(session, "CudaDevice", HostDevice)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match="offers only CPUExecutionProvider"):
        load_model(tiny_artefact, "cuda")
    assert load_model(tiny_artefact, "auto").gpu is None


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_silent_fallback_is_noticed(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch, provider: Literal["cuda", "tensorrt"]
) -> None:
    """The wheel offers the provider, but the session runs on the CPU: the error states why."""
    monkeypatch.setattr(session, "CudaDevice", HostDevice)
    offered = [providers.TENSORRT, providers.CUDA, providers.CPU]
    monkeypatch.setattr(ort, "get_available_providers", lambda: offered)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(session, "_open", lambda *_: FakeSession())
    options = DeviceOptions(provider=provider)
    # The reason is the loader's: this wheel has no such library.
    with pytest.raises(DeviceUnavailable, match=f"fell back to CPU.*providers_{provider}"):
        load_model(tiny_artefact, "cuda", options=options)


def test_a_node_that_is_left_to_the_cpu_is_named(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that took only part of the network."""
    real = session._open
    monkeypatch.setattr(session, "CudaDevice", HostDevice)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.CUDA])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    # ONNX Runtime's own record of which node went where, of a session on the CPU.
    monkeypatch.setattr(
        session, "_open", lambda network, options, _: real(network, options, [providers.CPU])
    )
    monkeypatch.setattr(providers, "CUDA", providers.CPU)
    with pytest.raises(DeviceUnavailable, match=r"to the CPU Cast, Transpose, .* and 1 more"):
        load_model(tiny_artefact, "cuda")


def test_bound_buffers_hold_what_a_plain_run_gives(tiny_artefact: Path) -> None:
    """No copies: input and logits are the caller's buffers, and each call queues one run."""
    model = load_model(tiny_artefact, "cpu", threads=1)
    batch = np.stack([two_class_photo(), two_class_photo()[::-1]])
    logits = np.full((2, 21, 64 // STRIDE, 96 // STRIDE), np.nan, dtype=np.float32)
    run = model.bind(batch.ctypes.data, logits.ctypes.data, 2, (64, 96), NO_GRAPH)
    run()
    np.testing.assert_array_equal(logits, model.run(batch))


@pytest.mark.parametrize(
    ("message", "raised"),
    [
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9",
         DeviceMemoryExhausted),
        ("CUDNN_STATUS_EXECUTION_FAILED", RuntimeError),
    ],
)  # fmt: skip
def test_short_memory_is_told_apart(
    tiny_artefact: Path, message: str, raised: type[Exception]
) -> None:
    """By ONNX Runtime's message, because it has no class for it."""
    real = load_model(tiny_artefact, "cpu", threads=1)

    class Short(FakeSession):
        def io_binding(self) -> Any:  # noqa: ANN401
            return real.session.io_binding()

        def run_with_iobinding(self, iobinding: object, run_options: object = None) -> None:
            raise RuntimeError(message)

    model = load_model(tiny_artefact, session=Short())
    buffer = np.zeros((1, 64, 96, 3), dtype=np.uint8)
    with pytest.raises(raised, match=message):
        model.bind(buffer.ctypes.data, buffer.ctypes.data, 1, (64, 96), NO_GRAPH)()


@pytest.mark.parametrize(
    ("tensor_cores", "precision", "picked"),
    [
        (True, "auto", "network.fp16.onnx"),
        (False, "auto", "network.onnx"),
        (True, "fp32", "network.onnx"),
        (True, "int8", "network.int8.onnx"),
    ],
)
def test_fp16_runs_where_there_are_tensor_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensor_cores: bool,
    precision: PrecisionChoice,
    picked: str,
) -> None:
    """An artefact with all three networks."""
    monkeypatch.setattr(HostDevice, "has_tensor_cores", tensor_cores)
    monkeypatch.setattr(session, "CudaDevice", HostDevice)
    real = session._open
    monkeypatch.setattr(
        session,
        "_open_on_gpu",
        lambda network, *_: real(network, session._session_options(1), [providers.CPU]),
    )
    folder = build_artefact(tmp_path)
    add_precision(folder, "fp16")
    add_precision(folder, "int8")
    assert load_model(folder, "cuda", precision=precision).file_name == picked


@pytest.mark.parametrize(
    ("fast", "precision", "picked"),
    [
        (True, "auto", "network.int8.onnx"),
        (False, "auto", "network.onnx"),
        (True, "fp32", "network.onnx"),
        (False, "int8", "network.int8.onnx"),
    ],
)
def test_int8_runs_where_it_is_fast_or_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    precision: PrecisionChoice,
    picked: str,
) -> None:
    """An artefact with both networks, on CPUs with and without 8-bit dot products."""
    monkeypatch.setattr(session, "_int8_is_fast", lambda: fast)
    folder = build_artefact(tmp_path)
    add_precision(folder, "int8")
    assert load_model(folder, "cpu", threads=1, precision=precision).file_name == picked


def test_the_other_networks_file_is_checked_too(tmp_path: Path) -> None:
    """An int8 network reads its weights from the fp32 file."""
    folder = build_artefact(tmp_path)
    add_precision(folder, "int8")
    (folder / "network.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"network\.onnx: No such file"):
        load_model(folder, precision="int8")


def test_a_precision_that_the_artefact_lacks_is_named(tiny_artefact: Path) -> None:
    """There is no silent fallback to another precision."""
    with pytest.raises(ContractError, match="no network of precision int8, only fp32"):
        load_model(tiny_artefact, precision="int8")


@pytest.mark.parametrize(("threads", "sessions"), [(1, 1), (2, 2), (3, 2), (8, 3)])
def test_half_the_threads_each_for_two_runs_at_once(
    tiny_artefact: Path, threads: int, sessions: int
) -> None:
    """None with a single thread; two halves of one thread are one session without threads."""
    model = load_model(tiny_artefact, "cpu", threads=threads)
    assert len({id(one) for one in (model.session, *model.shares)}) == sessions
    assert len(model.shares) == (2 if threads > 1 else 0)
    model.warm_up()
    photo = two_class_photo()[None]
    for share in model.shares:
        np.testing.assert_array_equal(model.run(photo, share), model.run(photo))


@pytest.mark.slow
def test_the_runtime_is_told_not_to_report_to_its_maker() -> None:
    """Importing `service` or `models` first sets it; an operator's own choice stays."""
    script = "import models.prediction, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    for given, wanted in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        told = subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, **given},
            check=True,
            capture_output=True,
            text=True,
        )
        assert told.stdout.strip() == wanted
