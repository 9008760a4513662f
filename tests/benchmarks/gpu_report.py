"""The targets and the results file of a GPU run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.bench import Row, Target, matching
from tests.benchmarks.gpu_device import shape_text
from tests.benchmarks.gpu_network import LANDSCAPE, SQUARE

JSON_NAME: Final = "gpu.json"

_SAME_RUN: Final = (
    *("device", "driver", "cpu", "cores", "commit", "changes", "versions", "artefact", "photos"),
)
"""The fields that must be equal for one file to hold figures of two runs."""

NOT_MEASURED: Final = "not measured"


def merge(
    stored: Mapping[str, Any] | None, found: Mapping[str, Any], parts: Iterable[str]
) -> dict[str, Any]:
    """The results of this run, and the stored ones of parts that are not in ``parts``.

    Each is ``{"environment", "parts", "rows"}``. Stored results from another machine or commit are
    dropped.
    """
    merged = {"environment": found["environment"], "parts": {}, "rows": []}
    if stored is not None and all(
        stored["environment"].get(key) == found["environment"].get(key) for key in _SAME_RUN
    ):
        run_now = set(parts)
        merged["parts"] = {
            name: about for name, about in stored["parts"].items() if name not in run_now
        }
        merged["rows"] = [row for row in stored["rows"] if row["part"] in merged["parts"]]
    merged["parts"] = {**merged["parts"], **found["parts"]}
    merged["rows"] = [*merged["rows"], *found["rows"]]
    return merged


def load(folder: Path) -> dict[str, Any] | None:
    """The stored results; None if there are none."""
    try:
        stored: dict[str, Any] = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored


def write(folder: Path, results: Mapping[str, Any], found: Iterable[Target]) -> None:
    """Write ``gpu.json``."""
    listed = [{**asdict(one), "bound": one.bound, "verdict": verdict(one)} for one in found]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**results, "targets": listed}, indent=1, default=str)
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")


def verdict(target: Target) -> str:
    """``met``, ``MISSED`` or ``not measured``."""
    return {True: "met", False: "MISSED", None: NOT_MEASURED}[target.met]


def targets(rows: Sequence[Row], *, on_gpu: bool) -> list[Target]:
    """All targets, with figures where they were measured."""
    service = best(rows, "throughput", part="serving", load="closed")
    raw = best(rows, "images_per_s", part="session", precision="fp16", shape=shape_text(LANDSCAPE))
    square = best(rows, "images_per_s", part="session", precision="fp16", shape=shape_text(SQUARE))
    compiled_rows = [row for row in rows if str(row.get("side", "")).startswith("compiled")]
    compiled = best(compiled_rows, "images_per_s", part="pytorch", shape=shape_text(SQUARE))
    # Our best among the batches that PyTorch was measured with.
    batches = {row["batch"] for row in compiled_rows if "images_per_s" in row}
    beside = best(
        [row for row in rows if row.get("batch") in batches],
        "images_per_s",
        part="session",
        precision="fp16",
        shape=shape_text(SQUARE),
    )
    alone = best(rows, "throughput", part="serving", load="alone", photo="500x375")
    large = best(rows, "throughput", part="serving", load="alone", photo="4000x3000")
    found = [
        Target(
            "throughput over HTTP, share of the bare fp16 session's at its best batch",
            _ratio(over(service, "throughput", raw, "images_per_s")),
            at_least=0.8,
        ),
        Target(
            "share of the time in which the GPU computes, at saturation (NVML)",
            _figures(service, "gpu_busy"),
            unit="of the time",
            at_least=0.9,
        ),
        Target(
            "bare fp16 session at 512x512, over the fastest compiled PyTorch",
            _ratio(over(beside, "images_per_s", compiled, "images_per_s")),
            at_least=1.2,
        ),
        Target(
            "bare fp16 session at 512x512",
            _figures(square, "images_per_s"),
            unit="images/s",
            at_least=2500,
        ),
        Target(
            "one 500x375 JPEG to PNG mask at a time, p50 latency",
            _figures(alone, "p50_ms"),
            unit="ms",
            at_most=6,
        ),
        Target(
            "one 500x375 JPEG to PNG mask at a time, p99 latency",
            _figures(alone, "p99_ms"),
            unit="ms",
            at_most=10,
        ),
        Target(
            "12-megapixel photo, p50 latency",
            _figures(large, "p50_ms"),
            unit="ms",
            at_most=60,
        ),
    ]
    # A dry run on the CPU neither meets nor misses a target.
    return found if on_gpu else [Target(**{**asdict(target), "figures": ()}) for target in found]


def best(rows: Iterable[Row], figure: str, **wanted: object) -> Row | None:
    """The row with the highest figure; None if no row has it."""
    found = matching(rows, figure, **wanted)
    return max(found, key=lambda row: float(row[figure]), default=None)


def _figures(row: Row | None, figure: str) -> tuple[float, ...]:
    """The row's figure; empty without a row, or if the figure is unknown."""
    return () if row is None or row.get(figure) is None else (float(row[figure]),)


def _ratio(ratio: float | None) -> tuple[float, ...]:
    return () if ratio is None else (ratio,)


def over(ours: Row | None, figure: str, theirs: Row | None, other: str) -> float | None:
    """The ratio of two rows' figures; None if one of them is missing."""
    if ours is None or theirs is None or not theirs[other]:
        return None
    return float(ours[figure]) / float(theirs[other])
