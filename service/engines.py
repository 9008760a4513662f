"""The models that are served, each with the batcher that feeds it.

The default one is loaded at the start. The artefact folders beside it are loaded when somebody asks
for them, and closed again, the least recently used first, when all of them together take more
memory than they may.
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from service.batcher import Answer, Batcher
from service.contract import ModelContract
from service.cuda import CudaDevice
from service.errors import ArtefactError, Draining, ModelUnavailable, SegmentError, UnknownModel
from service.lanes import Lane, Task, Upsampled
from service.manifest import MANIFEST_NAME, Manifest, load_manifest
from service.metrics import Metrics
from service.session import DeviceOptions, InferenceSession, Model, load_model
from service.settings import Settings

_log: Any = structlog.get_logger("service.engines")

Logits = npt.NDArray[np.float32]
Output = Logits | Upsampled
"""What a device makes of a photo: a CPU its logits, which the pool upsamples; a GPU the labels."""

LANES: Final = 2
"""Batches on a GPU at once: one computes while the other comes and goes."""

GPU_BATCH: Final = 16
GPU_QUEUE: Final = 256
CPU_QUEUE: Final = 64
"""Defaults of the settings that depend on the device."""


class ServedModel(Protocol):
    """What is told of a model, wherever it runs; here that is a `service.session.Model`."""

    @property
    def contract(self) -> ModelContract:
        """What it promises."""

    @property
    def manifest(self) -> Manifest:
        """What its folder says."""

    @property
    def file_name(self) -> str:
        """The network file."""

    @property
    def provider(self) -> str:
        """What runs it."""

    @property
    def gpu(self) -> CudaDevice | None:
        """This process's GPU that it runs on."""


class Queue(Protocol):
    """The way to a device; here that is a `service.batcher.Batcher`, which says all about it."""

    @property
    def waiting(self) -> int:
        """Photos that wait in this process."""

    @property
    def capacity(self) -> int:
        """Photos that the device works on at once."""

    def retry_after_s(self) -> float:
        """When it should have moved."""

    async def submit(self, item: Task, key: Hashable) -> Answer[Output]:
        """Queue a photo and wait for its result."""

    async def close(self) -> None:
        """Refuse what is new, and answer what was taken."""


@dataclass(eq=False)
class Engine:
    """A model that is ready, and the way to its device.

    ``memory_bytes`` is what loading it took; ``users`` are the requests that hold it, and
    ``last_used`` counts up from one request to the next, over all engines.
    """

    model: ServedModel
    batcher: Queue
    memory_bytes: int = 0
    users: int = 0
    last_used: int = 0


async def open_engine(
    settings: Settings,
    metrics: Metrics,
    folder: Path,
    session: InferenceSession | None = None,
) -> Engine:
    """Load, check and warm up an artefact folder.

    Raises `ArtefactError` or `DeviceUnavailable`, with one line that says what differs.
    """
    max_batch = settings.max_batch or GPU_BATCH
    options = DeviceOptions(
        provider=settings.provider,
        graphs=settings.cuda_graphs,
        max_batch=max_batch,
        cache=settings.cache_dir,
        memory_bytes=settings.gpu_memory_mb * 2**20,
    )
    model = await asyncio.to_thread(
        load_model,
        folder,
        settings.device,
        settings.threads,
        session,
        settings.precision,
        options,
    )
    queue_size = settings.queue_size or (CPU_QUEUE if model.gpu is None else GPU_QUEUE)
    make_batcher = partial(
        Batcher[Task, Output],
        max_wait_s=settings.max_wait_ms / 1000,
        max_queue=queue_size,
        on_batch=metrics.batch,
    )
    if model.gpu is None:
        await asyncio.to_thread(model.warm_up)
        batcher = make_batcher(
            partial(run_batch, model, model.session),
            shares=[partial(run_batch, model, share) for share in model.shares],
            max_batch=settings.max_batch or 1,
        )
    else:
        lanes = await asyncio.to_thread(_open_lanes, model, model.gpu, settings, max_batch)
        batcher = make_batcher(None, shares=[lane.run for lane in lanes], max_batch=max_batch)
        for lane in lanes:
            await batcher.call_beside(lane.run, lane.warm_up)
    _log.info("model ready", **_describe(model))
    return Engine(model, batcher)


def run_batch(model: Model, session: InferenceSession, tasks: Sequence[Task]) -> Sequence[Output]:
    """The batcher's work on a CPU: stack images of one shape, run them, unstack.

    Returns one ``(C, h/stride, w/stride) float32`` array of logits for each image.
    """
    images = [task.image for task in tasks]
    batch = images[0][None] if len(images) == 1 else np.stack(images)
    return list(model.run(batch, session))


def find_artefacts(folder: Path) -> dict[str, Path]:
    """The artefact folders in ``folder``, by their models' names, in order.

    One that cannot be read is left out, and the log says so.
    """
    found: dict[str, Path] = {}
    for manifest in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        try:
            name = load_manifest(manifest.parent).name
        except ArtefactError as exc:
            _log.warning("artefact left out", reason=str(exc))
            continue
        if name in found:
            _log.warning("artefact left out", reason=f"{manifest.parent}: another is named {name}")
            continue
        found[name] = manifest.parent
    return found


@dataclass(eq=False)
class Engines:
    """The default engine and those loaded on demand, within ``budget_bytes`` for the latter.

    ``folders`` are the artefact folders by name, the default's among them; ``load`` opens one.
    Belongs to one event loop.
    """

    default: Engine
    folders: Mapping[str, Path]
    load: Callable[[Path], Awaitable[Engine]]
    budget_bytes: int
    _loaded: dict[str, Engine] = field(default_factory=dict, init=False)
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _uses: int = field(default=0, init=False)
    _closing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._loaded[self.default.model.contract.name] = self.default

    @property
    def names(self) -> tuple[str, ...]:
        """All models' names, the default's first."""
        default = self.default.model.contract.name
        return (default, *(name for name in self.folders if name != default))

    @property
    def opened(self) -> tuple[Engine, ...]:
        """The engines in memory."""
        return tuple(self._loaded.values())

    def loaded(self, name: str) -> ServedModel | None:
        """The model of that name if it is in memory."""
        engine = self._find(name)
        return engine.model if engine is not None else None

    def manifest(self, name: str) -> Manifest:
        """The manifest of a model, loaded or not. Raises `UnknownModel`, `ModelUnavailable`."""
        engine = self._find(name)
        if engine is not None:
            return engine.model.manifest
        try:
            return load_manifest(self._folder(name))
        except ArtefactError as exc:
            raise ModelUnavailable(f"model {name} cannot be read") from exc

    @asynccontextmanager
    async def use(self, name: str | None = None) -> AsyncIterator[Engine]:
        """Hold the engine of a model (None: the default), loading it if need be.

        Raises `UnknownModel`, `ModelUnavailable` or `Draining`.
        """
        engine = self._find(name)
        if engine is None:
            engine = await self._open(name or "")
        self._uses += 1
        engine.last_used = self._uses
        engine.users += 1
        try:
            yield engine
        finally:
            engine.users -= 1

    def _find(self, name: str | None) -> Engine | None:
        # By its present name: a cluster's devices may take up another model.
        if name is None or name == self.default.model.contract.name:
            return self.default
        return self._loaded.get(name)

    async def close(self) -> None:
        """Refuse what is new, answer what was taken, and give up every engine."""
        self._closing = True
        async with self._loading:
            for engine in self._loaded.values():
                await engine.batcher.close()

    async def _open(self, name: str) -> Engine:
        folder = self._folder(name)
        async with self._loading:
            if self._closing:
                raise Draining("the service is shutting down")
            if name not in self._loaded:
                before = self._memory()
                try:
                    engine = await self.load(folder)
                except SegmentError as exc:
                    _log.warning("model unavailable", model=name, reason=str(exc))
                    raise ModelUnavailable(f"model {name} cannot be loaded") from exc
                engine.memory_bytes = max(0, self._memory() - before)
                self._loaded[name] = engine
                await self._keep_to_the_budget(engine)
            return self._loaded[name]

    async def _keep_to_the_budget(self, newest: Engine) -> None:
        """Close what was not used for longest; never the default, what is in use, or the newest."""
        idle = sorted(
            (
                (engine.last_used, name)
                for name, engine in self._loaded.items()
                if engine not in (self.default, newest) and not engine.users
            ),
        )
        for _, name in idle:
            if self._extra_bytes() <= self.budget_bytes:
                return
            _log.info("model closed", model=name)
            await self._loaded.pop(name).batcher.close()

    def _extra_bytes(self) -> int:
        return sum(one.memory_bytes for one in self._loaded.values() if one is not self.default)

    def _folder(self, name: str) -> Path:
        if name not in self.folders:
            raise UnknownModel(f"no model {name!r}; there are {', '.join(self.names)}")
        return self.folders[name]

    def _memory(self) -> int:
        """Bytes in use on the default model's device: the GPU's memory, or this process's."""
        gpu = self.default.model.gpu
        if gpu is not None:
            free, total = gpu.memory()
            return total - free
        try:
            # Source: Linux, proc_pid_statm(5): the second is the resident set, in pages.
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        except OSError:  # only Linux has it; elsewhere nothing is ever closed
            return 0
        return pages * mmap.PAGESIZE


def _open_lanes(model: Model, gpu: CudaDevice, settings: Settings, max_batch: int) -> list[Lane]:
    """The ways through a GPU, not warm yet."""
    lock = threading.Lock()
    return [
        Lane(
            number,
            gpu.open_channel,
            model,
            model.contract,
            max_batch=max_batch,
            max_side=settings.max_side,
            graphs=settings.cuda_graphs and settings.provider == "cuda",
            lock=lock,
        )
        for number in range(LANES)
    ]


def _describe(model: Model) -> dict[str, Any]:
    """What the log says of a model that is ready."""
    facts: dict[str, Any] = {
        "model": f"{model.contract.name}/{model.contract.version}",
        "file": model.file_name,
        "provider": model.provider,
    }
    if model.gpu is not None:
        free, total = model.gpu.memory()
        facts |= {"gpu": model.gpu.name, "gpu_memory_mb": f"{(total - free) >> 20}/{total >> 20}"}
    if model.why is not None:
        facts["no_gpu"] = model.why
    return facts
