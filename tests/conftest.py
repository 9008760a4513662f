"""Shared by all tests: markers by folder, and an artefact with a tiny network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.settings import ENV_PREFIX, Settings
from tests.artefacts import build_artefact

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if (TESTS / folder).is_dir():
            item.add_marker(folder)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the service's settings from the environment."""
    for variable in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(variable)


@pytest.fixture(scope="session")
def tiny_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact folder whose network labels each cell with its nearest VOC colour."""
    return build_artefact(tmp_path_factory.mktemp("artefacts") / "tiny")


@pytest.fixture
def make_settings(tiny_artefact: Path) -> Callable[..., Settings]:
    """A function that makes settings for the tiny artefact; keyword arguments override them."""

    def make(**changes: object) -> Settings:
        fixed: dict[str, Any] = {"model": tiny_artefact, "threads": 1, "decode_workers": 1}
        return Settings(**{**fixed, **changes})

    return make
