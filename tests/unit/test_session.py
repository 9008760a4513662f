"""Loading an artefact: every disagreement stops it, in one line."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest

from service import session
from service.errors import ArtefactError, ContractError, DeviceUnavailable, IntegrityError
from service.manifest import FileEntry, load_manifest
from service.session import PrecisionChoice, available_cores, load_model
from tests.artefacts import STRIDE, add_precision, build_artefact, make_contract, two_class_photo
from tests.fakes import FakeSession


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
    """ONNX Runtime's own complaint comes in one line."""
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
    """The two must be of one export."""
    folder = build_artefact(tmp_path, metadata=make_contract(version="9").to_metadata())
    with pytest.raises(ContractError, match=r"version is '1' in manifest\.json, but '9'"):
        load_model(folder)


def test_the_warm_up_finds_a_wrong_stride(tmp_path: Path) -> None:
    """What symbolic dimensions hide, the first run shows."""
    folder = build_artefact(tmp_path, stride=32)
    model = load_model(folder, "cpu", threads=1)
    with pytest.raises(ContractError, match=r"stride 16 makes logits \[1, 21, 4, 6\] of a 64x96"):
        model.warm_up()


def test_the_warm_up_runs_every_listed_shape(tiny_artefact: Path) -> None:
    """Each shape once."""
    fake = FakeSession()
    load_model(tiny_artefact, session=fake).warm_up()
    assert len(fake.threads) == len(fake.contract.shapes)


def test_cuda_that_is_not_installed_stops_the_start(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says what there is instead."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match="offers only CPUExecutionProvider"):
        load_model(tiny_artefact, "cuda")
    assert load_model(tiny_artefact, "auto").provider == "CPUExecutionProvider"


def test_a_silent_fallback_from_cuda_is_noticed(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel offers CUDA, but the session runs on the CPU: no driver, or a wrong library."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(session, "_open", lambda *_: FakeSession())
    with pytest.raises(DeviceUnavailable, match="fell back to CPUExecutionProvider"):
        load_model(tiny_artefact, "cuda")
    assert load_model(tiny_artefact, "auto").provider == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("max 100000", 8), ("150000 100000", 2), ("10000 100000", 1), ("1600000 100000", 8)],
)
def test_available_cores_respect_a_containers_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str, cores: int
) -> None:
    """`docker run --cpus` sets a quota, not an affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    assert available_cores(tmp_path / "cpu.max") == cores
    assert available_cores(tmp_path / "absent") == 8


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
    """An int8 network reads its weights out of the fp32 file."""
    folder = build_artefact(tmp_path)
    add_precision(folder, "int8")
    (folder / "network.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"network\.onnx: No such file"):
        load_model(folder, precision="int8")


def test_a_precision_that_the_artefact_lacks_is_named(tiny_artefact: Path) -> None:
    """Never another one silently."""
    with pytest.raises(ContractError, match="no network of precision int8, only fp32"):
        load_model(tiny_artefact, precision="int8")


@pytest.mark.parametrize(("threads", "sessions"), [(1, 1), (2, 2), (3, 2), (8, 3)])
def test_half_the_threads_each_for_two_runs_at_once(
    tiny_artefact: Path, threads: int, sessions: int
) -> None:
    """None with a single thread; halves of one thread are one session, which has no threads."""
    model = load_model(tiny_artefact, "cpu", threads=threads)
    assert len({id(one) for one in (model.session, *model.shares)}) == sessions
    assert len(model.shares) == (2 if threads > 1 else 0)
    model.warm_up()
    photo = two_class_photo()[None]
    for share in model.shares:
        np.testing.assert_array_equal(model.run(photo, share), model.run(photo))
