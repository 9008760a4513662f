"""The contenders and their settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from tests.benchmarks.bench import ROOT
from tests.benchmarks.peers.pipeline import Engine, Options
from tests.benchmarks.servers import Side

Precision = Literal["auto", "fp32"]

OURS: Final = "ours"
TORCH_PEER: Final = "FastAPI + PyTorch"
BATCHING_PEERS: Final = ("LitServe", "BentoML", "Ray Serve", "FastAPI + ORT")
"""Peers that can serve any network; FastAPI + PyTorch serves torchvision's."""

LEAST_PEER: Final = "BentoML"
"""The peer that is measured with the least work too: it was the fastest at that."""

FP32_FILE: Final = "network.onnx"
INT8_FILE: Final = "network.int8.onnx"


@dataclass(frozen=True, slots=True)
class Setting:
    """Worker processes, threads per worker, largest batch (1: no batching)."""

    workers: int
    threads: int
    batch: int


SWEEP: Final = (
    *(Setting(workers, threads, batch=1) for workers, threads in ((1, 2), (2, 1), (1, 1))),
    *(Setting(workers, threads, batch=4) for workers, threads in ((1, 2), (2, 1))),
)
"""The settings that ``--sweep`` tries for each peer on two cores; plain FastAPI cannot batch."""

BEST: Final = {
    "LitServe": Setting(workers=2, threads=1, batch=1),
    "BentoML": Setting(workers=2, threads=1, batch=1),
    "Ray Serve": Setting(workers=2, threads=1, batch=1),
    "FastAPI + ORT": Setting(workers=2, threads=1, batch=1),
    TORCH_PEER: Setting(workers=1, threads=2, batch=1),
}
"""The settings with the highest throughput in a sweep with the fp32 file at 8 connections. On two
cores a batch of four is no faster than four single photos, and adds waiting time."""

_APPS: Final = "tests.benchmarks.peers."


def ours(artefact: Path, precision: Precision, *, pipe_data: Path | None = None) -> Side:
    """``fcn-segment serve`` in `.venv-serve`, with its default settings.

    With ``precision`` "auto" the service chooses. ``pipe_data`` replaces the network with stored
    logits: see `pipe_service`.
    """
    python = ROOT / ".venv-serve" / "bin" / "python"
    module = ("-m", "service") if pipe_data is None else ("-m", "tests.benchmarks.pipe_service")
    data = () if pipe_data is None else (str(pipe_data),)
    serve = ("serve", "--port", "{port}", "--model", str(artefact), "--precision", precision)
    command = (str(python), *module, *data, *serve, "--log-level", "warning")
    return Side(OURS, command, ready="/readyz")


def peer(name: str, engine: Engine, model: Path, setting: Setting | None = None) -> Side:
    """A peer with one of the engines; ``setting`` defaults to its best."""
    chosen = setting or BEST[name]
    options = Options(
        engine, str(model), workers=chosen.workers, threads=chosen.threads, batch=chosen.batch
    )
    python = str(Path(sys.executable))
    listen = ("--host", "127.0.0.1", "--port", "{port}")
    match name:
        case "LitServe":
            command: Sequence[str] = (python, "-m", f"{_APPS}litserve_app", "{port}")
        case "Ray Serve":
            command = (python, "-m", f"{_APPS}ray_app", "{port}")
        case "BentoML":
            service = "Segment" if chosen.batch == 1 else "SegmentBatched"
            app = f"{_APPS}bentoml_app:{service}"
            command = (python, "-m", "bentoml", "serve", app, *listen)
        case _:
            app = f"{_APPS}fastapi_app:app"
            quiet = ("--log-level", "warning", "--no-access-log")
            workers = ("--workers", str(chosen.workers))
            command = (python, "-m", "uvicorn", app, *listen, *workers, *quiet)
    environment = {
        **options.to_environment(),
        "OMP_NUM_THREADS": str(chosen.threads),
    }
    field = "request" if name == "LitServe" else "image"
    return Side(name, tuple(command), environment, field)


def renamed(side: Side, name: str) -> Side:
    """The same side under another name."""
    return replace(side, name=name)
