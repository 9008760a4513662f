"""``python -m tests.attack [PART ...]``: measure the targets under attack, and write them as JSON.

Parts: `cases`, `rows`, `overload`, `kills` and `mixup`; all if none is named. ``--only N`` sends
one request of `cases` again and prints what it cost.

Exit status: 0, or 1 if a target was missed. The times are meaningful only on a machine without
other load.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.artefacts import build_artefact
from tests.attack import cases, mixup, overload, rows
from tests.processes import logged
from tests.reliability.report import Report

PARTS: Final[dict[str, Callable[[argparse.Namespace], Report]]] = {
    "cases": lambda given: cases.measure(given.out, given.cases, given.seed),
    "rows": lambda given: rows.measure(given.out),
    "overload": lambda given: overload.measure(given.out),
    "kills": lambda given: mixup.measure_kills(given.out),
    "mixup": lambda given: mixup.measure_mixup(given.out),
}


def main() -> int:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(prog="tests.attack", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/attack"), metavar="DIR")
    parser.add_argument("--cases", type=int, default=cases.CASES, help="requests of `cases`")
    parser.add_argument("--seed", type=int, default=1, help="seed of `cases`")
    parser.add_argument("--only", type=int, metavar="N", help="one request of `cases`")
    given = parser.parse_args()
    if unknown := {*given.parts} - {*PARTS}:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    if given.only is not None:
        _show(given.seed, given.only)
        return 0
    missed = []
    for part in given.parts or PARTS:
        report = PARTS[part](given)
        report.write(given.out / f"{part}.json")
        print(f"\n{part}\n\n{report.table()}\n", flush=True)
        missed += [f"{part}: {target.name}" for target in report.targets if not target.met]
    for name in missed:
        print(f"MISSED {name}", file=sys.stderr)
    return 1 if missed else 0


def _show(seed: int, number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = build_artefact(Path(folder) / "tiny")
        with logged(model, log_level="info") as service:
            print(asyncio.run(cases.attack(service, seed, [number]))[0])
            for line in service.lines("request"):
                print(line)


if __name__ == "__main__":
    sys.exit(main())
