"""Settings from the environment and from flags."""

from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import DEFAULT_MODEL, Settings, load_settings


def test_defaults() -> None:
    """With nothing said, the committed model is served on port 8000."""
    settings = load_settings()
    assert settings.port == 8000
    assert settings.model == DEFAULT_MODEL
    assert DEFAULT_MODEL.parts[-3:-1] == ("models", "artifacts")


def test_environment_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment sets, a flag wins over it."""
    monkeypatch.setenv("FCN_PORT", "9000")
    monkeypatch.setenv("FCN_MODEL", "/some/where")
    assert load_settings() == Settings(port=9000, model=Path("/some/where"))
    assert load_settings({"port": "9001"}).port == 9001


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FCN_PORT", "http", "FCN_PORT: .*got 'http'"),
        ("FCN_PORT", "70000", "FCN_PORT: .*65535.*got '70000'"),
        ("FCN_DEVICE", "tpu", "FCN_DEVICE: .*'auto', 'cpu' or 'cuda'.*got 'tpu'"),
        ("FCN_DEADLINE_S", "0", "FCN_DEADLINE_S: .*greater than 0"),
        ("FCN_MAX_BYTE", "1", "unknown setting FCN_MAX_BYTE; did you mean FCN_MAX_BYTES?"),
        ("FCN_MIN_SIDE", "3000", r"FCN_MIN_SIDE \(3000\) is above FCN_MAX_SIDE \(2048\)"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """Unknown names and impossible values stop the start, and are named."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_a_wrong_flag_is_named_as_a_flag() -> None:
    """The line says --max-bytes, not FCN_MAX_BYTES."""
    with pytest.raises(SettingsError, match=r"^--max-bytes: "):
        load_settings({"max_bytes": "many"})
