"""``python -m tests.benchmarks.gpu``: the GPU's path against its limits, its targets and PyTorch.

Prints targets with met or missed, ratios and tables, and writes them with every figure to
``tests/benchmarks/results/gpu.json`` and ``gpu.md``. Parts that are not run keep the figures they
had there, if those are of the same machine and commit. A part that fails is recorded, and the
others go on.

Exit status: 0, or 1 if a part failed or the device is not there. Missed targets are shown as such
and change nothing: no test depends on time.
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
from tests.benchmarks.gpu_device import CPU, PACKAGES, GpuBench, facts, first_line
from tests.benchmarks.servers import ROOT

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
"""In this order; what takes longest comes last."""

NOT_QUICK: Final = ("options",)

RESULTS: Final = ROOT / "tests" / "benchmarks" / "results"
WORK: Final = ROOT / "runs" / "gpu"


def main() -> int:
    """Run the parts asked for."""
    parser = _parser()
    given = parser.parse_args()
    names = given.parts or [name for name in PARTS if not (given.quick and name in NOT_QUICK)]
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    try:
        environment = {**bench.environment(PACKAGES), "on_gpu": given.device != CPU}
        environment |= facts(given.device)
    except SegmentError as exc:
        print(
            f"no figures of a GPU: {exc} (`--device cpu` tries the benchmarks out)", file=sys.stderr
        )
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
        # After each part: a run that is cut short keeps what it has.
        results = gpu_report.merge(stored, found, names)
        gates = gpu_report.targets(results["rows"], on_gpu=environment["on_gpu"])
        gpu_report.write(out, results, gates)
        tables = gpu_tables.markdown(results, gates)
        (out / "gpu.md").write_text(tables, encoding="utf-8")
    total_s = sum(part["seconds"] for part in about.values())
    print(f"\n{tables}\n{total_s:.0f} s; written to {out}")
    return 1 if any(part["error"] for part in about.values()) else 0


def _measure(run: GpuBench, name: str) -> dict[str, Any]:
    """Run a part; returns what is told of it."""
    started, error = time.monotonic(), None
    try:
        PARTS[name](run)
    # One part must not take the others' figures with it.
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
    parser.add_argument("--quick", action="store_true", help="two minutes instead of nine")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        metavar="PARTS",
        help=f"comma-separated, of {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:N, or cpu, which tries the benchmarks out and measures no GPU",
    )
    parser.add_argument(
        "--data", type=Path, metavar="VOCdevkit", help="photos of its val list are sent"
    )
    parser.add_argument(
        "--artifact", type=Path, default=DEFAULT_MODEL, metavar="DIR", help="what is served"
    )
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that has torch with CUDA (default: this one)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"default {RESULTS.relative_to(ROOT)}"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
