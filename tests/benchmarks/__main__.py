"""``python -m tests.benchmarks``: measure the service against its peers and compare the masks.

Exit status: 0, or 1 if a contender's masks differ from ours or a server failed. Missed targets are
reported; they do not change the exit status.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from service.settings import DEFAULT_MODEL
from tests.benchmarks import components, lifecycle, network, photos, plots, report, serving
from tests.benchmarks.bench import ROOT, Bench

Stage = Callable[[Bench], None]

PARTS: Final[dict[str, tuple[Stage, ...]]] = {
    "serving": (
        partial(serving.latency, precision="fp32"),
        partial(serving.latency, precision="auto"),
        serving.fp32,
        serving.best_precision,
    ),
    "pipe": (serving.pipe,),
    "components": (components.measure,),
    "network": (network.measure,),
    "lifecycle": (lifecycle.starts, lifecycle.memory),
}


def main() -> int:
    """Run the requested parts."""
    parser = _parser()
    given = parser.parse_args()
    if unknown := set(given.only) - set(PARTS):
        parser.error(f"--only: unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    machine = report.environment()
    sent = photos.serving_photos(out / "photos", given.data, 8 if given.quick else 16)
    rounds = given.rounds or (1 if given.quick else 3)
    bench = Bench(out, given.artifact, sent, rounds=rounds, quick=given.quick)
    failures = []
    for name in ("sweep",) if given.sweep else given.only:
        for stage in (serving.sweep,) if given.sweep else PARTS[name]:
            try:
                stage(bench)
            # If one server does not start, the other parts still get their figures.
            except (RuntimeError, OSError) as exc:
                failures.append(f"{name}: {exc}")
                print(f"FAILED {failures[-1]}", file=sys.stderr, flush=True)
    machine["seconds"] = round(time.monotonic() - started)
    machine["photos"] = "VOC val" if given.data else "scikit-image"
    table = report.write(bench, machine)
    plots.draw(bench)
    print(f"\n{table.read_text(encoding='utf-8')}\n{machine['seconds']} s; written to {out}")
    return 1 if failures or serving.disagreements(bench.masks) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="measure ours only, in under three minutes"
    )
    parser.add_argument("--sweep", action="store_true", help="try out the peers' settings instead")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(PARTS),
        metavar="PARTS",
        help=f"comma-separated list of parts: {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--rounds", type=int, help="rounds per contender (default 3, with --quick 1)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="VOCdevkit", help="send photos of its val list"
    )
    parser.add_argument(
        "--artifact",
        type=Path,
        default=DEFAULT_MODEL,
        metavar="DIR",
        help="artefact that ours serves",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "benchmarks",
        metavar="DIR",
        help="output folder (default runs/benchmarks)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
