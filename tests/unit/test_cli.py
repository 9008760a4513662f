"""The command line's own words; what its commands do is in tests/integration."""

import pytest

from service import __version__
from service.cli import main
from service.settings import Settings


def test_every_setting_is_a_flag_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    """With its description, its variable and its default."""
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
    """Exit status 2 and the usage on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fcn-segment" in capsys.readouterr().err


def test_the_supervisors_own_command_is_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """People have two commands."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "{serve,predict}" in shown
    assert "worker" not in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The package's."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
