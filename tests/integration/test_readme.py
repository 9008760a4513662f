"""Run every example of the READMEs against a server."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from skimage import data

from service.settings import DEFAULT_MODEL
from tests.artefacts import encode
from tests.clients import Server, serving

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"{name}/README.md" for name in ("docker", "models", "service", "tests/benchmarks")),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]
ASTRONAUT: npt.NDArray[np.uint8] = data.astronaut()  # type: ignore[no-untyped-call]


def blocks(language: str) -> list[str]:
    """All fenced code blocks of a language."""
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    return [
        block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, re.S)
    ]


# A backslash continues a command on the next line.
CURLS = [
    line
    for block in blocks("sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("curl ")
]
PYTHONS = blocks("python")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The default model in int8, which is fast enough on any CPU."""
    with serving(DEFAULT_MODEL, threads=2, precision="int8", deadline_s=300) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory: a photo, and a .curlrc that makes HTTP errors fail."""
    (tmp_path / "photo.jpg").write_bytes(encode(ASTRONAUT, "JPEG", quality=90))
    (tmp_path / ".curlrc").write_text("fail\nsilent\nshow-error\n")
    return tmp_path


def run(arguments: list[str], folder: Path) -> None:
    """Run a command in the folder; the assertion shows its stderr if it fails."""
    done = subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, "CURL_HOME": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", CURLS)
def test_each_curl_command_succeeds(server: Server, folder: Path, command: str) -> None:
    """Its output files exist and are not empty."""
    run(
        ["bash", "-c", command.replace("localhost:8000", ":".join(map(str, server.address)))],
        folder,
    )
    for name in re.findall(r"-o (\S+)", command):
        assert (folder / name).stat().st_size > 0


@pytest.mark.parametrize("script", PYTHONS)
def test_each_python_example_runs(server: Server, folder: Path, script: str) -> None:
    """Each example runs with this project's packages and without warnings."""
    host, port = server.address
    script = script.replace("localhost:8000", f"{host}:{port}")
    run([sys.executable, "-W", "error", "-c", script], folder)


def test_links_of_the_pages_exist() -> None:
    """Relative links to files and pictures exist."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in link:
                assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_the_front_page_is_short() -> None:
    """README.md has fewer than 250 lines; longer texts have their own pages."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 250
