"""The artefact's network on its device: the only importer of ONNX Runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from service.contract import INPUT_NAME, OUTPUT_NAME, ModelContract, Precision, TensorInfo
from service.errors import ArtefactError, ContractError, DeviceUnavailable
from service.manifest import Manifest, load_manifest, verify_files

Device = Literal["auto", "cpu", "cuda"]
PrecisionChoice = Literal["auto", "fp32", "fp16", "int8"]

CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"

# x86 flags of Linux for multiply-and-add of 8-bit integers. Without them int8 kernels add up in
# 16 bits, which is no faster and can saturate.
_INT8_FLAGS: Final = {"avx512_vnni", "avx_vnni"}


class ModelMetadata(Protocol):
    """What ``InferenceSession.get_modelmeta()`` returns, as far as it is read here."""

    @property
    def custom_metadata_map(self) -> Mapping[str, str]:
        """The graph's ``metadata_props``."""


class InferenceSession(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that is used here; tests pass their own."""

    def get_inputs(self) -> Sequence[TensorInfo]:
        """The graph's inputs."""

    def get_outputs(self) -> Sequence[TensorInfo]:
        """The graph's outputs."""

    def get_modelmeta(self) -> ModelMetadata:
        """The graph's metadata."""

    def get_providers(self) -> Sequence[str]:
        """The execution providers in use, the preferred one first."""

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]
    ) -> Sequence[Any]:
        """Run the graph on arrays by input name; returns one array for each output name."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded artefact: session, contract and manifest, checked against each other.

    ``file_name`` is the network file in the artefact folder, ``provider`` ONNX Runtime's name of
    the execution provider that runs it. ``session`` runs on all threads; ``shares`` are none or
    two sessions with half of them each, for two runs at once.
    """

    session: InferenceSession
    shares: tuple[InferenceSession, ...]
    contract: ModelContract
    manifest: Manifest
    file_name: str
    provider: str

    def run(
        self, batch: npt.NDArray[np.uint8], session: InferenceSession | None = None
    ) -> npt.NDArray[np.float32]:
        """Run the network, blocking, on ``session`` (None: on all threads).

        ``batch``: ``(N, h, w, 3) uint8`` RGB, h and w multiples of 32. Returns logits
        ``(N, 21, h/stride, w/stride) float32``. Raises whatever ONNX Runtime raises.
        """
        (logits,) = (session or self.session).run([OUTPUT_NAME], {INPUT_NAME: batch})
        result: npt.NDArray[np.float32] = logits
        return result

    def warm_up(self, batch_size: int = 1) -> None:
        """Run every session on every listed shape, so that no request pays for allocations.

        Raises `ContractError` if the logits are not of the size that the contract's stride says.
        """
        stride, classes = self.contract.stride, len(self.contract.classes)
        sessions = {id(session): session for session in (self.session, *self.shares)}
        for session, (height, width) in product(sessions.values(), self.contract.shapes):
            image = np.zeros((batch_size, height, width, 3), dtype=np.uint8)
            logits = self.run(image, session)
            wanted = (batch_size, classes, height // stride, width // stride)
            if logits.shape != wanted:
                raise ContractError(
                    f"{self.file_name}: stride {stride} makes logits {list(wanted)} of a "
                    f"{height}x{width} image, but the graph gives {list(logits.shape)}"
                )


def load_model(
    folder: Path,
    device: Device = "auto",
    threads: int | None = None,
    session: InferenceSession | None = None,
    precision: PrecisionChoice = "auto",
) -> Model:
    """Load an artefact folder: sha256 first, then the graph, then the contract against both.

    ``threads`` are the CPU threads of one run (None: the cores this process may use);
    ``precision`` says which of the artefact's networks runs (auto: what the device is fastest
    with). A given ``session`` takes the place of ONNX Runtime's; everything else is checked all
    the same.

    Raises `ArtefactError` or `DeviceUnavailable`, with one line that says what differs.
    """
    manifest = load_manifest(folder)
    provider = _choose_provider(device)
    file_name = manifest.pick_file(_preference(provider, precision))
    # All of them: an int8 network reads its weights out of the fp32 file.
    verify_files(folder, manifest)
    shares: tuple[InferenceSession, ...] = ()
    if session is None:
        path, threads = folder / file_name, threads or available_cores()
        session = _open(path, provider, threads)
        # ONNX Runtime falls back to the CPU silently; only the session knows what it runs on.
        if provider not in session.get_providers():
            if device != "auto":
                raise DeviceUnavailable(
                    f"device {device} was asked for, but ONNX Runtime fell back to "
                    f"{', '.join(session.get_providers())}"
                )
            provider = CPU_PROVIDER
        if provider == CPU_PROVIDER and threads > 1:
            # A session with one thread works in its callers' own: one serves both.
            share = _open(path, provider, threads // 2)
            shares = (share, share if threads < 4 else _open(path, provider, threads // 2))
    try:
        contract = ModelContract.from_metadata(session.get_modelmeta().custom_metadata_map)
        contract.check_graph(session.get_inputs(), session.get_outputs())
        manifest.check_contract(contract, file_name)
    except ContractError as exc:
        raise ContractError(f"{folder / file_name}: {exc}") from exc
    return Model(session, shares, contract, manifest, file_name, provider)


def available_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPU cores that this process may use, which is not all cores in a container.

    The least of its affinity and, rounded up, its CPU quota: more threads than that would be
    throttled in the middle of a run. Source of ``cpu_max``: Linux, ``cgroup-v2.rst``.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        cores = os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such control group, or "max": no quota
        return cores


def _preference(provider: str, precision: PrecisionChoice) -> tuple[Precision, ...]:
    if precision != "auto":
        return (precision,)
    if provider == CPU_PROVIDER and _int8_is_fast():
        return ("int8", "fp32", "fp16")
    return ("fp32", "fp16", "int8")


def _int8_is_fast() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # only Linux has it; elsewhere int8 has not been measured
        return False
    return not _INT8_FLAGS.isdisjoint(flags)


def _choose_provider(device: Device) -> str:
    if device == "cpu":
        return CPU_PROVIDER
    if CUDA_PROVIDER in ort.get_available_providers():
        # The gpu extra's CUDA and cuDNN live in site-packages, where the loader does not look.
        ort.preload_dlls()
        return CUDA_PROVIDER
    if device == "cuda":
        raise DeviceUnavailable(
            "device cuda was asked for, but this ONNX Runtime offers only "
            f"{', '.join(ort.get_available_providers())}"
        )
    return CPU_PROVIDER


def _open(path: Path, provider: str, threads: int) -> InferenceSession:
    options = ort.SessionOptions()
    # All else is ONNX Runtime's default, because nothing else was better where it was measured:
    # spinning saves 6 % of a run alone, the arena and its patterns 2 % without growing with the
    # variety of shapes, and a graph that was optimised beforehand would save 0.7 s of the start
    # for a cache to keep.
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings about fused nodes help nobody here
    providers = [provider] if provider == CPU_PROVIDER else [provider, CPU_PROVIDER]
    try:
        opened: InferenceSession = ort.InferenceSession(
            str(path), sess_options=options, providers=providers
        )
    # ONNX Runtime's exceptions share no base below Exception; any of them means: not loadable.
    except Exception as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ArtefactError(f"{path}: ONNX Runtime cannot load it: {reason}") from exc
    return opened
