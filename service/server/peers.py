"""The workers that share one port, found through a folder that their supervisor creates.

Each worker listens on a Unix socket in that folder, named after its number. It sends its metrics
as JSON to every connection. A socket that does not answer belongs to a worker that is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client.metrics_core import Metric

from service.telemetry.metrics import Families

# Far above the usual time, and below Prometheus's timeout of ten seconds for a scrape.
_PATIENCE_S: Final = 3.0


class WorkerPeers:
    """`service.telemetry.metrics.Peers` that are workers of one supervisor.

    ``folder``: where the sockets are, accessible to its owner only; ``number``: this worker's own.
    """

    label: Final = "worker"

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number

    @contextlib.asynccontextmanager
    async def answering(self, families: Callable[[], Awaitable[Families]]) -> AsyncIterator[None]:
        """Send this worker's ``families`` to each peer that asks."""

        async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(ConnectionError):
                writer.write(json.dumps(_to_json(await families())).encode())
                await writer.drain()

        # Replaces the socket of an earlier worker with this number.
        path = self._folder / f"{self._number}.sock"
        server = await asyncio.start_unix_server(send, path)
        async with server:
            yield

    async def gather(self) -> Mapping[str, Families | None]:
        """Ask all workers concurrently, this one included."""
        paths = sorted(self._folder.glob("*.sock"), key=lambda path: int(path.stem))
        answers = await asyncio.gather(*map(_ask, paths))
        return {path.stem: answer for path, answer in zip(paths, answers, strict=True)}


async def _ask(path: Path) -> Families | None:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                return _from_json(json.loads(await reader.read()))
    except (OSError, TimeoutError, json.JSONDecodeError):
        return None


def _to_json(families: Families) -> list[Any]:
    return [
        [
            [family.name, family.documentation, family.type],
            [[sample.name, sample.labels, sample.value] for sample in family.samples],
        ]
        for family in families
    ]


def _from_json(read: list[Any]) -> Families:
    families = []
    for description, samples in read:
        family = Metric(*description)
        for name, labels, value in samples:
            family.add_sample(name, labels, value)
        families.append(family)
    return families
