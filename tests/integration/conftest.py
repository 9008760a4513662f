"""The app in this process, for the API tests, and a server for other people's clients."""

from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from service.settings import Settings
from tests.artefacts import build_artefact
from tests.clients import CHECKS, InProcess, Server, drained, in_process, serving
from tests.described import as_described

CHECKS.append(as_described)


@pytest.fixture
async def client(make_settings: Callable[..., Settings]) -> AsyncIterator[InProcess]:
    """The app on the tiny artefact, with small caps."""
    async with in_process(make_settings(max_bytes=100_000, max_pixels=100_000)) as running:
        yield running


@pytest.fixture(scope="session")
def protocol_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process with two models, `tiny` the default and `second` beside it."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny", "second"):
        build_artefact(folder / name, name=name)
    with serving(folder / "tiny", max_pixels=1_000_000) as server, drained(server):
        yield server
