"""The app in this process, for the API tests."""

from collections.abc import AsyncIterator, Callable

import pytest

from service.settings import Settings
from tests.clients import InProcess, in_process


@pytest.fixture
async def client(make_settings: Callable[..., Settings]) -> AsyncIterator[InProcess]:
    """The app on the tiny artefact, with small caps."""
    async with in_process(make_settings(max_bytes=100_000, max_pixels=100_000)) as running:
        yield running
