"""The served models, each with the batcher that feeds it.

The default model is loaded at the start. The models in the artefact folders beside it are loaded on
demand. When together they exceed the memory budget, the least recently used are closed first. A
reload opens each model a second time; the old one serves until the new one is ready, and continues
to serve if the new one is refused.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from service.artefact.manifest import MANIFEST_NAME, Manifest, load_manifest
from service.errors import (
    ArtefactError,
    ContractError,
    DeviceUnavailable,
    Draining,
    ModelUnavailable,
    SegmentError,
    UnknownModel,
)
from service.inference.engine import Engine, ServedModel
from service.system import give_back_freed

_log: Any = structlog.get_logger("service.engines")


def find_artefacts(folder: Path) -> dict[str, Path]:
    """Find the artefact folders beside ``folder``, by their models' names, in order.

    Unreadable folders are skipped with a warning in the log.
    """
    found: dict[str, Path] = {}
    own = folder.resolve()
    for manifest in sorted(own.parent.glob(f"*/{MANIFEST_NAME}")):
        if manifest.parent == own:
            continue
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
    """The default engine, and engines loaded on demand within ``budget_bytes``.

    ``folder`` is the default's artefact folder; the folders beside it are served too, unless the
    budget is 0. ``load`` opens a folder; ``on_reload`` is called after each reload with whether the
    new model was accepted. Belongs to one event loop.
    """

    default: Engine
    folder: Path
    load: Callable[[Path], Awaitable[Engine]]
    budget_bytes: int
    on_reload: Callable[[bool], None]
    _beside: Mapping[str, Path] = field(default_factory=dict, init=False)
    _loaded: dict[str, Engine] = field(default_factory=dict, init=False)
    _retiring: set[Engine] = field(default_factory=set, init=False)
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _uses: int = field(default=0, init=False)
    _closing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._loaded[self.default.model.contract.name] = self.default
        self._beside = self._look_beside()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all models, the default first."""
        default = self.default.model.contract.name
        return tuple(dict.fromkeys((default, *self._beside, *self._loaded)))

    @property
    def opened(self) -> tuple[Engine, ...]:
        """The engines in memory."""
        return tuple(self._loaded.values())

    @property
    def running_s(self) -> float:
        """Seconds that the oldest of all running batches has been running."""
        return max(one.batcher.running_s for one in (*self.opened, *self._retiring))

    def abandon(self) -> None:
        """Refuse new requests and fail all accepted ones."""
        self._closing = True
        for engine in (*self.opened, *self._retiring):
            engine.batcher.abandon()

    def loaded(self, name: str) -> ServedModel | None:
        """Return the model of that name if it is in memory."""
        engine = self._find(name)
        return engine.model if engine is not None else None

    def manifest(self, name: str) -> Manifest:
        """Return a model's manifest, loaded or not. Raises `UnknownModel`, `ModelUnavailable`."""
        engine = self._find(name)
        if engine is not None:
            return engine.model.manifest
        try:
            return load_manifest(self._folder(name))
        except ArtefactError as exc:
            raise ModelUnavailable(f"model {name} cannot be read") from exc

    @asynccontextmanager
    async def use(self, name: str | None = None) -> AsyncIterator[Engine]:
        """Hold the engine of a model (None: the default) and load it if necessary.

        Raises `UnknownModel`, `ModelUnavailable` or `Draining`.
        """
        engine = self._find(name)
        if engine is None:
            engine = await self._open(name or "")
        self._uses += 1
        engine.last_used = self._uses
        with engine.held():
            yield engine

    async def reload(self) -> None:
        """Reload all loaded models from their folders, and look for new folders beside them.

        A new model is refused if it cannot be opened, would run on another provider, or has the
        name of another model: the log states the reason and the old model continues to serve.
        Otherwise the new model replaces it between two requests; requests that hold the old model
        are answered by it.
        """
        self._beside = await asyncio.to_thread(self._look_beside)
        for name in [*self._loaded]:
            try:
                async with self._loading:
                    await self._replace(name)
            # Whatever is wrong with the new model, the old one can serve.
            except Exception as exc:  # noqa: BLE001
                unforeseen = not isinstance(exc, SegmentError)
                _log.error("reload refused", model=name, reason=str(exc), exc_info=unforeseen)
                self.on_reload(False)
            await self._retire_replaced()
            await asyncio.to_thread(give_back_freed)

    async def _replace(self, name: str) -> None:
        """Open an engine's folder again and replace the engine."""
        engine = self._loaded.get(name)
        if engine is None:
            return  # closed in the meantime to free memory
        before = self._memory()
        new = await self.load(self.folder if engine is self.default else self._folder(name))
        new.memory_bytes = max(0, self._memory() - before)
        contract = new.model.contract
        try:
            if new.model.provider != engine.model.provider:
                raise DeviceUnavailable(
                    f"it would run on {new.model.provider}, not on {engine.model.provider}"
                )
            if contract.name in self._loaded.keys() - {name}:
                raise ContractError(f"its name is {contract.name} now, which another has")
        except SegmentError:
            await new.batcher.close()
            raise
        del self._loaded[name]
        self._loaded[contract.name] = new
        self._retiring.add(engine)
        if engine is self.default:
            self.default = new
        _log.info("model replaced", model=contract.name, version=contract.version)
        self.on_reload(True)

    async def _retire_replaced(self) -> None:
        for engine in [*self._retiring]:
            await engine.retire()
            self._retiring.remove(engine)

    def _find(self, name: str | None) -> Engine | None:
        # By its present name: a cluster's devices may have reloaded another model.
        if name is None or name == self.default.model.contract.name:
            return self.default
        return self._loaded.get(name)

    async def close(self) -> None:
        """Refuse new requests, answer all accepted ones, and close every engine."""
        self._closing = True
        async with self._loading:
            for engine in (*self.opened, *self._retiring):
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
        """Close the least recently used engines; never the default, the newest or one in use."""
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
            await asyncio.to_thread(give_back_freed)

    def _extra_bytes(self) -> int:
        return sum(one.memory_bytes for one in self._loaded.values() if one is not self.default)

    def _look_beside(self) -> Mapping[str, Path]:
        return find_artefacts(self.folder) if self.budget_bytes else {}

    def _folder(self, name: str) -> Path:
        if name not in self._beside:
            raise UnknownModel(f"no model {name!r}; there are {', '.join(self.names)}")
        return self._beside[name]

    def _memory(self) -> int:
        """Bytes in use on the default model's device: the GPU's memory, or this process's."""
        gpu = self.default.model.gpu
        if gpu is not None:
            free, total = gpu.memory()
            return total - free
        try:
            # Source: Linux, proc_pid_statm(5): the second is the resident set, in pages.
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        except OSError:  # only Linux has it; elsewhere no model is closed
            return 0
        return pages * mmap.PAGESIZE
