"""Schemathesis against a server process, with requests that OpenAPI allows and forbids.

It runs all checks (see `tests/schemathesis.toml`) in its only phase without random examples. To
run all phases::

    schemathesis --config-file tests/schemathesis.toml run http://localhost:8000/openapi.json
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.access import new_key
from tests.artefacts import build_artefact
from tests.processes import Logged, logged

CONFIG = Path(__file__).parents[1] / "schemathesis.toml"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Logged, str]]:
    """A server that needs a key, and the key."""
    key, line = new_key("schemathesis")
    keys = tmp_path / "api_keys"
    keys.write_text(line)
    model = build_artefact(tmp_path / "tiny")
    with logged(model, api_keys_file=keys, threads=1, max_pixels=1_000_000) as running:
        yield running, key


def test_schemathesis_finds_nothing(server: tuple[Logged, str], tmp_path: Path) -> None:
    """It tests the limits of each constraint, other methods, and missing and wrong keys."""
    running, key = server
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG),
            *("run", f"{running.url}/openapi.json", "--header", f"Authorization: Bearer {key}"),
            *("--checks", "all", "--phases", "coverage", "--seed", "7", "--no-color"),
            *("--continue-on-failure", "--workers", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    paths = httpx.get(f"{running.url}/openapi.json").json()["paths"]
    operations = sum(len(methods) for methods in paths.values())
    assert re.search(rf"Tested: +{operations}\n", done.stdout), done.stdout
