"""The models that are served, each with the batcher that feeds it.

The default one is loaded at the start. The artefact folders beside it are loaded when somebody asks
for them, and closed again, the least recently used first, when all of them together take more
memory than they may. A reload opens each anew beside the old one, which serves until then, and on
where the new one is refused.
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
from service.inference.memory import give_back_freed

_log: Any = structlog.get_logger("service.engines")


def find_artefacts(folder: Path) -> dict[str, Path]:
    """The artefact folders beside ``folder``, by their models' names, in order.

    One that cannot be read is left out, and the log says so.
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
    """The default engine and those loaded on demand, within ``budget_bytes`` for the latter.

    ``folder`` is the default's artefact folder; those beside it are served too, unless the budget
    is 0. ``load`` opens one; ``on_reload`` hears of each reload whether it was taken. Belongs to
    one event loop.
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
        """All models' names, the default's first."""
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
        """Refuse what is new, and fail what waits for a device."""
        self._closing = True
        for engine in (*self.opened, *self._retiring):
            engine.batcher.abandon()

    def loaded(self, name: str | None) -> ServedModel | None:
        """The model of that name (None: the default) if it is in memory."""
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
        with engine.held():
            yield engine

    async def reload(self) -> None:
        """Take up anew what is in the folders of all loaded models, and which are beside them.

        A model that cannot be opened, would run elsewhere, or has a name that another has, is
        refused: the log says why, and the old one serves on. Otherwise the new one takes its place
        between two requests; whoever holds the old one is answered by it.
        """
        self._beside = await asyncio.to_thread(self._look_beside)
        for name in [*self._loaded]:
            try:
                async with self._loading:
                    await self._replace(name)
            # Whatever is wrong with it, the old one is there.
            except Exception as exc:  # noqa: BLE001
                unforeseen = not isinstance(exc, SegmentError)
                _log.error("reload refused", model=name, reason=str(exc), exc_info=unforeseen)
                self.on_reload(False)
            await self._retire_replaced()
            await asyncio.to_thread(give_back_freed)

    async def _replace(self, name: str) -> None:
        """Open an engine's folder again, and put what comes of it in its place."""
        engine = self._loaded.get(name)
        if engine is None:
            return  # closed meanwhile, for its memory
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
        # By its present name: a cluster's devices may take up another model.
        if name is None or name == self.default.model.contract.name:
            return self.default
        return self._loaded.get(name)

    async def close(self) -> None:
        """Refuse what is new, answer what was taken, and give up every engine."""
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
        except OSError:  # only Linux has it; elsewhere nothing is ever closed
            return 0
        return pages * mmap.PAGESIZE
