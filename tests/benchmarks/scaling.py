"""Throughput of one and two replicas, as plain processes and on Ray Serve, on this machine.

    .venv/bin/python -m tests.benchmarks.scaling

Each replica's network has one thread, and the clients run on the same cores. Prints photos/s and
the ratios, and writes ``results/scaling.json``. A machine with two cores shows the overhead of each
way, but not how it scales over many machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx
from skimage import data

from tests.artefacts import encode
from tests.benchmarks.bench import ROOT, environment

RESULTS: Final = Path(__file__).parent / "results" / "scaling.json"
URL: Final = "http://127.0.0.1:8077"
CLIENTS: Final = 8
WARM_UP_S: Final = 5.0
WINDOW_S: Final = 15.0
ROUNDS: Final = 2


@contextlib.contextmanager
def running(arguments: list[str], variables: Mapping[str, str], members: int) -> Iterator[None]:
    """Run a service until the block ends; ``members`` processes report metrics once it is ready."""
    process = subprocess.Popen(
        # A shell's background processes ignore SIGINT.
        ["env", "--default-signal=INT", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 180
        while not _ready(members):
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{' '.join(arguments)}: not ready")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _ready(members: int) -> bool:
    try:
        found = httpx.get(f"{URL}/metrics", timeout=10).text
        return sum(line.startswith("fcn_ready") for line in found.splitlines()) >= members
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def plain(replicas: int) -> Iterator[None]:
    """Plain processes that share one port."""
    variables = {
        "FCN_DEVICE": "cpu",
        "FCN_THREADS": "1",
        "FCN_PROCESSES": str(replicas),
        "FCN_PORT": URL.rpartition(":")[2],
        "FCN_LOG_LEVEL": "warning",
    }
    with running([sys.executable, "-m", "service", "serve"], variables, replicas):
        yield


@contextlib.contextmanager
def ray(replicas: int) -> Iterator[None]:
    """Ray Serve: one ingress, with the replicas behind it."""
    config = (ROOT / "docker" / "cluster.yaml").read_text(encoding="utf-8")
    config = config.replace("_replicas: 2", f"_replicas: {replicas}")
    config = config.replace("port: 8000", f"port: {URL.rpartition(':')[2]}")
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(config)
        file.flush()
        serve = str(Path(sys.executable).parent / "serve")
        with running([serve, "run", file.name], variables, replicas + 1):
            yield


def photos_per_s() -> float:
    """Photos answered per second, by all clients. Raises `httpx.HTTPError` if one fails."""
    photo = encode(data.chelsea(), "JPEG", quality=90)  # type: ignore[no-untyped-call]
    begin = time.monotonic() + WARM_UP_S
    end = begin + WINDOW_S

    def ask(_: int) -> int:
        answered = 0
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end:
                client.post(f"{URL}/segment", content=photo).raise_for_status()
                answered += begin < time.monotonic() < end
        return answered

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(ask, range(CLIENTS))) / WINDOW_S


def main() -> None:
    """Measure each way alternately, print the ratios, write the JSON."""
    rates: dict[str, dict[int, list[float]]] = {"plain": {1: [], 2: []}, "ray": {1: [], 2: []}}
    for _ in range(ROUNDS):
        for way, start in (("plain", plain), ("ray", ray)):
            for replicas in (1, 2):
                with start(replicas):
                    rates[way][replicas].append(photos_per_s())
                print(f"{way}, {replicas}: {rates[way][replicas][-1]:.1f} photos/s", flush=True)
    ratios = {
        way: [two / one for one, two in zip(found[1], found[2], strict=True)]
        for way, found in rates.items()
    }
    for way, found in ratios.items():
        each = ", ".join(f"{ratio:.2f}" for ratio in found)
        print(f"{way}: two replicas over one {statistics.mean(found):.2f}x ({each})")
    facts = {
        "environment": environment(("onnxruntime", "ray", "fastapi", "uvicorn")),
        "clients": CLIENTS,
        "photos_per_s": rates,
        "two_over_one": ratios,
    }
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
