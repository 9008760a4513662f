"""The artefact's network on its device: the only importer of ONNX Runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from service.artefact.contract import (
    INPUT_NAME,
    OUTPUT_NAME,
    ModelContract,
    Precision,
    Shape,
    TensorInfo,
)
from service.artefact.manifest import Manifest, load_manifest, read_files
from service.errors import (
    ArtefactError,
    ContractError,
    DeviceUnavailable,
)
from service.inference import providers
from service.inference.cuda import CudaDevice, first_line, memory_errors
from service.system import available_cores

PrecisionChoice = Literal["auto", "fp32", "fp16", "int8"]
ProviderChoice = Literal["cuda", "tensorrt"]

# Linux's names of the x86 features that multiply and add 8-bit integers. Without them int8 kernels
# add in 16 bits, which is no faster and can saturate.
_INT8_FLAGS: Final = {"avx512_vnni", "avx_vnni"}

# ONNX Runtime has no exception class for this; its messages contain one of these.
_OUT_OF_MEMORY: Final = ("Failed to allocate memory", "out of memory", "OUT_OF_MEMORY")


class ModelMetadata(Protocol):
    """The part of ``InferenceSession.get_modelmeta()`` that is used here."""

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
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,  # noqa: ANN401
    ) -> Sequence[Any]:
        """Run the graph on arrays by input name; returns one array for each output name."""

    def io_binding(self) -> Any:  # noqa: ANN401
        """Return ONNX Runtime's ``IOBinding``, which binds the caller's buffers."""

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:  # noqa: ANN401
        """Run the graph on the bound buffers."""


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How a GPU is used; a CPU ignores all of it.

    ``provider``: the execution provider; ``graphs``: whether the listed shapes are captured as CUDA
    graphs; ``max_batch``: the largest batch; ``cache``: folder for TensorRT's engines;
    ``memory_bytes``: limit for the network's activations, 0 for none.
    """

    provider: ProviderChoice = "cuda"
    graphs: bool = True
    max_batch: int = 1
    cache: Path | None = None
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded artefact: session, contract and manifest, checked against each other.

    ``file_name`` is the network file in the artefact folder; ``provider`` is ONNX Runtime's name of
    the execution provider that runs it. ``session`` runs on all threads; ``shares`` is empty or has
    two sessions with half the threads each, for two runs at once. ``gpu`` is None on a CPU; ``why``
    is then the reason, unless the CPU was asked for.
    """

    session: InferenceSession
    shares: tuple[InferenceSession, ...]
    contract: ModelContract
    manifest: Manifest
    file_name: str
    provider: str
    gpu: CudaDevice | None = None
    why: str | None = None

    def run(
        self, batch: npt.NDArray[np.uint8], session: InferenceSession | None = None
    ) -> npt.NDArray[np.float32]:
        """Run the network, blocking, on ``session`` (None: on all threads).

        ``batch``: ``(N, h, w, 3) uint8`` RGB, h and w multiples of 32. Returns logits
        ``(N, C, h/stride, w/stride) float32``. Raises `DeviceMemoryExhausted` or ONNX Runtime's
        errors.
        """
        with memory_errors(*_OUT_OF_MEMORY):
            (logits,) = (session or self.session).run(
                [OUTPUT_NAME], {INPUT_NAME: batch}, self._run_options(batch.shape[1:3])
            )
        result: npt.NDArray[np.float32] = logits
        return result

    def _run_options(self, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
        """ONNX Runtime's options for a run on a padded shape; None for its defaults.

        Its allocator keeps what the largest run took. After a shape that is not listed it returns
        that: few photos have one. Source: ``onnxruntime_run_options_config_keys.h``.
        """
        if self.gpu is not None or shape in self.contract.shapes:
            return None
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def bind(
        self, input_address: int, logits_address: int, batch_size: int, shape: Shape, graph: int
    ) -> Callable[[], None]:
        """Return a function that runs the network on the caller's buffers.

        ``input_address``: address of ``(batch_size, *shape, 3) uint8``; ``logits_address``: address
        of ``(batch_size, C, h/stride, w/stride) float32``; both in the memory of the model's
        device. On a GPU the run is queued on its compute stream and the function returns at once.
        ``graph`` is the CUDA graph to capture or replay, -1 for none. The function raises
        `DeviceMemoryExhausted` or ONNX Runtime's errors.
        """
        device = ("cpu", 0) if self.gpu is None else (self.gpu.kind, self.gpu.ordinal)
        binding = self.session.io_binding()
        binding.bind_input(INPUT_NAME, *device, np.uint8, (batch_size, *shape, 3), input_address)
        grid = (side // self.contract.stride for side in shape)
        logits_shape = (batch_size, len(self.contract.classes), *grid)
        binding.bind_output(OUTPUT_NAME, *device, np.float32, logits_shape, logits_address)
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        # No wait here: the caller waits for the commands that it queues after the run.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def run() -> None:
            with memory_errors(*_OUT_OF_MEMORY):
                self.session.run_with_iobinding(binding, options)

        return run

    def warm_up(self, batch_size: int = 1) -> None:
        """Run every session on every listed shape, so that no request has to allocate memory.

        Raises `ContractError` if the logits do not have the size given by the contract's stride.
        """
        stride, classes = self.contract.stride, len(self.contract.classes)
        sessions = {id(session): session for session in (self.session, *self.shares)}
        # From a shape's second run on, ONNX Runtime allocates its memory in one piece. The largest
        # piece is allocated here; otherwise memory would grow at some later request.
        shapes = (*self.contract.shapes, self.contract.shapes[-1])
        for session, (height, width) in product(sessions.values(), shapes):
            image = np.zeros((batch_size, height, width, 3), dtype=np.uint8)
            logits = self.run(image, session)
            wanted = (batch_size, classes, height // stride, width // stride)
            if logits.shape != wanted:
                raise ContractError(
                    f"{self.file_name}: stride {stride} makes logits {list(wanted)} of a "
                    f"{height}x{width} image, but the graph gives {list(logits.shape)}"
                )


@dataclass(frozen=True, slots=True)
class _NetworkFile:
    """A network to open: its path (a name only), and the contents of the artefact's ``files``."""

    path: Path
    files: Mapping[str, bytes]


def load_model(
    folder: Path,
    device: str = "auto",
    threads: int | None = None,
    session: InferenceSession | None = None,
    precision: PrecisionChoice = "auto",
    options: DeviceOptions | None = None,
) -> Model:
    """Load an artefact folder: sha256 first, then the graph, then the contract against both.

    ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``threads``: the CPU threads of one run
    (None: the cores that this process may use); ``precision``: which of the artefact's networks
    runs (auto: the fastest on the device). A given ``session`` replaces ONNX Runtime's; everything
    else is checked as usual.

    Raises `ArtefactError` or `DeviceUnavailable` with one line that states what is wrong.
    """
    manifest = load_manifest(folder)
    # All files: an int8 network reads its weights from the fp32 file.
    files = read_files(folder, manifest)
    gpu, why = None, None
    shares: tuple[InferenceSession, ...] = ()
    if session is None and device != "cpu":
        try:
            gpu = CudaDevice(int(device.partition(":")[2] or 0))
            file_name = manifest.pick_file(_preference(gpu, precision))
            session = _open_on_gpu(
                _NetworkFile(folder / file_name, files),
                gpu,
                manifest.files[file_name].precision,
                options,
            )
        except DeviceUnavailable as exc:
            if device != "auto":
                raise DeviceUnavailable(f"device {device} was asked for, but {exc}") from exc
            gpu, why = None, str(exc)
    if gpu is None:
        file_name = manifest.pick_file(_preference(None, precision))
    if session is None:
        session, shares = _open_on_cpu(
            _NetworkFile(folder / file_name, files), threads or available_cores()
        )
    provider = session.get_providers()[0]
    path = folder / file_name
    try:
        contract = ModelContract.from_metadata(session.get_modelmeta().custom_metadata_map)
        contract.check_graph(session.get_inputs(), session.get_outputs())
        manifest.check_contract(contract, file_name)
    except ContractError as exc:
        raise ContractError(f"{path}: {exc}") from exc
    return Model(session, shares, contract, manifest, file_name, provider, gpu, why)


def _preference(gpu: CudaDevice | None, precision: PrecisionChoice) -> tuple[Precision, ...]:
    if precision != "auto":
        return (precision,)
    if gpu is None:
        return ("int8", "fp32", "fp16") if _int8_is_fast() else ("fp32", "fp16", "int8")
    return ("fp16", "fp32", "int8") if gpu.has_tensor_cores else ("fp32", "fp16", "int8")


def _int8_is_fast() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # only Linux has it; elsewhere int8 has not been measured
        return False
    return not _INT8_FLAGS.isdisjoint(flags)


def _open_on_cpu(
    network: _NetworkFile, threads: int
) -> tuple[InferenceSession, tuple[InferenceSession, ...]]:
    """Open a session with all threads, and the shares with half of them each."""

    def opened(threads: int) -> InferenceSession:
        return _open(network, _session_options(threads), [providers.CPU])

    session = opened(threads)
    if threads == 1:
        return session, ()
    share = opened(threads // 2)
    # A session with one thread runs in the caller's thread, so one session serves as both shares.
    return session, (share, share if threads < 4 else opened(threads // 2))


def _open_on_gpu(
    network: _NetworkFile, gpu: CudaDevice, precision: Precision, options: DeviceOptions | None
) -> InferenceSession:
    """Open a session with every node on the GPU. Raises `DeviceUnavailable` if one is not."""
    options = options or DeviceOptions()
    wanted = providers.TENSORRT if options.provider == "tensorrt" else providers.CUDA
    if wanted not in ort.get_available_providers():
        raise DeviceUnavailable(
            f"this ONNX Runtime offers only {', '.join(ort.get_available_providers())}"
        )
    # The gpu extra's CUDA and cuDNN are in site-packages, where the loader does not look.
    ort.preload_dlls()
    cuda = providers.cuda(
        gpu.ordinal,
        gpu.compute_handle,
        precision=precision,
        graphs=options.graphs and wanted == providers.CUDA,
        memory_bytes=options.memory_bytes,
    )
    chosen = [cuda]
    if wanted == providers.TENSORRT:
        # TensorRT needs its profile before the graph is opened.
        unopened = _open(network, _session_options(1), [providers.CPU])
        metadata = unopened.get_modelmeta().custom_metadata_map
        tensorrt = providers.tensorrt(
            gpu.ordinal,
            gpu.compute_handle,
            precision=precision,
            shapes=ModelContract.from_metadata(metadata).shapes,
            max_batch=options.max_batch,
            cache=options.cache,
        )
        chosen.insert(0, tensorrt)
    settings = _session_options(1)
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = _open(network, settings, chosen)
    except ArtefactError as exc:  # a broken artefact fails again on the CPU
        raise DeviceUnavailable(str(exc)) from exc
    # Without the provider's library ONNX Runtime falls back to the CPU; only the session shows it.
    if wanted not in session.get_providers():
        raise DeviceUnavailable(
            f"ONNX Runtime fell back to {', '.join(session.get_providers())}: {_why_not(wanted)}"
        )
    _refuse_cpu_nodes(network.path, session)
    return session


def _why_not(provider: str) -> str:
    """Find out why ONNX Runtime could not load a provider's library; it only logs the reason."""
    name = provider.removesuffix("ExecutionProvider").lower()
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / f"capi/libonnxruntime_providers_{name}.so"))
    except OSError as exc:
        return str(exc)
    return "its log says why"


def _refuse_cpu_nodes(path: Path, session: Any) -> None:  # noqa: ANN401
    """Raise `DeviceUnavailable` if a node of the network would run on the CPU.

    Each such node costs two copies and a wait in every run, and prevents capturing.
    """
    left = [
        f"{node.op_type} {node.name}".rstrip()
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == providers.CPU
        for node in part.get_nodes()
    ]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise DeviceUnavailable(
            f"{path}: the GPU's provider leaves to the CPU {', '.join(left[:3])}{more}"
        )


def _session_options(threads: int) -> Any:  # noqa: ANN401
    options = ort.SessionOptions()
    # Everything else is ONNX Runtime's default, because no alternative measured better. Spinning
    # saves 6 % of a run alone. The arena and its patterns save 2 % and do not grow with the variety
    # of shapes. A graph optimised in advance would save 0.7 s at the start but needs a cache.
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only; warnings about fused nodes are of no use here
    return options


def _open(network: _NetworkFile, options: Any, chosen: Sequence[Any]) -> InferenceSession:  # noqa: ANN401
    names, contents = zip(*network.files.items(), strict=True)
    try:
        # Given paths, ONNX Runtime would map the weights into memory, and a file truncated later
        # would end the process with SIGBUS.
        options.add_external_initializers_from_files_in_memory(
            names, contents, [len(content) for content in contents]
        )
        opened: InferenceSession = ort.InferenceSession(
            network.files[network.path.name],
            sess_options=options,
            providers=list(chosen),
            # With fallback, a provider that cannot start is printed and replaced by the CPU.
            enable_fallback=False,
        )
    # ONNX Runtime's exceptions share no base below Exception; any of them means: not loadable.
    except Exception as exc:
        raise ArtefactError(
            f"{network.path}: ONNX Runtime cannot load it: {first_line(exc)}"
        ) from exc
    return opened
