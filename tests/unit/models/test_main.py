"""The command line lists every stage and imports only the chosen one."""

import json
import pkgutil
import subprocess
import sys

import pytest

from models import stages
from models.__main__ import STAGES, main

SLOW = {"torch", "onnx", "onnxruntime", "onnxscript", "matplotlib", "scipy", "tensorboard"}
"""Packages that take a second or more to import."""

SCRIPT = """
import json, sys
from models.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps([*sys.modules]))
"""


def imported_by(*arguments: str) -> set[str]:
    """The modules that ``python -m models`` loads."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], check=True, capture_output=True, text=True
    )
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_help_lists_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """Each module of ``models.stages`` is a command with a line of help."""
    assert set(STAGES) == {module.name for module in pkgutil.iter_modules(stages.__path__)}
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, text in STAGES.items():
        assert f"{name} {text}" in printed


def test_help_imports_no_stage() -> None:
    """And neither PyTorch nor NumPy."""
    found = imported_by("--help")
    assert not found & (SLOW | {"numpy", "pydantic"})
    assert not [name for name in found if name.startswith("models.stages")]


@pytest.mark.parametrize("option", ["--help", f"--out={__file__}"])
def test_fetch_starts_without_slow_packages(option: str) -> None:
    """For its help, and when it refuses to overwrite a file."""
    found = imported_by("fetch", "resnet50", option)
    assert "models.stages.fetch" in found
    assert not found & (SLOW | {"pydantic"})


def test_a_stages_help_describes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """With its module's documentation and its options."""
    with pytest.raises(SystemExit) as stopped:
        main(["fetch", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python -m models fetch voc2012 --data VOCdevkit" in printed
    assert "--sha256" in printed


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """As a wrong argument; the message lists the stages."""
    with pytest.raises(SystemExit) as stopped:
        main(["serve"])
    assert stopped.value.code == 2
    assert "evaluate" in capsys.readouterr().err
