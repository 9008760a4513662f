"""`service.cluster` as its users start it: ``serve run`` and ``serve deploy``, two CPU replicas."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from skimage import data

from service.settings import DEFAULT_MODEL
from tests.artefacts import build_artefact, encode
from tests.clients import under_load

ROOT = Path(__file__).parents[2]
SERVE = Path(sys.executable).parent / "serve"
JPEG = encode(data.chelsea(), "JPEG", quality=90)  # type: ignore[no-untyped-call]

CLIENTS = 4
PATIENCE_S = 120.0


@dataclass
class Cluster:
    """A running ``serve run``. ``output``: its log and its replicas' so far."""

    process: subprocess.Popen[str]
    environment: dict[str, str]
    config: dict[str, Any]
    folder: Path
    output: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.config['http_options']['port']}"

    def said(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait for ``count`` matches in the output; returns that match."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = re.finditer(pattern, "".join(self.output))
            return len(found) >= count

        self.wait(look)
        return found[count - 1]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is true."""
        patience = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, "".join(self.output)
            assert time.monotonic() < patience, "".join(self.output)
            time.sleep(0.1)  # other processes: polling is the only way

    def deploy(self, model: Path) -> None:
        """Start to roll out another model."""
        (config,) = self.config["applications"]
        for deployment in config["deployments"]:
            if "user_config" in deployment:
                deployment["user_config"]["model"] = str(model)
        file = self.folder / "changed.yaml"
        file.write_text(yaml.safe_dump(self.config))
        dashboard = self.said(r"http://127\.0\.0\.1:\d+").group()
        done = subprocess.run(
            [SERVE, "deploy", "--address", dashboard, file],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def model(self) -> str:
        """The model that an ingress reports."""
        return str(httpx.get(f"{self.url}/model", timeout=PATIENCE_S).json()["name"])

    def metrics(self, name: str) -> dict[str, float]:
        """A metric's value in each replica."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text
        return {
            sample.labels["replica"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The committed config on a free port, in its own Ray cluster."""
    # A short path: the names of Ray's sockets have at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    config = yaml.safe_load((ROOT / "docker" / "cluster.yaml").read_text())
    config["http_options"]["port"] = free_port()
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        # By default Ray drops equal lines of two devices.
        "RAY_DEDUP_LOGS": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "NO_COLOR": "1",
    }
    process = subprocess.Popen(
        # Children of a background shell ignore SIGINT by default.
        ["env", "--default-signal=INT", SERVE, "run", file],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    running = Cluster(process, environment, config, folder)
    assert process.stdout is not None
    reader = threading.Thread(target=running.output.extend, args=(process.stdout,))
    reader.start()
    try:
        running.wait(lambda: answers(f"{running.url}/readyz"))
        running.wait(lambda: len(running.metrics("fcn_ready")) == 3)
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            reader.join(PATIENCE_S)
            process.stdout.close()
            shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    """Whether the URL answers with 200."""
    try:
        return httpx.get(url, timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def load(url: str) -> Iterator[list[tuple[int, str]]]:
    """Send photos continuously; yields each status with the model or the error."""
    with httpx.Client(timeout=PATIENCE_S) as client:

        def ask() -> tuple[int, str]:
            try:
                answer = client.post(f"{url}/segment", content=JPEG)
            except httpx.TransportError as exc:
                return 0, repr(exc)
            return answer.status_code, answer.headers.get("X-Model", answer.text)

        with under_load(CLIENTS, ask) as outcomes:
            yield outcomes


def device_pids(cluster: Cluster) -> list[int]:
    """The device replicas' processes, by their prefix in Ray's log."""
    return [
        int(pid) for pid in dict.fromkeys(re.findall(r"Device pid=(\d+)", "".join(cluster.output)))
    ]


def test_the_app_is_the_same(cluster: Cluster) -> None:
    """A mask, its stages, one request id, the usual problems, and metrics of both devices."""
    answer = httpx.post(f"{cluster.url}/segment", content=JPEG, timeout=PATIENCE_S)
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["X-Model"].startswith(DEFAULT_MODEL.name)
    assert "infer;dur=" in answer.headers["Server-Timing"]
    assert len(answer.headers.get_list("X-Request-ID")) == 1
    refused = httpx.post(f"{cluster.url}/segment", content=b"no photo")
    assert refused.json()["type"] == "/problems/unsupported-image-type"
    kinds = sorted(name.split("-")[0] for name in cluster.metrics("fcn_replica_up"))
    assert kinds == ["Device", "Device", "Ingress"]
    assert sum(cluster.metrics("fcn_batch_size_count").values()) >= 1


def test_a_killed_device_costs_no_request(cluster: Cluster) -> None:
    """Its photos go to the other device, and a new device is started."""
    before = set(cluster.metrics("fcn_ready"))
    with load(cluster.url) as outcomes:
        cluster.wait(lambda: len(outcomes) >= 2 * CLIENTS)
        # Each device has logged that its model is ready.
        os.kill(device_pids(cluster)[0], signal.SIGKILL)
        cluster.said("device lost")
        cluster.wait(lambda: len(set(cluster.metrics("fcn_ready")) - before) == 1)
    assert {status for status, _ in outcomes} == {200}


def test_a_model_is_rolled_out_under_load(cluster: Cluster, tmp_path: Path) -> None:
    """No request is refused, and each response names its model."""
    new = build_artefact(tmp_path / "new", name="new")
    replicas = set(cluster.metrics("fcn_ready"))
    with load(cluster.url) as outcomes:
        cluster.wait(lambda: len(outcomes) >= CLIENTS)
        cluster.deploy(new)
        cluster.said("model=new/1", count=2)
        # A device logs a model before it uses it.
        cluster.wait(lambda: {model for _, model in outcomes[-8 * CLIENTS :]} == {"new/1"})
    assert {status for status, _ in outcomes} == {200}
    assert outcomes[0][1].startswith(DEFAULT_MODEL.name)
    assert len({model for _, model in outcomes}) == 2
    # The replicas are the same: none was restarted.
    cluster.wait(lambda: set(cluster.metrics("fcn_ready")) == replicas)
    assert cluster.model() == "new"
