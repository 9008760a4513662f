"""The images' recipe and the compose file, as Docker Compose itself reads it; nothing is built."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from service.server.supervisor import _GRACE_S
from service.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
COMPOSE = Path(sys.executable).parent / "docker-compose"
TARGETS = ["cpu", "gpu"]
SERVICES = {"segment": "gpu", "segment-cpu": "cpu"}

Config = dict[str, Any]


def compose(**variables: str) -> Config:
    """The compose file with the CPU variant, resolved with ``variables`` and no others."""
    done = subprocess.run(
        [COMPOSE, "--env-file", os.devnull, "--profile", "cpu", "config", "--format", "json"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    resolved: Config = json.loads(done.stdout)
    return resolved


@pytest.fixture(scope="module", params=SERVICES)
def service(request: pytest.FixtureRequest) -> Config:
    """Each service of the compose file, with nothing set."""
    name: str = request.param
    found: Config = compose()["services"][name]
    return found


@dataclass
class Image:
    """What a stage of the Dockerfile and those it is made from say; the last word counts."""

    base: str
    copied: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)


def read_dockerfile() -> dict[str, Image]:
    """Its stages by name."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, Image] = {}
    image = Image("")
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, name = rest.split(" AS ")
            of = stages.get(base, Image(base))
            image = Image(of.base, [*of.copied], [*of.runs], {**of.env}, {**of.last})
            stages[name] = image
        elif word == "COPY" and not rest.startswith("--from="):
            image.copied += rest.split()[:-1]
        elif word == "RUN":
            image.runs.append(rest)
        elif word == "ENV":
            image.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word:
            image.last[word] = rest.strip()
    return stages


@pytest.fixture(scope="module", params=TARGETS)
def image(request: pytest.FixtureRequest) -> Image:
    """Each of the two images."""
    return read_dockerfile()[request.param]


def test_targets_share_one_base(image: Image) -> None:
    """Both images start from the one slim base; CUDA comes from Python packages."""
    assert image.base == "${PYTHON_IMAGE}"
    assert read_dockerfile()["packages"].base == image.base


def test_image_runs_without_root_and_without_a_shell(image: Image) -> None:
    """The user is a number, which Kubernetes can check, and the service itself gets the signals."""
    assert re.fullmatch("[1-9][0-9]+:[1-9][0-9]+", image.last["USER"])
    assert json.loads(image.last["ENTRYPOINT"]) == ["python", "-m", "service"]
    assert json.loads(image.last["CMD"]) == ["serve"]
    assert image.last["STOPSIGNAL"] == "SIGTERM"


def test_image_checks_its_readiness(image: Image) -> None:
    """The health check is the script that the image holds."""
    _, command = image.last["HEALTHCHECK"].split(" CMD ")
    python, script = json.loads(command)
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/app")).is_file()


def test_image_starts_with_its_settings(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every FCN_* of the image is a setting with a value that the service takes."""
    for variable, value in image.env.items():
        if variable.startswith("FCN_"):
            monkeypatch.setenv(variable, value)
    settings = load_settings()
    assert settings.host == "0.0.0.0"  # noqa: S104  within the container's own network
    assert str(settings.port) == image.last["EXPOSE"]
    assert image.env["PYTHONPATH"] == image.last["WORKDIR"] == "/app"


def test_image_sends_nothing_home(image: Image) -> None:
    """ONNX Runtime's telemetry is off."""
    assert image.env["ORT_DISABLE_TELEMETRY"] == "1"


def test_devices() -> None:
    """The images differ in where they run the network."""
    stages = read_dockerfile()
    assert {name: stages[name].env["FCN_DEVICE"] for name in TARGETS} == {
        "cpu": "cpu",
        "gpu": "cuda",
    }


def test_context_holds_what_is_copied() -> None:
    """What the Dockerfile copies is there, and .dockerignore lets it through."""
    allowed = re.findall("^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = {source for stage in read_dockerfile().values() for source in stage.copied}
    assert copied == set(allowed)
    assert all((ROOT / source).exists() for source in copied)


def test_service_is_confined(service: Config) -> None:
    """Nothing but /tmp and the volumes can be written, and no privilege be had."""
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]  # noqa: S108
    assert "privileged" not in service
    assert "user" not in service


def test_service_runs_its_target() -> None:
    """Each service is built from the stage that its image is named after."""
    for name, service in compose()["services"].items():
        target = service["build"]["target"]
        assert target == SERVICES[name]
        assert target in read_dockerfile()
        assert service["image"] == f"fcn-segment:{target}"
        assert ("profiles" in service) == (target == "cpu")


def test_service_is_given_time_to_stop(service: Config) -> None:
    """Docker kills only after every request had its time and the supervisor gave up on workers."""
    seconds = float(service["stop_grace_period"].removesuffix("s"))
    assert seconds > Settings.model_fields["deadline_s"].default + _GRACE_S


@pytest.mark.parametrize(("gpus", "count"), [({}, 1), ({"GPUS": "2"}, 2), ({"GPUS": "all"}, -1)])
def test_gpus_are_reserved(gpus: dict[str, str], count: int) -> None:
    """One GPU unless said, by the keys that the compose specification gives; none for the CPU."""
    services = compose(**gpus)["services"]
    assert services["segment"]["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": count, "capabilities": ["gpu"]}
    ]
    assert "deploy" not in services["segment-cpu"]


def test_port_can_be_chosen() -> None:
    """PORT is the host's; within the container it stays the image's."""
    for name, service in compose(PORT="9000")["services"].items():
        (port,) = service["ports"]
        assert port["published"] == "9000"
        assert str(port["target"]) == read_dockerfile()[SERVICES[name]].last["EXPOSE"]


def test_settings_are_handed_on(service: Config) -> None:
    """All can be given to the service, but for the address within the container."""
    names = {f"FCN_{name.upper()}" for name in Settings.model_fields}
    handed_on = {name for name in service["environment"] if not name.startswith("OTEL_")}
    assert handed_on == names - {"FCN_HOST", "FCN_PORT"}
    assert {name for name, value in service["environment"].items() if value is not None} == {
        "FCN_CACHE_DIR"
    }


def test_own_models_are_mounted() -> None:
    """MODELS is seen as /models and cannot be written; FCN_MODEL names one of them."""
    given = {"MODELS": "/srv/models", "FCN_MODEL": "/models/mine"}
    for service in compose(**given)["services"].values():
        assert service["environment"]["FCN_MODEL"] == "/models/mine"
        (mount,) = [volume for volume in service["volumes"] if volume["target"] == "/models"]
        assert mount["source"] == "/srv/models"
        assert mount["read_only"] is True


def test_api_keys_are_mounted() -> None:
    """KEYS is a folder, seen as /keys, and cannot be written; nothing is there without it."""
    for given, source in (({"KEYS": "/srv/keys"}, "/srv/keys"), ({}, os.devnull)):
        for service in compose(**given)["services"].values():
            (mount,) = [volume for volume in service["volumes"] if volume["target"] == "/keys"]
            assert mount["source"] == source
            assert mount["read_only"] is True


def test_cache_belongs_to_the_user(service: Config, image: Image) -> None:
    """The volume lies on a folder that the image made for its user, whose owner it takes over."""
    (volume,) = [volume for volume in service["volumes"] if volume["type"] == "volume"]
    assert volume["target"] == service["environment"]["FCN_CACHE_DIR"]
    (uid, _) = image.last["USER"].split(":")
    (made,) = [run for run in image.runs if "useradd" in run]
    assert f"--uid {uid} " in made
    assert f"install --directory --owner=fcn --group=fcn {volume['target']}" in made


@pytest.fixture
def check_health() -> Iterator[Callable[[int], int]]:
    """Answer /readyz with a status and run the health check: its exit code."""
    status = 200

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def check(answer: int) -> int:
            nonlocal status
            status = answer
            return health(server.server_port)

        yield check
        server.shutdown()
        thread.join()


def health(port: int) -> int:
    """Run the health check against ``port``: its exit code."""
    return subprocess.run(
        [sys.executable, ROOT / "docker" / "healthcheck.py"],
        env={**os.environ, "FCN_PORT": str(port)},
        stderr=subprocess.DEVNULL,
        timeout=30,
        check=False,
    ).returncode


def test_healthy_means_ready(check_health: Callable[[int], int]) -> None:
    """Loading and draining are 503, and then the container is not healthy."""
    assert check_health(200) == 0
    assert check_health(503) == 1


def test_unhealthy_where_nobody_listens() -> None:
    """No service, no health."""
    # Port 1 is nobody's: it takes root to listen there.
    assert health(1) == 1
