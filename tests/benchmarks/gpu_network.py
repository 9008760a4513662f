"""The network alone: by batch, shape and precision, by provider option, and against PyTorch."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import count, product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.artefact.contract import Precision, Shape
from service.inference import providers
from service.inference.lanes import NO_GRAPH
from tests.benchmarks.bench import ROOT, Row, matching, seconds_each
from tests.benchmarks.gpu_device import (
    CPU,
    GpuBench,
    Loaded,
    bound_run,
    changed_options,
    load,
    open_channel,
    rates,
    read_back,
    shape_text,
    upload_photos,
)

Logits = npt.NDArray[np.float32]

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
SQUARE: Final[Shape] = (512, 512)
LANDSCAPE: Final[Shape] = (384, 512)
"""The padded shape of a 500x375 photo."""

CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "prefer_nhwc": ("0", "1"),
    "use_tf32": ("1", "0"),
    "fuse_conv_bias": ("0", "1"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv_use_max_workspace": ("1", "0"),
}
"""Options of the CUDA provider and their values, ONNX Runtime's default first."""

SWEPT: Final[Mapping[Precision, tuple[str, ...]]] = {
    "fp16": tuple(CHOICES),
    "fp32": ("cudnn_conv_algo_search", "prefer_nhwc", "use_tf32"),
}
DEFAULTS: Final = "service/inference/providers.py"
GAIN: Final = 1.02
"""The least speed-up for which an option is part of the combination."""

_TORCH_S: Final = 120.0
_TORCH_QUICK_S: Final = 60.0


def session(bench: GpuBench) -> None:
    """Measure images per second by precision, shape and batch, with and without CUDA graphs."""
    graphs = (False,) if bench.device == CPU else (True,) if bench.quick else (True, False)
    for precision, with_graphs in product(bench.precisions, graphs):
        with bench.attempt(part="session", precision=precision, graphs=with_graphs):
            _throughput(bench, precision, graphs=with_graphs)
        gc.collect()


def _throughput(bench: GpuBench, precision: Precision, *, graphs: bool) -> None:
    loaded = load(bench, precision, graphs=graphs)
    batches = (1, 2) if bench.device == CPU else (1, 16, 64) if bench.quick else BATCHES
    listed = (LANDSCAPE,) if bench.quick else loaded.model.contract.shapes
    channel = open_channel(loaded, max(batches))
    upload_photos(bench, loaded, channel)
    numbers = count(1)
    for shape, batch in product(dict.fromkeys((*listed, SQUARE)), batches):
        row = {
            "part": "session",
            "precision": precision,
            "graphs": graphs,
            "shape": shape_text(shape),
            "batch": batch,
        }
        with bench.attempt(**row):
            graph = next(numbers) if graphs else NO_GRAPH
            run = bound_run(loaded, channel, batch, shape, graph)
            seconds = seconds_each(run, loaded.wait, bench.least_s)
            bench.add(**row, **rates(seconds, batch))


def options(bench: GpuBench) -> None:
    """Measure one changed option at a time, then all options that were faster alone."""
    if bench.device == CPU:
        bench.add(part="options", not_measured="the CPU provider does not have these options")
        return
    for precision in bench.precisions:
        reference: list[Logits] = []
        for changes in _variants(precision):
            _try_options(bench, precision, changes, reference)
        if (best := combination(bench.rows, precision)) is not None:
            _try_options(bench, precision, best, reference)


def _variants(precision: Precision) -> list[dict[str, str]]:
    """The service's options, then each variant that differs in one value."""
    _, ours = providers.cuda(0, 0, precision=precision, graphs=True, memory_bytes=0)
    return [{}] + [
        {option: value}
        for option in SWEPT[precision]
        for value in CHOICES[option]
        if value != ours.get(option, CHOICES[option][0])
    ]


def _try_options(
    bench: GpuBench, precision: Precision, changes: Mapping[str, str], reference: list[Logits]
) -> None:
    """Measure one variant; ``reference`` holds the first variant's logits for comparison."""
    row: dict[str, Any] = {
        "part": "options",
        "precision": precision,
        "options": described(changes),
        "changes": dict(changes),
    }
    with bench.attempt(**row), changed_options(**changes):
        _measure_options(bench, precision, row, reference)
    gc.collect()


def _measure_options(
    bench: GpuBench, precision: Precision, row: Mapping[str, Any], reference: list[Logits]
) -> None:
    started = time.perf_counter()
    loaded = load(bench, precision)
    start_s = time.perf_counter() - started
    channel = open_channel(loaded, 16)
    upload_photos(bench, loaded, channel)
    for number, (shape, batch) in enumerate(((LANDSCAPE, 16), (LANDSCAPE, 1), (SQUARE, 16)), 1):
        run = bound_run(loaded, channel, batch, shape, number)
        started = time.perf_counter()
        run()
        loaded.wait()
        first_run_s = time.perf_counter() - started
        seconds = seconds_each(run, loaded.wait, bench.least_s)
        if number == 1:
            logits = _logits(loaded, channel.logits_address, batch, shape)
            if not reference:
                reference.append(logits)
            same = float((logits.argmax(axis=1) == reference[0].argmax(axis=1)).mean())
        bench.add(
            **row,
            shape=shape_text(shape),
            batch=batch,
            **rates(seconds, batch),
            start_s=start_s,
            first_run_s=first_run_s,
            used_mib=loaded.used_bytes() >> 20,
            same_cells=same,
        )


def _logits(loaded: Loaded, address: int, batch: int, shape: Shape) -> Logits:
    contract = loaded.model.contract
    grid = [side // contract.stride for side in shape]
    return read_back(loaded.gpu, address, (batch, len(contract.classes), *grid))


def described(changes: Mapping[str, str]) -> str:
    """The changed options as text."""
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or DEFAULTS


def combination(rows: Sequence[Row], precision: Precision) -> dict[str, str] | None:
    """The best value of each option that was faster alone; None if fewer than two were.

    Faster: at least `GAIN` times the images per second of the service's options, at batch 16.
    """
    figures = {
        row["options"]: row
        for row in matching(
            rows,
            "images_per_s",
            part="options",
            precision=precision,
            batch=16,
            shape=shape_text(LANDSCAPE),
        )
    }
    if DEFAULTS not in figures:
        return None
    ours = figures[DEFAULTS]["images_per_s"]
    best: dict[str, str] = {}
    for row in sorted(figures.values(), key=lambda row: row["images_per_s"]):
        if len(row["changes"]) == 1 and row["images_per_s"] >= GAIN * ours:
            # Later rows are faster.
            best |= row["changes"]
    return best if len(best) >= 2 else None


def pytorch(bench: GpuBench) -> None:
    """Measure the same network in PyTorch, eager and compiled, in its own environment.

    The weights are random; they do not affect the time.
    """
    limit_s = _TORCH_QUICK_S if bench.quick else _TORCH_S
    network = load(bench, "fp32", graphs=False).model.contract.network
    gc.collect()
    command = (bench.torch_python, "-m", "tests.benchmarks.gpu_torch", bench.device, network)
    try:
        done = subprocess.run(
            (*command, "quick" if bench.quick else "whole", str(limit_s)),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=limit_s,
        )
        output, trouble = done.stdout, done.stderr if done.returncode else b""
    except subprocess.TimeoutExpired as exc:
        output, trouble = exc.stdout or b"", f"stopped after {limit_s:.0f} s".encode()
    except OSError as exc:
        output, trouble = b"", str(exc).encode()
    for line in output.splitlines():
        if line.startswith(b"{"):
            bench.add(part="pytorch", **json.loads(line))
    if trouble:
        bench.add(part="pytorch", error=trouble.decode(errors="replace").strip().splitlines()[-1])
