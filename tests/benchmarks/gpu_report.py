"""What a run on a GPU found: targets met and missed, and the file of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.bench import Gate, Row
from tests.benchmarks.gpu_device import sides_of
from tests.benchmarks.gpu_network import LANDSCAPE, SQUARE

JSON_NAME: Final = "gpu.json"

_SAME_RUN: Final = (
    *("device", "driver", "cpu", "cores", "commit", "changes", "versions", "artefact", "photos"),
)
"""What has to be equal for figures of two runs to stand in one file."""

NOT_MEASURED: Final = "not measured"


def merge(
    stored: Mapping[str, Any] | None, found: Mapping[str, Any], parts: Iterable[str]
) -> dict[str, Any]:
    """Results of this run, with those of an earlier one for the ``parts`` not run now.

    Each is ``{"environment", "parts", "rows"}``. What was measured elsewhere, or of other code, is
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
    """The results that are there; None if there are none."""
    try:
        stored: dict[str, Any] = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored


def write(folder: Path, results: Mapping[str, Any], found: Iterable[Gate]) -> None:
    """Write ``gpu.json``."""
    told = [{**asdict(gate), "target": gate.target, "verdict": verdict(gate)} for gate in found]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**results, "targets": told}, indent=1, default=str)
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")


def verdict(gate: Gate) -> str:
    """Met, missed or not measured."""
    return {True: "met", False: "MISSED", None: NOT_MEASURED}[gate.kept]


def targets(rows: Sequence[Row], *, on_gpu: bool) -> list[Gate]:
    """Every target; those that there are no figures for have none."""
    service = best(rows, "throughput", part="serving", load="closed")
    raw = best(rows, "images_per_s", part="session", precision="fp16", shape=sides_of(LANDSCAPE))
    square = best(rows, "images_per_s", part="session", precision="fp16", shape=sides_of(SQUARE))
    compiled_rows = [row for row in rows if str(row.get("side", "")).startswith("compiled")]
    compiled = best(compiled_rows, "images_per_s", part="pytorch", shape=sides_of(SQUARE))
    # At its best among the batches that PyTorch was measured with too.
    batches = {row["batch"] for row in compiled_rows if "images_per_s" in row}
    beside = best(
        [row for row in rows if row.get("batch") in batches],
        "images_per_s",
        part="session",
        precision="fp16",
        shape=sides_of(SQUARE),
    )
    alone = best(rows, "throughput", part="serving", load="alone", photo="500x375")
    large = best(rows, "throughput", part="serving", load="alone", photo="4000x3000")
    found = [
        Gate(
            "service over HTTP, of the bare fp16 session at its best batch",
            _ratio(over(service, "throughput", raw, "images_per_s")),
            at_least=0.8,
        ),
        Gate(
            "share of the time that the GPU computes, at saturation (NVML)",
            _figures(service, "gpu_busy"),
            unit="of the time",
            at_least=0.9,
        ),
        Gate(
            "bare fp16 session at 512x512, over the fastest compiled PyTorch",
            _ratio(over(beside, "images_per_s", compiled, "images_per_s")),
            at_least=1.2,
        ),
        Gate(
            "bare fp16 session at 512x512",
            _figures(square, "images_per_s"),
            unit="images/s",
            at_least=2500,
        ),
        Gate(
            "one 500x375 JPEG to PNG mask at a time, p50",
            _figures(alone, "p50_ms"),
            unit="ms",
            at_most=6,
        ),
        Gate(
            "one 500x375 JPEG to PNG mask at a time, p99",
            _figures(alone, "p99_ms"),
            unit="ms",
            at_most=10,
        ),
        Gate(
            "12-megapixel photo, p50",
            _figures(large, "p50_ms"),
            unit="ms",
            at_most=60,
        ),
    ]
    # The CPU in a GPU's place meets no target of a GPU, and misses none.
    return found if on_gpu else [Gate(**{**asdict(gate), "figures": ()}) for gate in found]


def best(rows: Iterable[Row], figure: str, **wanted: object) -> Row | None:
    """The row with the greatest figure; None if there is none."""
    found = [
        row
        for row in rows
        if figure in row and all(row.get(key) == value for key, value in wanted.items())
    ]
    return max(found, key=lambda row: float(row[figure]), default=None)


def _figures(row: Row | None, figure: str) -> tuple[float, ...]:
    """None of a row that is not there, or that could not tell."""
    return () if row is None or row.get(figure) is None else (float(row[figure]),)


def _ratio(ratio: float | None) -> tuple[float, ...]:
    return () if ratio is None else (ratio,)


def over(ours: Row | None, figure: str, theirs: Row | None, other: str) -> float | None:
    """The ratio of two rows' figures; None without either."""
    if ours is None or theirs is None or not theirs[other]:
        return None
    return float(ours[figure]) / float(theirs[other])
