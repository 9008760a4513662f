"""Settings from the environment and from flags."""

from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import DEFAULT_MODEL, Settings, env_name, load_settings


def test_defaults() -> None:
    """Without settings, the committed model is served on port 8000."""
    settings = load_settings()
    assert settings.port == 8000
    assert settings.model == DEFAULT_MODEL
    assert DEFAULT_MODEL.parts[-3:-1] == ("models", "artifacts")


def test_environment_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag overrides the environment."""
    monkeypatch.setenv("FCN_PORT", "9000")
    monkeypatch.setenv("FCN_MODEL", "/some/where")
    assert load_settings() == Settings(port=9000, model=Path("/some/where"))
    assert load_settings({"port": "9001"}).port == 9001


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FCN_PORT", "http", "FCN_PORT: .*got 'http'"),
        ("FCN_PORT", "70000", "FCN_PORT: .*65535.*got '70000'"),
        ("FCN_DEVICE", "tpu", "^FCN_DEVICE: should be auto, cpu, cuda or cuda:N, got 'tpu'$"),
        ("FCN_DEVICE", "cuda:", "FCN_DEVICE: .*got 'cuda:'"),
        ("FCN_DEVICE", "cuda:-1", "FCN_DEVICE: .*got 'cuda:-1'"),
        ("FCN_GPUS", "0,x", "^FCN_GPUS: should be numbers such as 0,1, got '0,x'$"),
        ("FCN_GPUS", "", "FCN_GPUS: .*got ''"),
        ("FCN_GPUS", "-1", "FCN_GPUS: .*got '-1'"),
        ("FCN_GPUS", "1,01", "^FCN_GPUS: names a GPU twice: '1,01'$"),
        ("FCN_PROCESSES", "0", "FCN_PROCESSES: .*greater than or equal to 1"),
        ("FCN_DEADLINE_S", "0", "FCN_DEADLINE_S: .*greater than 0"),
        ("FCN_RATE_LIMIT", "many", "FCN_RATE_LIMIT: .*'many'"),
        ("FCN_RATE_LIMIT", "5/blink", "FCN_RATE_LIMIT: .*blink"),
        ("FCN_RATE_LIMIT", "0/second", "FCN_RATE_LIMIT: .*below 1"),
        ("FCN_TRUSTED_PROXIES", "proxy", "FCN_TRUSTED_PROXIES: .*'proxy'"),
        ("FCN_TRUSTED_PROXIES", "*", r"FCN_TRUSTED_PROXIES: .*'\*'"),
        ("FCN_TRUSTED_PROXIES", "10.0.0.1/8", "FCN_TRUSTED_PROXIES: .*host bits"),
        ("FCN_CORS_ORIGINS", "one.example", "FCN_CORS_ORIGINS: .*got 'one.example'"),
        ("FCN_CORS_ORIGINS", "https://a,*", r"FCN_CORS_ORIGINS: .*got '\*'"),
        ("FCN_CORS_ORIGINS", "https://a/", "FCN_CORS_ORIGINS: .*got 'https://a/'"),
        ("FCN_CORS_ORIGINS", "", "FCN_CORS_ORIGINS: .*got ''"),
        ("FCN_MAX_BYTE", "1", "unknown setting FCN_MAX_BYTE; did you mean FCN_MAX_BYTES?"),
        ("FCN_MIN_SIDE", "64", "unknown setting FCN_MIN_SIDE; it was removed in 0.2.0"),
        ("FCN_MAX_SIDE", "63", "FCN_MAX_SIDE: .*greater than or equal to 64"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """The error names the unknown variable or the invalid value."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_a_clients_key_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's FCN_API_KEY may be set in the same environment."""
    monkeypatch.setenv("FCN_API_KEY", "fcn_x")
    assert load_settings() == Settings()


def test_access_is_open_by_default() -> None:
    """By default there are no keys, no limit and no origins; each can be set."""
    settings = load_settings()
    assert (settings.api_keys_file, settings.rate_limit, settings.allowed_origins) == (
        None,
    ) * 2 + ((),)
    restricted = load_settings(
        {
            "rate_limit": "5/second;1000/day",
            "trusted_proxies": "10.0.0.0/8, ::1",
            "cors_origins": "https://one.example,http://localhost:3000",
        }
    )
    assert restricted.allowed_origins == ("https://one.example", "http://localhost:3000")
    assert load_settings({"cors_origins": "*"}).allowed_origins == ("*",)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    """A GPU may be selected by its number."""
    assert load_settings({"device": device}).device == device


def test_gpus() -> None:
    """The numbers keep their order; the default is none."""
    assert load_settings().gpu_numbers == ()
    assert load_settings({"gpus": "0"}).gpu_numbers == (0,)
    assert load_settings({"gpus": "3,0,12", "device": "cuda"}).gpu_numbers == (3, 0, 12)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_gpus_beside_one_device(device: str) -> None:
    """The two settings contradict each other."""
    with pytest.raises(SettingsError, match=rf"FCN_GPUS \(0,1\) .* FCN_DEVICE \({device}\)"):
        load_settings({"gpus": "0,1", "device": device})


def test_a_wrong_flag_is_named_as_a_flag() -> None:
    """The error says --max-bytes, not FCN_MAX_BYTES."""
    with pytest.raises(SettingsError, match=r"^--max-bytes: "):
        load_settings({"max_bytes": "many"})


def test_every_setting_is_documented() -> None:
    """The service's README lists every variable."""
    page = (Path(__file__).parents[2] / "service" / "README.md").read_text(encoding="utf-8")
    assert [name for name in Settings.model_fields if f"| `{env_name(name)}` |" not in page] == []


@pytest.mark.parametrize("service", ["FCN", "FCN_SEGMENT", "FCN_SEGMENT_SERVE_SVC"])
def test_what_kubernetes_sets_is_no_setting(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Service links of a Service whose name begins with ours."""
    for name, value in {
        "SERVICE_HOST": "10.1.1.1",
        "SERVICE_PORT": "80",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.1.1.1:80",
        "PORT_80_TCP": "tcp://10.1.1.1:80",
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_PORT": "80",
        "PORT_80_TCP_ADDR": "10.1.1.1",
    }.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    assert load_settings() == Settings(port=8000)
    assert load_settings({"port": "9001"}).port == 9001


@pytest.mark.parametrize("variable", ["FCN_SEGMENT_PORT", "FCN_SERVICE", "FCN_SERVICE_HOSTS"])
def test_what_only_resembles_a_service_link(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an unknown setting."""
    monkeypatch.setenv(variable, "80")
    with pytest.raises(SettingsError, match=f"unknown setting {variable}"):
        load_settings()
