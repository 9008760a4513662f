"""``python -m tests.benchmarks.gpu``: the GPU path against its targets, its limits and PyTorch.

Prints the targets, ratios and tables, and writes them with all figures to
``tests/benchmarks/results/gpu.json`` and ``gpu.md``. Parts that are not run keep their earlier
figures if those are from the same machine and commit. If a part fails, its error is recorded and
the other parts run.

Exit status: 0, or 1 if a part failed or the device is missing. Missed targets are reported; they do
not change the exit status.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from service.errors import SegmentError
from service.settings import DEFAULT_MODEL
from tests.benchmarks import (
    bench,
    gpu_limits,
    gpu_network,
    gpu_path,
    gpu_report,
    gpu_serving,
    gpu_tables,
    photos,
)
from tests.benchmarks.bench import ROOT, first_line
from tests.benchmarks.gpu_device import CPU, PACKAGES, GpuBench, facts

PARTS: Final[dict[str, Callable[[GpuBench], None]]] = {
    "session": gpu_network.session,
    "upsampling": gpu_path.upsampling,
    "copies": gpu_path.copies,
    "lanes": gpu_path.lanes,
    "serving": gpu_serving.serving,
    "roofline": gpu_limits.roofline,
    "pytorch": gpu_network.pytorch,
    "options": gpu_network.options,
}
"""In the order of execution; the slowest part is last."""

NOT_QUICK: Final = ("options",)

RESULTS: Final = ROOT / "tests" / "benchmarks" / "results"
WORK: Final = ROOT / "runs" / "gpu"


def main() -> int:
    """Run the requested parts."""
    parser = _parser()
    given = parser.parse_args()
    names = given.parts or [name for name in PARTS if not (given.quick and name in NOT_QUICK)]
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    try:
        environment = {**bench.environment(PACKAGES), "on_gpu": given.device != CPU}
        environment |= facts(given.device)
    except SegmentError as exc:
        print(f"no GPU to measure: {exc} (`--device cpu` is a dry run)", file=sys.stderr)
        return 1
    environment["artefact"] = given.artifact.name
    environment["photos"] = "VOC val" if given.data else "scikit-image"
    out: Path = given.out or (RESULTS if environment["on_gpu"] else WORK)
    run = GpuBench(
        WORK,
        given.artifact,
        photos.serving_photos(WORK / "photos", given.data, 8),
        rounds=1,
        quick=given.quick,
        device=given.device,
        torch_python=given.torch_python,
    )
    stored = gpu_report.load(out)
    about: dict[str, Any] = {}
    tables = ""
    for name in names:
        about[name] = _measure(run, name)
        found = {"environment": environment, "parts": about, "rows": run.rows}
        # Write after each part, so that an interrupted run keeps its results.
        results = gpu_report.merge(stored, found, names)
        targets = gpu_report.targets(results["rows"], on_gpu=environment["on_gpu"])
        gpu_report.write(out, results, targets)
        tables = gpu_tables.markdown(results, targets)
        (out / "gpu.md").write_text(tables, encoding="utf-8")
    total_s = sum(part["seconds"] for part in about.values())
    print(f"\n{tables}\n{total_s:.0f} s; written to {out}")
    return 1 if any(part["error"] for part in about.values()) else 0


def _measure(run: GpuBench, name: str) -> dict[str, Any]:
    """Run a part; returns its time, whether it was quick, and its error."""
    started, error = time.monotonic(), None
    try:
        PARTS[name](run)
    # If one part fails, the others still get their figures.
    except Exception as exc:  # noqa: BLE001
        error = first_line(exc)
        print(f"FAILED {name}: {error}", file=sys.stderr, flush=True)
    gc.collect()
    seconds = round(time.monotonic() - started, 1)
    return {"seconds": seconds, "quick": run.quick, "error": error}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="take two minutes instead of nine")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        metavar="PARTS",
        help=f"comma-separated list of parts: {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:N, or cpu for a dry run without a GPU (default: cuda)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="VOCdevkit", help="send photos of its val list"
    )
    parser.add_argument(
        "--artifact", type=Path, default=DEFAULT_MODEL, metavar="DIR", help="artefact to serve"
    )
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        metavar="PYTHON",
        help="Python interpreter that has torch with CUDA (default: this one)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder (default {RESULTS.relative_to(ROOT)})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
