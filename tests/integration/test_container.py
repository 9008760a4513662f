"""The Dockerfile, and the compose file as Docker Compose itself reads it; nothing is built."""

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
    """The compose file with the CPU service, resolved with only ``variables`` set."""
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
    """Each service of the compose file, with no variable set."""
    name: str = request.param
    found: Config = compose()["services"][name]
    return found


@dataclass
class Image:
    """The instructions of a stage and of the stages it is built from; the last one counts."""

    base: str
    copied: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)


def read_dockerfile() -> dict[str, Image]:
    """The Dockerfile's stages by name."""
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
    """The CPU and the GPU image."""
    return read_dockerfile()[request.param]


def test_targets_share_one_base(image: Image) -> None:
    """Both images use the same slim base; CUDA comes from Python packages."""
    assert image.base == "${PYTHON_IMAGE}"
    assert read_dockerfile()["packages"].base == image.base


def test_image_runs_without_root_and_without_a_shell(image: Image) -> None:
    """The user is numeric, so Kubernetes can check it, and signals reach the service itself."""
    assert re.fullmatch("[1-9][0-9]+:[1-9][0-9]+", image.last["USER"])
    assert json.loads(image.last["ENTRYPOINT"]) == ["python", "-m", "service"]
    assert json.loads(image.last["CMD"]) == ["serve"]
    assert image.last["STOPSIGNAL"] == "SIGTERM"


def test_image_checks_its_readiness(image: Image) -> None:
    """The health check runs the script in the image."""
    _, command = image.last["HEALTHCHECK"].split(" CMD ")
    python, script = json.loads(command)
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/app")).is_file()


def test_image_starts_with_its_settings(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every FCN_* variable of the image is a setting with a valid value."""
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
    """The images differ in the device that runs the network."""
    stages = read_dockerfile()
    assert {name: stages[name].env["FCN_DEVICE"] for name in TARGETS} == {
        "cpu": "cpu",
        "gpu": "cuda",
    }


def test_context_holds_what_is_copied() -> None:
    """Every file that the Dockerfile copies exists and passes .dockerignore."""
    allowed = re.findall("^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = {source for stage in read_dockerfile().values() for source in stage.copied}
    assert copied == set(allowed)
    assert all((ROOT / source).exists() for source in copied)


def test_service_is_confined(service: Config) -> None:
    """Only /tmp and the volumes are writable, and there are no privileges."""
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]  # noqa: S108
    assert "privileged" not in service
    assert "user" not in service


def test_service_runs_its_target() -> None:
    """Each service is built from the stage that its image is tagged with."""
    for name, service in compose()["services"].items():
        target = service["build"]["target"]
        assert target == SERVICES[name]
        assert target in read_dockerfile()
        assert service["image"] == f"fcn-segment:{target}"
        assert ("profiles" in service) == (target == "cpu")


def test_service_is_given_time_to_stop(service: Config) -> None:
    """Docker kills only after every deadline and after the supervisor has given up on workers."""
    seconds = float(service["stop_grace_period"].removesuffix("s"))
    assert seconds > Settings.model_fields["deadline_s"].default + _GRACE_S


@pytest.mark.parametrize(("gpus", "count"), [({}, 1), ({"GPUS": "2"}, 2), ({"GPUS": "all"}, -1)])
def test_gpus_are_reserved(gpus: dict[str, str], count: int) -> None:
    """One GPU by default, with the compose specification's keys; none for the CPU service."""
    services = compose(**gpus)["services"]
    assert services["segment"]["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": count, "capabilities": ["gpu"]}
    ]
    assert "deploy" not in services["segment-cpu"]


def test_port_can_be_chosen() -> None:
    """PORT sets the host's port; the container's port stays the same."""
    for name, service in compose(PORT="9000")["services"].items():
        (port,) = service["ports"]
        assert port["published"] == "9000"
        assert str(port["target"]) == read_dockerfile()[SERVICES[name]].last["EXPOSE"]


def test_settings_are_handed_on(service: Config) -> None:
    """Every setting is passed on, except for the address inside the container."""
    names = {f"FCN_{name.upper()}" for name in Settings.model_fields}
    handed_on = {name for name in service["environment"] if not name.startswith("OTEL_")}
    assert handed_on == names - {"FCN_HOST", "FCN_PORT"}
    assert {name for name, value in service["environment"].items() if value is not None} == {
        "FCN_CACHE_DIR"
    }


def test_own_models_are_mounted() -> None:
    """MODELS is mounted read-only as /models; FCN_MODEL names one of the models in it."""
    given = {"MODELS": "/srv/models", "FCN_MODEL": "/models/mine"}
    for service in compose(**given)["services"].values():
        assert service["environment"]["FCN_MODEL"] == "/models/mine"
        (mount,) = [volume for volume in service["volumes"] if volume["target"] == "/models"]
        assert mount["source"] == "/srv/models"
        assert mount["read_only"] is True


def test_api_keys_are_mounted() -> None:
    """KEYS is a folder, mounted read-only as /keys; without it nothing is mounted."""
    for given, source in (({"KEYS": "/srv/keys"}, "/srv/keys"), ({}, os.devnull)):
        for service in compose(**given)["services"].values():
            (mount,) = [volume for volume in service["volumes"] if volume["target"] == "/keys"]
            assert mount["source"] == source
            assert mount["read_only"] is True


def test_cache_belongs_to_the_user(service: Config, image: Image) -> None:
    """The volume is mounted on a folder that the image's user owns, so it gets that owner."""
    (volume,) = [volume for volume in service["volumes"] if volume["type"] == "volume"]
    assert volume["target"] == service["environment"]["FCN_CACHE_DIR"]
    (uid, _) = image.last["USER"].split(":")
    (made,) = [run for run in image.runs if "useradd" in run]
    assert f"--uid {uid} " in made
    assert f"install --directory --owner=fcn --group=fcn {volume['target']}" in made


@pytest.fixture
def check_health() -> Iterator[Callable[[int], int]]:
    """Answer /readyz with a status and run the health check; returns its exit code."""
    status = 200

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

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
    """Run the health check against ``port``; returns its exit code."""
    return subprocess.run(
        [sys.executable, ROOT / "docker" / "healthcheck.py"],
        env={**os.environ, "FCN_PORT": str(port)},
        stderr=subprocess.DEVNULL,
        timeout=30,
        check=False,
    ).returncode


def test_healthy_means_ready(check_health: Callable[[int], int]) -> None:
    """The container is unhealthy while /readyz returns 503: when loading and draining."""
    assert check_health(200) == 0
    assert check_health(503) == 1


def test_unhealthy_where_nobody_listens() -> None:
    """The container is unhealthy if nothing listens."""
    # Nothing listens on port 1: that needs root.
    assert health(1) == 1
