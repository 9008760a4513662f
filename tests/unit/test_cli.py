"""The command line's help and usage errors; tests/integration runs its commands."""

import hashlib
import subprocess
import sys

import pytest

from service import __version__
from service.cli.main import main
from service.settings import Settings


def test_every_setting_is_a_flag_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    """The help lists each setting with its description and variable."""
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} VALUE" in shown
        assert f"FCN_{name.upper()}" in shown
        assert field.description


@pytest.mark.parametrize("arguments", [[], ["predict"], ["predict", "x.jpg"], ["dance"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage is exit status 2 and the usage on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fcn-segment" in capsys.readouterr().err


def test_the_workers_command_is_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """The help lists three commands."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "{serve,predict,key}" in shown
    assert "worker" not in shown


def test_a_key_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    """The key file's line is on stdout, the key on stderr; each key is different."""
    shown = []
    for _ in range(2):
        assert main(["key", "alice"]) == 0
        shown.append(capsys.readouterr())
    keys = [one.err.strip() for one in shown]
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    assert [one.out for one in shown] == [f"alice:{digest}\n" for digest in digests]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("name", ["", "a b", "a:b", "é", "x" * 65])
def test_a_name_that_is_invalid_in_the_key_file(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is wrong usage; the error says what is allowed."""
    with pytest.raises(SystemExit) as caught:
        main(["key", name])
    assert caught.value.code == 2
    assert "should be up to 64 letters" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the command's name and the package's version."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fcn-segment {__version__}\n"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("key", {"fastapi", "uvicorn", "onnxruntime", "numpy", "pydantic"}),
        ("predict", {"fastapi", "starlette", "uvicorn", "httpx"}),
    ],
)
def test_a_command_loads_only_what_it_needs(module: str, absent: set[str]) -> None:
    """`key` starts at once, and `predict` uses the service without HTTP."""
    code = f"import sys, service.cli.main, service.cli.{module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not absent & set(done.stdout.split())
