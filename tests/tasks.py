"""Tasks of image workers that behave badly, for the tests of their pool.

A worker imports this module, so it imports no test library.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from service.artefact.contract import ModelContract
from service.errors import UndecodableImage
from service.images.encoding import encode_image
from service.jobs.base import Grant, NeedsMemory, Reading, Written
from service.jobs.open_inference import InferenceJob
from service.jobs.view import ViewJob
from service.views import Options, Scene
from service.workers import worker
from service.workers.worker import Answer


@dataclass(frozen=True)
class Echo:
    """Returns its parts, the worker's process id, and how many threads it has."""

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        threads = len([*Path("/proc/self/task").iterdir()])
        return Answer({"pid": os.getpid(), "threads": threads}, parts)


@dataclass(frozen=True)
class Inspect:
    """Reports the worker's modules, environment and open sockets."""

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        sockets = sum(link.startswith("socket:") for link in links)
        return Answer(
            {"modules": sorted(sys.modules), "environment": sorted(os.environ), "sockets": sockets}
        )


@dataclass(frozen=True)
class Spin:
    """Uses CPU time without end."""

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        while True:
            sum(range(10_000))


@dataclass(frozen=True)
class Wait:
    """Waits until the file ``until`` exists, in vain if there is none."""

    until: Path | None = None

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        while self.until is None or not self.until.exists():
            time.sleep(0.005)
        return Answer({}, parts)


@dataclass(frozen=True)
class HangUp:
    """Closes the worker's socket, and stays."""

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        os.closerange(3, 64)
        while True:
            time.sleep(1)


@dataclass(frozen=True)
class Allocate:
    """Takes memory."""

    size: int

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        return Answer({"sum": int(np.ones(self.size, dtype=np.uint8).sum(dtype=np.int64))})


@dataclass(frozen=True)
class EncodeWebp:
    """Encodes a plain image of ``side`` pixels; libwebp says in its own way that memory ran out."""

    side: int

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        plain = np.broadcast_to(np.uint8(9), (self.side, self.side, 4))
        return Answer(parts=[encode_image(plain, "WEBP")])


@dataclass(frozen=True)
class End:
    """Ends the worker by a signal."""

    number: signal.Signals

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        os.kill(os.getpid(), self.number)
        return Answer()


@dataclass(frozen=True)
class EndOnce:
    """Ends the first worker that runs it, as an operator would; ``mark`` remembers that."""

    mark: Path

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Answer({}, parts)


@dataclass(frozen=True)
class Fail:
    """Raises an error of the service, or one that nobody foresaw."""

    foreseen: bool

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        if self.foreseen:
            raise UndecodableImage("broken on purpose")
        raise LookupError("nobody foresaw this")


@dataclass(frozen=True)
class HangingJob:
    """A photo whose decoder never returns."""

    model: None = None

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """See `service.jobs.base.Job`."""
        while True:
            time.sleep(0.01)

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """See `service.jobs.base.Job`."""


@dataclass(frozen=True)
class LargeJob:
    """A small photo that says it needs memory for ``pixels``."""

    pixels: int
    memory_bytes: int
    model: None = None

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """See `service.jobs.base.Job`."""
        if grant.memory_bytes < self.memory_bytes:
            raise NeedsMemory(self.memory_bytes, self.pixels)
        return ViewJob.of(Options()).read(body, grant, contract)

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """See `service.jobs.base.Job`."""


@dataclass(frozen=True)
class Lie:
    """Answers with any text as its facts, as a worker under a file's control might."""

    text: str
    parts: Sequence[bytes] = ()

    def run(self, parts: Sequence[bytes]) -> Answer:
        """See `service.workers.worker.Task`."""
        vars(worker)["json"] = SimpleNamespace(dumps=lambda _: self.text)
        return Answer({}, self.parts)


@dataclass(frozen=True)
class LyingJob:
    """A photo that says it ``needs`` odd memory or, if that is None, with odd facts at its end."""

    needs: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    model: None = None

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """See `service.jobs.base.Job`."""
        if self.needs is not None:
            raise NeedsMemory(self.needs, 0)
        reading = ViewJob.of(Options()).read(body, grant, contract)
        return replace(reading, writer=_LyingWriter(self.facts))

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """See `service.jobs.base.Job`."""
        InferenceJob("tiny", None, 0, 0).check(facts, size)


@dataclass(frozen=True)
class _LyingWriter:
    facts: Mapping[str, Any]
    needs_photo: bool = False

    def write(self, scene: Scene) -> Written:
        """See `service.jobs.base.Writer`."""
        return Written(b"answer", self.facts)
